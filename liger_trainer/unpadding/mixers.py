"""Modules that see the rows padded again, while the rest of their layer does not.

They mix tokens in a way of their own: attention that uses no table of attention functions, and the convolutions, linear
attention and state spaces of hybrid models. Padding is then on the right, where nothing that looks back sees it. Where
attention functions alone do not give the same, whole attention modules run like this as well.

Such a module may get no attention mask. Its layer then finds the row boundaries by the position ids, which every layer
gets, and which a recomputed forward gets again.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..head.per_thread import PerThread
from ..probing.rebinding import replace_innermost
from .attention import rows_mask
from .layout import Rows, is_bounds, rows_of

# The boundaries of the rows, by the storage of the position ids. A model may hand its layers a view of the ids, and
# checkpointing then keeps nothing but the view until backward.
_BOUNDS: dict[int, tuple[StorageWeakRef, Tensor]] = {}
_LAYER = PerThread()  # the boundaries of the layer that a thread runs


def remember_bounds(position_ids: Tensor, bounds: Tensor) -> None:
    """Let layers find ``bounds`` as long as ``position_ids`` or a view of it exists."""
    for key, (storage, _) in [*_BOUNDS.items()]:
        if storage.expired():
            _BOUNDS.pop(key, None)
    storage = StorageWeakRef(position_ids.untyped_storage())
    _BOUNDS[storage.cdata] = storage, bounds


@dataclass
class Mixers:
    """How the mixers of one stack run; ``check`` finds it out.

    Args:
        repad_attention: Whether attention modules that use a table run on padded rows as a whole.
        causal_mask: Whether the other mixers need a causal mask, as attention does.
    """

    repad_attention: bool = False
    causal_mask: bool = True

    def wrap_attention(self, original: Callable) -> Callable:
        """The forward of an attention module that uses a table."""
        return functools.partial(self._forward, original, True)

    def wrap(self, original: Callable) -> Callable:
        """The forward of another module that mixes tokens."""
        return functools.partial(self._forward, original, False)

    def _forward(self, original: Callable, uses_table: bool, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        bounds = next(filter(is_bounds, given), _LAYER.slot.value)
        if bounds is None or (uses_table and not self.repad_attention):
            return original(module, *args, **kwargs)
        hidden = next((value for value in given if torch.is_tensor(value) and value.dim() == 3), None)
        if hidden is None:  # an embedding of positions
            return original(module, *args, **kwargs)
        rows = rows_of(bounds, hidden.shape[1])
        mask = None
        if uses_table or self.causal_mask:
            implementation = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
            mask = rows_mask(rows, hidden, True, None, as_bias=implementation != "sdpa", always=True)
        padded = functools.partial(_padded, rows, mask)
        output = original(module, *map(padded, args), **{name: padded(value) for name, value in kwargs.items()})
        if isinstance(output, tuple):
            return tuple(_unpadded(rows, part) for part in output)
        return rows.unpad(output)


def _padded(rows: Rows, mask: Tensor | None, value: Any) -> Any:
    """An argument of a mixer for the padded rows."""
    if isinstance(value, tuple):
        return tuple(_padded(rows, mask, part) for part in value)
    if is_bounds(value):
        return mask
    if torch.is_tensor(value) and value.dim() > 1 and value.shape[:2] == (1, rows.total):
        return rows.pad(value)
    return value


def _unpadded(rows: Rows, part: Any) -> Any:
    """A part of a mixer's output for the row; attention weights are left out."""
    if not torch.is_tensor(part) or part.dim() < 3:
        return part
    return rows.unpad(part) if part.shape[:2] == (rows.count, rows.longest) else None


def wrap_layer(original: Callable) -> Callable:
    """The forward of a layer, which tells the mixers in it the row boundaries.

    transformers checkpoints inside of a layer's forward, so the innermost function is wrapped, which is recomputed.
    """
    return functools.partial(_forward_of_class, original, _with_bounds(original))


def _forward_of_class(original: Callable, wrapped: Callable, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call ``wrapped``, or what it would be for the layer's class of today.

    FSDP2 gives a layer a class of its own, and transformers checkpoints in the forward of the layer's class alone.
    """
    today = type(layer).forward
    changed = today is not original and not torch.compiler.is_compiling()
    if changed and any(vars(base).get("forward") is original for base in type(layer).__mro__):
        wrapped = _with_bounds_once(today)
    return wrapped(layer, *args, **kwargs)


def _with_bounds(function: Callable) -> Callable:
    def tells(inner: Callable) -> Callable:
        @functools.wraps(inner)  # decorators of transformers ask for its name
        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _layer_forward(inner, layer, *args, **kwargs)

        return forward

    return replace_innermost(function, tells)


_with_bounds_once = functools.cache(_with_bounds)  # for the forwards of classes


def _layer_forward(original: Callable, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    before = _LAYER.slot.value
    _LAYER.slot.value = _find_bounds((*args, *kwargs.values()))
    try:
        return original(layer, *args, **kwargs)
    finally:
        _LAYER.slot.value = before


def _find_bounds(values: tuple) -> Tensor | None:
    """The boundaries among a layer's arguments, or those that belong to its position ids."""
    for value in values:
        if is_bounds(value):
            return value
    for value in values:
        if torch.is_tensor(value) and value.dtype == torch.int64:
            storage, bounds = _BOUNDS.get(value.untyped_storage()._cdata, (None, None))
            if storage is not None and not storage.expired():
                return bounds
    return None


def layers_of(stack: nn.Module, mixers: list[nn.Module]) -> Iterator[nn.Module]:
    """The items of lists in ``stack`` that hold any of ``mixers``."""
    held = set(mixers)
    for module in stack.modules():
        if isinstance(module, nn.ModuleList):
            yield from (layer for layer in module if layer not in held and not held.isdisjoint(layer.modules()))
