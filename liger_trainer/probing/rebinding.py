"""Changing one instance's forward: where a method is bound, and copies of a function with other globals.

No source is rewritten and no module global changes, so other models keep the original.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from .rule import Skip

_Function = TypeVar("_Function", bound=Callable)


def forward_function(module: nn.Module) -> types.FunctionType | None:
    """The function inside any ``functools.wraps`` layers of the class's forward."""
    function = inspect.unwrap(type(module).forward)
    return function if isinstance(function, types.FunctionType) else None


def is_of_class(module: nn.Module, attribute: str, value: Any) -> bool:
    """Whether ``value`` is what ``module``'s class defines as ``attribute``."""
    return getattr(value, "__func__", value) is getattr(type(module), attribute, None)


def free_attribute(module: nn.Module, attribute: str) -> str:
    """The instance attribute to set so that ``attribute`` of ``module`` is replaced.

    accelerate's device hooks keep the module's own forward as ``_old_forward`` and call that.

    Raises:
        Skip: Something else has replaced it on the instance.
    """
    current = vars(module).get(attribute)
    if current is None or is_of_class(module, attribute, current):
        return attribute
    if attribute == "forward" and "_old_forward" in vars(module):
        return "_old_forward"
    raise Skip(f"its {attribute} was already replaced on the instance")


def mark(function: _Function) -> _Function:
    """``function``, marked as one that patching binds to instances."""
    function.__dict__["_is_liger"] = True
    return function


def is_marked(value: Any) -> bool:
    """Whether ``value`` is a bound method of a marked function."""
    return getattr(getattr(value, "__func__", None), "_is_liger", False)


def rebind(function: Callable, replaced: Mapping[str, Any]) -> types.FunctionType:
    """A copy of ``function`` that sees ``replaced`` in place of those globals, inside any ``functools.wraps`` layers.

    Raises:
        Skip: A wrapper does not hold the function it wraps in its closure.
    """
    assert isinstance(function, types.FunctionType), function
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__
    copied = None
    if inner is None:
        namespace = {**function.__globals__, **replaced}
        # torch.compile looks a name up in the module named here, which has the original, or else in these globals.
        namespace.pop("__name__", None)
    else:
        copied = rebind(inner, replaced)
        cells = closure or ()
        holds = [cell.cell_contents is inner for cell in cells]
        if not any(holds):
            raise Skip(
                f"its forward is wrapped by {function.__qualname__}, which cannot be rebuilt around another function"
            )
        closure = tuple(types.CellType(copied) if held else cell for cell, held in zip(cells, holds, strict=True))
        namespace = function.__globals__
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    copy.__dict__.update(function.__dict__)
    if copied is not None:
        copy.__dict__["__wrapped__"] = copied
    return copy
