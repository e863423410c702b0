"""What a probe's finding relies on and a user may change later. It is checked at each call of the module."""

import inspect
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .hooks import is_intercepted

logger = logging.getLogger(__name__)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, types.FunctionType, types.BuiltinFunctionType)


class Conditions:
    """The children, functions and settings that a module's code reads, as they were when it was probed.

    They hold for any module with the same ``settings_key``. Where they no longer hold, the caller runs the module's
    own forward, and ``warn`` says so once.

    Args:
        module: The module that was probed.
        function: The method that was probed; the forward by default.
        followed: Names that the replacement reads by itself at each call.
    """

    __slots__ = ("_children", "_cls", "_settings", "_warned")

    def __init__(self, module: nn.Module, function: Callable | None = None, followed: tuple[str, ...] = ()):
        self._cls = type(module)
        self._warned = False
        names = {*_names_read(function or self._cls.forward, self._cls)} - {*followed, *vars(nn.Module())}
        attributes = vars(module)
        self._settings = tuple((n, attributes[n]) for n in sorted(names) if isinstance(attributes.get(n, self), _PLAIN))
        children = ((name, child) for name, child in module._modules.items() if name not in followed)
        self._children = tuple((name, Conditions(child)) for name, child in children if child is not None)

    def hold(self, module: nn.Module) -> bool:
        """Whether everything is as it was, and nothing else runs when a child is called."""
        attributes, children = module.__dict__, module._modules
        for name, value in self._settings:
            if name not in attributes or attributes[name] != value:
                return False
        for name, conditions in self._children:
            child = children.get(name)
            if child is None or type(child) is not conditions._cls or is_intercepted(child):
                return False
            if (conditions._settings or conditions._children) and not conditions.hold(child):
                return False
        return True

    def warn(self, module: nn.Module) -> None:
        """Say once that the module's own forward runs."""
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(
                "liger_trainer: %s runs its own forward, because a child or a setting of it is hooked or is not what "
                "it was when apply_liger was called",
                type(module).__name__,
            )


def _names_read(function: Callable, cls: type) -> Iterator[str]:
    """Names in the code of ``function`` and of the methods of ``cls`` that it calls."""
    pending: list[Any] = [inspect.unwrap(function)]
    seen: set[types.CodeType] = set()
    while pending:
        code = pending.pop()
        code = code if isinstance(code, types.CodeType) else getattr(code, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            yield name
            method = inspect.getattr_static(cls, name, None)
            if method is not None and method is not inspect.getattr_static(nn.Module, name, None):
                method = getattr(method, "__func__", getattr(method, "fget", method))
                pending.append(inspect.unwrap(method) if callable(method) else None)
