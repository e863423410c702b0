"""A module's forward with other globals: how what it calls by name is replaced on one instance.

No source is rewritten and no module global changes, so other models keep the original.
"""

import inspect
import types

from torch import nn

from .rule import Rebinding, Refusal, Verdict


def forward_function(module: nn.Module) -> types.FunctionType | None:
    """The function at the bottom of the class's forward, below any ``functools.wraps`` layers."""
    function = inspect.unwrap(type(module).forward)
    return function if isinstance(function, types.FunctionType) else None


def rebinding(kind: str, variant: str, module: nn.Module, names: dict) -> Verdict:
    """The verdict that ``names`` can be replaced in the module's forward, or that it cannot be rebuilt."""
    reason = rebind(type(module).forward, {})
    return Refusal(kind, reason) if isinstance(reason, str) else Rebinding(kind, variant, names)


def rebind(function, replaced: dict) -> types.FunctionType | str:
    """A copy of ``function`` that sees ``replaced`` in place of those globals, through any ``functools.wraps`` layers.

    Returns the reason as a string where a wrapper does not hold the function it wraps in its closure.
    """
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__
    if inner is None:
        namespace = {**function.__globals__, **replaced}
        # torch.compile looks names up in the module of this name, where the original is, or else in these globals
        namespace.pop("__name__", None)
    else:
        copied = rebind(inner, replaced)
        if isinstance(copied, str):
            return copied
        cells = [cell.cell_contents is inner for cell in closure or ()]
        if not any(cells):
            return f"its forward is wrapped by {function.__qualname__}, which cannot be rebuilt around another function"
        closure = tuple(types.CellType(copied) if holds else cell for cell, holds in zip(closure, cells, strict=True))
        namespace = function.__globals__
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    copy.__dict__.update(function.__dict__)
    if inner is not None:
        copy.__wrapped__ = copied
    return copy
