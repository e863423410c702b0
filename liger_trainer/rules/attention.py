"""Rule for grouped-query attention: SDPA gets keys and values as they are, under a mask as well.

With a mask, transformers repeats each key and value head for all query heads that share it. Not all of torch's fused
kernels take fewer key heads than query heads, and if none does, torch falls back to the unfused definition, which keeps
the whole attention matrix. But torch says which kernel it would choose. If it is a fused one, we do not repeat. That
saves ``groups`` times the keys and values, in forward and again in recomputation, and summing their gradients.

Everything else is transformers' own function: a copy in which ``use_gqa_in_sdpa`` always returns ``True``.
"""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..config import LigerConfig
from ..probing.probe import TOLERANCE, difference, generator
from ..probing.rebinding import forward_function, rebind
from ..probing.rule import Acted, Match, Rule, Skip

QUESTION = "use_gqa_in_sdpa"  # sdpa_attention_forward calls this to decide whether SDPA groups the heads
VARIANT = "sdpa, grouped heads under a mask"
FUSED = {b.value for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)}


@functools.cache
def _without_copies() -> Callable:
    return rebind(sdpa_attention_forward, {QUESTION: lambda *args: True})


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    acted: Acted | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa_attention_forward``, without copies of ``key`` and ``value`` if a fused kernel allows that.

    ``query`` is ``[batch, heads, tokens, head_dim]``, ``key`` and ``value`` have fewer heads.
    """
    if not args and attention_mask is not None and _may_omit_copies(query, kwargs):
        query_, key_, value_ = states = _as_in_sdpa(query, key, value)
        if _has_fused_kernel(query_, key_, value_, attention_mask, kwargs):
            if acted is not None:
                acted.note()
            return _without_copies()(module, *states, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


def _as_in_sdpa(*states: Tensor) -> list[Tensor]:
    """The states in the dtype to which autocast would cast them in SDPA, because that decides about the kernel."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(states)
    dtype = torch.get_autocast_dtype(device)
    return [state if state.dtype == torch.float64 else state.to(dtype) for state in states]


def _may_omit_copies(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether there are several queries, and no position bias or paged cache that would need the copies."""
    if torch.compiler.is_compiling() or query.dim() != 4 or query.shape[2] == 1:
        return False
    return kwargs.get("position_bias") is None and kwargs.get("cache") is None


def _has_fused_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether torch would choose a fused kernel for these without copies."""
    options = {"dropout_p": kwargs.get("dropout", 0.0), "scale": kwargs.get("scaling"), "enable_gqa": True}
    try:
        return cast(Any, torch)._fused_sdp_choice(query, key, value, mask, **options) in FUSED
    except RuntimeError:  # the user has turned off all kernels that group heads
        return False


@functools.cache
def _interfaces(forward: Any) -> tuple[str, ...]:
    """Global names in ``forward`` that are transformers' table of attention functions."""
    values = ((name, forward.__globals__.get(name)) for name in forward.__code__.co_names)
    return tuple(name for name, value in values if isinstance(value, AttentionInterface))


def matches(module: nn.Module) -> bool:
    """Whether the module's forward looks up an attention function, and query heads share key heads."""
    groups = getattr(module, "num_key_value_groups", 1)
    function = forward_function(module)
    if not isinstance(groups, int) or groups < 2 or function is None:
        return False
    return bool(_interfaces(function))


def probe(module: nn.Module, config: LigerConfig) -> Match:
    """A view of the table of attention functions that has ours in place of transformers' own ``sdpa``."""
    function: Any = forward_function(module)
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation != "sdpa":
        raise Skip(f"its attn_implementation is {implementation}, not sdpa")
    tables = {name: function.__globals__[name] for name in _interfaces(function)}
    if any(table.get("sdpa") is not sdpa_attention_forward for table in tables.values()):
        raise Skip("its sdpa is not the one of transformers")
    if not _is_known():
        raise Skip("transformers' sdpa function groups heads in an unknown way")
    rebind(type(module).forward, {})  # raises Skip if it cannot be rebuilt
    acted = Acted()
    names = {name: _WithOurs(table, functools.partial(grouped_sdpa, acted=acted)) for name, table in tables.items()}
    return Match("attention", VARIANT, names=names, acted=acted)


@functools.cache
def _is_known() -> bool:
    """Whether ``QUESTION`` decides about the copies, and its answer does not change the result."""
    asked = []
    attend = rebind(sdpa_attention_forward, {QUESTION: lambda *args: asked.append(args) or True})
    random = generator()
    query = torch.randn(2, 4, 6, 16, generator=random)
    key, value = torch.randn(2, 2, 2, 6, 16, generator=random)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    arguments: Any = (SimpleNamespace(num_key_value_groups=2), query, key, value, mask)
    ours, theirs = attend(*arguments)[0], sdpa_attention_forward(*arguments)[0]
    return len(asked) == 1 and difference(ours, theirs) <= TOLERANCE[torch.float32]


class _WithOurs(AttentionInterface):
    """``table`` as it is at each call, with ``ours`` in place of transformers' own ``sdpa``.

    A function that others register later, as sequence parallelism does, stays.
    """

    def __init__(self, table: AttentionInterface, ours: Callable):
        self.table, self.ours = table, ours

    def __getitem__(self, name: str) -> Callable:
        function = self.table[name]
        return self.ours if function is sdpa_attention_forward else function

    def __setitem__(self, name: str, function: Callable) -> None:
        self.table[name] = function

    def __delitem__(self, name: str) -> None:
        del self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def _key(module: nn.Module) -> tuple[Any, ...]:
    return type(module).forward, getattr(getattr(module, "config", None), "_attn_implementation", None)


RULES = (Rule(("attention",), matches, probe, key=_key),)
