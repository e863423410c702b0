"""Attention within the rows that a ``Layout`` has put one after another.

On a GPU, flash attention with cumulative lengths takes the rows as they lie. It is used for half precision, heads up
to 256 wide and transformers' own ``sdpa``. Everything else takes the definition: queries, keys and values are padded
again, on the right, and the model's own attention function runs on them. So soft-caps, sinks, values of another width
and attention on a CPU need no code here.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..head.per_thread import PerThread
from ..probing.probe import autocast_states
from .layout import Rows, is_bounds, rows_of

# Arguments of an attention function that say more about places than rows can keep.
_PLACED = ("position_bias", "cache", "indices", "block_indices")
_DENSE_ONLY = {"softcap", "s_aux", "sinks"}  # arguments that flash attention does not know
MAX_HEAD_DIM = 256
INT32 = 2**31
IMPLEMENTATIONS = ("sdpa", "eager")  # whose functions take padded rows, a mask and nothing else about places


_TOLD = PerThread()


@contextmanager
def windows_told() -> Iterator[list[int | None]]:
    """The sliding windows that the attention modules pass in this context, one for each call."""
    told: list[int | None] = []
    _TOLD.slot.value = told
    try:
        yield told
    finally:
        _TOLD.slot.value = None


def attend_rows(
    attend: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``attend``, an attention function of transformers, or attention within rows if the mask has row boundaries.

    Args:
        attend: The function for ordinary masks.
        module: The attention module.
        query: ``[1, heads, tokens, head_dim]``.
        key: ``[1, key heads, tokens, head_dim]``.
        value: ``[1, key heads, tokens, value_dim]``.
        attention_mask: The mask of a ``Layout``, or any other.
        args: Further positional arguments of ``attend``; not with row boundaries.
        kwargs: Further arguments of ``attend``.

    Returns:
        ``([1, tokens, heads, value_dim], None)``.

    Raises:
        NotImplementedError: An argument says more about places in the batch than rows can keep.
    """
    if not is_bounds(attention_mask):
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    assert attention_mask is not None
    placed = [name for name in _PLACED if kwargs.get(name) is not None]
    if args or placed:
        raise NotImplementedError(f"its attention takes {', '.join(placed) or 'positional arguments'}")
    if _TOLD.slot.value is not None:
        _TOLD.slot.value.append(kwargs.get("sliding_window"))
    rows = rows_of(attention_mask, query.shape[2])
    is_sdpa = getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa"
    states = autocast_states(query, key, value)
    if is_sdpa and not any(kwargs.get(name) is not None for name in _DENSE_ONLY) and _flash_takes(*states):
        return _flash(module, states[0], states[1], states[2], rows, **kwargs), None
    padded = [rows.pad(state.transpose(1, 2)).transpose(1, 2) for state in (query, key, value)]
    mask = rows_mask(rows, query, _is_causal(module, kwargs), kwargs.get("sliding_window"), as_bias=not is_sdpa)
    output, _ = attend(module, *padded, mask, **kwargs)
    return rows.unpad(output), None


def change(attend: Callable) -> Callable:
    """``attend`` with rows; what an ``AttentionTable`` puts in its place."""
    return functools.partial(attend_rows, attend)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if given is None else given


def rows_mask(
    rows: Rows, query: Tensor, causal: bool, window: int | None, as_bias: bool, always: bool = False
) -> Tensor | None:
    """The mask of the padded rows: bool (``True``: attend) for SDPA, a bias for eager attention.

    ``None`` where SDPA is causal by itself, unless ``always``. The padding is on the right, where no real token looks.
    """
    if window is not None and window >= rows.longest:
        window = None
    if causal and window is None and not as_bias and not always:
        return None
    places = torch.arange(rows.longest, device=query.device)
    distance = places[:, None] - places
    held = torch.ones_like(distance, dtype=torch.bool)[None, None]
    held = held & (distance >= 0) if causal else held & rows.held[:, None, None]
    if window is not None:
        held = held & (distance < window) & (causal | (distance > -window))
    held = held.expand(rows.count, -1, -1, -1) if always else held
    if not as_bias:
        return held
    return torch.zeros_like(held, dtype=query.dtype).masked_fill_(~held, torch.finfo(query.dtype).min)


def _flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention with cumulative lengths computes these."""
    width = query.shape[-1]
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    # The backward kernel addresses its fp32 gradient of the queries with 32 bits.
    addressed = (query.shape[2] + 128) * query.shape[1] * (-(-width // 32) * 32)
    return width == value.shape[-1] and width <= MAX_HEAD_DIM and width % 8 == 0 and addressed < INT32


def _flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    causal = _is_causal(module, {"is_causal": is_causal})
    window = {}
    if sliding_window is not None and sliding_window < rows.longest:
        window = {"window_size_left": sliding_window - 1, "window_size_right": 0 if causal else sliding_window - 1}
    options = (rows, dropout, causal, {"scale": scaling, **window})
    return _FlashWithinRows.apply(*(state[0].transpose(0, 1) for state in (query, key, value)), *options)[0][None]


class _FlashWithinRows(torch.autograd.Function):
    """Flash attention with cumulative lengths. Tokens without keys get zero, and so do their gradients.

    The forward kernel writes zeros for rows that have no keys. The backward kernel skips such rows, and keys that
    belong to no row, so that PyTorch's own node would return whatever the memory held.
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, rows: Rows, dropout: float, causal: bool, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """``[tokens, heads, head_dim]`` each; the output, then what backward needs."""
        return torch.ops.aten._flash_attention_forward(
            query, key, value, rows.queries, rows.keys, rows.longest, rows.longest, dropout, causal, False, **options
        )[:4]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save what backward needs."""
        query, key, value, *ctx.settings = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of the queries, keys and values."""
        rows, dropout, causal, options = ctx.settings
        *states, output, logsumexp, generator, unused = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            grad, *states, output, logsumexp, rows.queries, rows.keys, rows.longest, rows.longest, dropout, causal,
            generator, unused, **options,
        )  # fmt: skip
        for gradient in gradients:
            gradient[rows.real :].zero_()
        return (*gradients, None, None, None, None)
