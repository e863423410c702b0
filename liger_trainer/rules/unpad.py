"""Rule for un-padding: the decoder stack takes padded batches as one row of their real tokens.

What is replaced is in ``liger_trainer/unpadding/``: the stack's forward, and the table of attention functions that its
attention modules look into. This rule finds both by structure. Whether the stack then computes the same shows on a few
rows of the first batch, because it may take weights that do not exist yet.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import LigerConfig
from ..probing.attention_table import AttentionTable, attention_tables
from ..probing.probe import is_known, name_in
from ..probing.rebinding import ModuleRef, forward_function
from ..probing.rule import Acted, Match, Rule, Skip
from ..unpadding.attention import IMPLEMENTATIONS, change
from ..unpadding.mixers import layers_of, wrap_layer
from ..unpadding.stack import Pooling, UnpaddedStack

VARIANT = "padded batches run as one row"


def matches(model: nn.Module) -> bool:
    """Every model is a candidate, so the report says why batches stay padded."""
    return True


def _stack(model: nn.Module) -> nn.Module | None:
    """The innermost module that turns ids or embeddings and a 2-D mask into hidden states."""
    if not isinstance(model, PreTrainedModel):
        return None
    starts = (start for start in (model.get_decoder(), model.base_model) if isinstance(start, nn.Module))
    return next((module for start in starts for module in start.modules() if _is_stack(module)), None)


def _is_stack(module: Any) -> bool:
    if not isinstance(module, PreTrainedModel) or not _takes(module, "attention_mask"):
        return False
    return _takes(module, "inputs_embeds") and module.get_output_embeddings() is None


def _around(model: PreTrainedModel, stack: nn.Module) -> list[nn.Module]:
    """The module between ``model`` and its stack that joins texts with images, if there is one."""
    outer = model.base_model
    inside = outer is not stack and any(module is stack for module in outer.modules())
    return [outer] if inside and outer is not model and _takes(outer, "position_ids") else []


def _takes(module: nn.Module, name: str) -> bool:
    """Whether the class's forward has a parameter of this name."""
    function = forward_function(module)
    return function is not None and name in _parameters(function)


@functools.cache  # the stack is looked up at each forward
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _pooling(model: nn.Module) -> Pooling | None:
    """Which hidden states a sequence classifier reads: those of last tokens if it looks for the id of padding."""
    if not any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__):
        return None
    function = forward_function(model)
    finds_last = function is not None and "pad_token_id" in function.__code__.co_names
    return Pooling.LAST if finds_last else Pooling.FIRST_OR_ALL


def stack_name(model: nn.Module) -> str:
    """Name of the decoder stack in ``model``."""
    return name_in(model, _stack(model))


def probe(model: nn.Module, config: LigerConfig) -> Match:
    """The replacement of the stack's forward, and of the attention functions in it."""
    stack = _stack(model)
    if stack is None or not isinstance(model, PreTrainedModel):
        raise Skip("it is not a transformers model with a decoder")
    if model.config.is_encoder_decoder:
        raise Skip("its decoder sees the tokens of an encoder, whose padding is another one")
    if _takes(model, "start_positions"):
        raise Skip("it chooses an answer among all places of a row, and padding has a score as well")
    if not _takes(stack, "position_ids"):
        raise Skip(f"{type(stack).__name__} takes no position_ids, so it places tokens by their column")
    inside = {*stack.modules()}
    for module in model.modules():
        if module not in inside and not isinstance(module, nn.Linear) and not is_known(type(module)):
            raise Skip(f"it is not known what {type(module).__name__} reads at padding")
    tables = [(module, found) for module in stack.modules() if (found := attention_tables(module))]
    mixers = list(_mixers(stack))
    if not tables and not mixers:
        raise Skip("none of its modules takes a mask, so it is not known what mixes tokens")
    implementation = getattr(getattr(stack, "config", model.config), "_attn_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        raise Skip(f"its attn_implementation is {implementation}; must be {' or '.join(IMPLEMENTATIONS)}")
    acted = Acted()
    unpadded = UnpaddedStack(ModuleRef(model), acted, _pooling(model))
    views: dict[int, AttentionTable] = {}
    return Match(
        "unpad",
        VARIANT,
        wraps=(
            (stack, unpadded.wrap),
            *((outer, unpadded.wrap_outer) for outer in _around(model, stack)),
            *((module, unpadded.mixers.wrap_attention) for module, _ in tables),
            *((mixer, unpadded.mixers.wrap) for mixer in mixers),
            *((layer, wrap_layer) for layer in layers_of(stack, mixers)),
        ),
        other_names=tuple((m, {n: _with_rows(t, views) for n, t in found.items()}) for m, found in tables),
        before=unpadded.before_forward,
        after=unpadded.after_forward,
        acted=acted,
    )


def _mixers(stack: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that take a mask and use no table: attention of their own, convolutions, state spaces."""
    for child in stack.children():
        if attention_tables(child):
            continue
        inner = list(_mixers(child))
        if inner or any(map(attention_tables, child.modules())):
            yield from inner
        elif not isinstance(stack, nn.ModuleList) and _takes(child, "attention_mask"):  # a layer only hands it on
            yield child


def _with_rows(table: Any, views: dict[int, AttentionTable]) -> AttentionTable:
    """One view for each table, so that layers that are alike share one forward."""
    return views.setdefault(id(table), AttentionTable(table, change))


def unpadded_stack(model: nn.Module) -> UnpaddedStack | None:
    """What un-pads the batches of ``model``; ``None`` if nothing does."""
    for name in ("forward", "_old_forward"):
        function = getattr(vars(_stack(model) or model).get(name), "function", None)
        owner = getattr(getattr(function, "func", None), "__self__", None)
        if isinstance(owner, UnpaddedStack):
            return owner
    return None


RULES = (Rule(("unpad",), matches, probe, key=id, whole_model=True, per_batch=True, part=stack_name),)
