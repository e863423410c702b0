"""Rule for grouped-query attention: SDPA gets keys and values as they are, under a mask as well.

With a mask, transformers repeats each key and value head for all query heads that share it. Not all of torch's fused
kernels take fewer key heads than query heads, and if none does, torch falls back to the unfused definition, which keeps
the whole attention matrix. But torch says which kernel it would choose. If it is a fused one, we do not repeat. That
saves ``groups`` times the keys and values, in forward and again in recomputation, and summing their gradients.

Everything else is transformers' own function: a copy in which ``use_gqa_in_sdpa`` always returns ``True``.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..config import LigerConfig
from ..probing.attention_table import AttentionTable, attention_tables
from ..probing.probe import TOLERANCE, autocast_states, difference, generator
from ..probing.rebinding import rebind
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
        query_, key_, value_ = states = autocast_states(query, key, value)
        if _has_fused_kernel(query_, key_, value_, attention_mask, kwargs):
            if acted is not None:
                acted.note()
            return _without_copies()(module, *states, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


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


def matches(module: nn.Module) -> bool:
    """Whether the module's forward looks up an attention function, and query heads share key heads."""
    groups = getattr(module, "num_key_value_groups", 1)
    return isinstance(groups, int) and groups > 1 and bool(attention_tables(module))


def probe(module: nn.Module, config: LigerConfig) -> Match:
    """A view of the table of attention functions that has ours in place of transformers' own ``sdpa``."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation != "sdpa":
        raise Skip(f"its attn_implementation is {implementation}, not sdpa")
    tables = attention_tables(module)
    if any(table.get("sdpa") is not sdpa_attention_forward for table in tables.values()):
        raise Skip("its sdpa is not the one of transformers")
    if not _is_known():
        raise Skip("transformers' sdpa function groups heads in an unknown way")
    rebind(type(module).forward, {})  # raises Skip if it cannot be rebuilt
    acted = Acted()
    ours = functools.partial(grouped_sdpa, acted=acted)
    names = {name: AttentionTable(table, functools.partial(_change, ours)) for name, table in tables.items()}
    return Match("attention", VARIANT, names=names, acted=acted)


def _change(ours: Callable, function: Callable) -> Callable:
    return ours if function is sdpa_attention_forward else function


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


def _key(module: nn.Module) -> tuple[Any, ...]:
    return type(module).forward, getattr(getattr(module, "config", None), "_attn_implementation", None)


RULES = (Rule(("attention",), matches, probe, key=_key),)
