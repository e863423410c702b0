"""Rule for grouped-query attention: SDPA gets keys and values as they are, under a mask as well.

Where there is a mask, transformers repeats each key and value head for all query heads that share it, because not all
of torch's fused kernels take fewer of them, and where none does torch falls back to the definition, which keeps the
whole attention matrix. But torch can be asked which kernel it would choose. With a fused one the copies are left out:
``groups`` times the keys and values, in forward and again in recomputation, and the sums of their gradients.

All else is transformers' own function: a copy of it for which the question whether to repeat has another answer.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..probing.probe import TOLERANCE, difference, generator
from ..probing.rebinding import forward_function, rebind, rebinding
from ..probing.rule import Refusal, Verdict

QUESTION = "use_gqa_in_sdpa"  # what sdpa_attention_forward calls to know whether SDPA groups heads by itself
VARIANT = "sdpa, grouped heads under a mask"
FUSED = {b.value for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)}

_without_copies = rebind(sdpa_attention_forward, {QUESTION: lambda *args: True})


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args, **kwargs
) -> tuple[Tensor, None]:
    """transformers' ``sdpa_attention_forward``, without copies of ``key`` and ``value`` where a fused kernel allows.

    ``query`` is ``[batch, heads, tokens, head_dim]``, ``key`` and ``value`` have fewer heads.
    """
    if not args and _may_leave_out_copies(query, attention_mask, kwargs):
        states = _as_in_sdpa(query, key, value)
        if _has_fused_kernel(*states, attention_mask, kwargs):
            return _without_copies(module, *states, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


def _as_in_sdpa(*states: Tensor) -> list[Tensor]:
    """The states in the dtype that SDPA itself would give them under autocast: its kernels are chosen by that."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(states)
    dtype = torch.get_autocast_dtype(device)
    return [state if state.dtype == torch.float64 else state.to(dtype) for state in states]


def _may_leave_out_copies(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether a mask is for several queries, and no position bias or paged cache comes before the copies."""
    if mask is None or torch.compiler.is_compiling() or query.dim() != 4 or query.shape[2] == 1:
        return False
    return kwargs.get("position_bias") is None and kwargs.get("cache") is None


def _has_fused_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether torch would choose a fused kernel for these as they are."""
    options = {"dropout_p": kwargs.get("dropout", 0.0), "scale": kwargs.get("scaling"), "enable_gqa": True}
    try:
        return torch._fused_sdp_choice(query, key, value, mask, **options) in FUSED
    except RuntimeError:  # no kernel is left, where the user has turned off those that group heads
        return False


@functools.cache
def _interfaces(forward) -> tuple[str, ...]:
    """Names in ``forward`` that are transformers' table of attention functions."""
    values = ((name, forward.__globals__.get(name)) for name in forward.__code__.co_names)
    return tuple(name for name, value in values if isinstance(value, AttentionInterface))


def matches(module: nn.Module) -> bool:
    """Whether the module's forward looks up an attention function, SDPA, and several query heads share a key head."""
    groups = getattr(module, "num_key_value_groups", 1)
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    function = forward_function(module)
    if not isinstance(groups, int) or groups < 2 or implementation != "sdpa" or function is None:
        return False
    return bool(_interfaces(function))


def probe(module: nn.Module) -> Verdict:
    """A view of the table of attention functions in which ours stands for transformers' own ``sdpa``."""
    function = forward_function(module)
    tables = {name: function.__globals__[name] for name in _interfaces(function)}
    if any(table.get("sdpa") is not sdpa_attention_forward for table in tables.values()):
        return Refusal("attention", "its sdpa is not the one of transformers")
    if not _is_known():
        return Refusal("attention", "transformers' sdpa function groups heads in a way that is not known")
    return rebinding("attention", VARIANT, module, {name: _WithOurs(table) for name, table in tables.items()})


@functools.cache
def _is_known() -> bool:
    """Whether the question decides about the copies, and the answer changes no number."""
    asked = []
    attend = rebind(sdpa_attention_forward, {QUESTION: lambda *args: asked.append(args) or True})
    if isinstance(attend, str):
        return False
    random = generator()
    query = torch.randn(2, 4, 6, 16, generator=random)
    key, value = torch.randn(2, 2, 2, 6, 16, generator=random)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    arguments = (SimpleNamespace(num_key_value_groups=2), query, key, value, mask)
    ours, theirs = attend(*arguments)[0], sdpa_attention_forward(*arguments)[0]
    return len(asked) == 1 and difference(ours, theirs) <= TOLERANCE[torch.float32]


class _WithOurs(AttentionInterface):
    """``table`` as it is at each call, but for ours where it has transformers' own ``sdpa``.

    What others put there later (sequence parallelism does) is theirs.
    """

    def __init__(self, table: AttentionInterface):
        self.table = table

    def __getitem__(self, name):
        function = self.table[name]
        return grouped_sdpa if function is sdpa_attention_forward else function

    def __setitem__(self, name, function):
        self.table[name] = function

    def __delitem__(self, name):
        del self.table[name]

    def __iter__(self):
        return iter(self.table)

    def __len__(self):
        return len(self.table)
