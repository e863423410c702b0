"""Changing one instance's forward: binding methods to it, and copies of a function with other globals.

No source is rewritten and no module global changes, so other models keep the original. A bound method refers to its
module weakly, so a patched model is freed as soon as its last user drops it.
"""

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .rule import Skip


class ModuleRef:
    """A weak reference to a module. In a deep copy of the module it refers to the copy."""

    __slots__ = ("_ref",)

    def __init__(self, module: nn.Module):
        self._ref = weakref.ref(module)

    def __call__(self) -> Any:
        """The module.

        Raises:
            ReferenceError: It no longer exists.
        """
        module = self._ref()
        if module is None:
            raise ReferenceError("the module of this method no longer exists")
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleRef":
        return ModuleRef(memo.get(id(self()), self()))

    def __reduce__(self) -> tuple[type["ModuleRef"], tuple[Any]]:
        return ModuleRef, (self(),)


def cached_weakly(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``compute``, called once for each function. Neither keeps the other alive, nor what the function closes over."""
    known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @functools.wraps(compute)
    def cached(function: Any) -> Any:
        if function not in known:
            known[function] = compute(function)
        return known[function]

    return cached


class Missing:
    """Marks an attribute that the instance did not have. A class, because deep copies do not copy classes."""


class Bound:
    """A function bound to a module, which it does not keep alive: what patching sets as an instance attribute.

    Args:
        function: Called with the module and the arguments.
        module: The module.
        attribute: The instance attribute that holds this.
        old: What the attribute held before.
    """

    __slots__ = ("__weakref__", "attribute", "function", "module", "old")

    def __init__(self, function: Callable, module: nn.Module | ModuleRef, attribute: str, old: Any = Missing):
        self.function = function
        self.module = module if isinstance(module, ModuleRef) else ModuleRef(module)
        self.attribute = attribute
        self.old = old

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the module."""
        return self.function(self.module(), *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(self.function, self.module()))

    def apply(self) -> None:
        """Set the attribute."""
        module = self.module()
        self.old = vars(module).get(self.attribute, Missing)
        setattr(module, self.attribute, self)

    def undo(self, place: str) -> None:
        """Restore what the attribute held. ``place`` is the attribute that holds this now."""
        module = self.module()
        if place != self.attribute:  # accelerate's device hooks have moved a forward to ``_old_forward``
            setattr(module, place, types.MethodType(type(module).forward, module))
        elif self.old is Missing:
            delattr(module, place)
        else:
            setattr(module, place, self.old)

    def is_unpickled(self) -> bool:
        """Whether this is the class's own method, as after unpickling."""
        return self.function is getattr(type(self.module()), self.attribute, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bound":
        function, old = copy.deepcopy((self.function, self.old), memo)
        return Bound(function, copy.deepcopy(self.module, memo), self.attribute, old)

    def __reduce__(self) -> tuple[Callable, tuple]:
        if isinstance(self.function, types.MethodType):
            return Bound, (self.function, self.module, self.attribute, self.old)
        return _unpickle, (self.module, self.attribute)  # functions made at run time cannot be pickled


def _unpickle(module: ModuleRef, attribute: str) -> Bound:
    name = "forward" if attribute == "_old_forward" else attribute
    return Bound(getattr(type(module()), name), module, attribute)


def bound_methods(module: nn.Module) -> Iterator[tuple[str, Bound]]:
    """``(attribute, method)`` for what patching has set on this instance."""
    return ((name, value) for name, value in [*vars(module).items()] if isinstance(value, Bound))


def forward_function(module: nn.Module) -> types.FunctionType | None:
    """The function inside any ``functools.wraps`` layers of the class's forward."""
    function = inspect.unwrap(type(module).forward)
    return function if isinstance(function, types.FunctionType) else None


def free_attribute(module: nn.Module, attribute: str) -> str:
    """The instance attribute to set so that ``attribute`` of ``module`` is replaced.

    accelerate's device hooks keep the module's own forward as ``_old_forward`` and call that.

    Raises:
        Skip: Something else has replaced it on the instance.
    """
    current = vars(module).get(attribute)
    if current is None or getattr(current, "__func__", current) is getattr(type(module), attribute, None):
        return attribute
    if attribute == "forward" and "_old_forward" in vars(module):
        return "_old_forward"
    raise Skip(f"its {attribute} was already replaced on the instance")


def rebind(function: Callable, replaced: Mapping[str, Any]) -> types.FunctionType:
    """A copy of ``function`` that sees ``replaced`` in place of those globals, inside any ``functools.wraps`` layers.

    Raises:
        Skip: A wrapper does not hold the function it wraps in its closure.
    """

    def with_globals(inner: types.FunctionType) -> types.FunctionType:
        namespace = {**inner.__globals__, **replaced}
        # torch.compile looks a name up in the module named here, which has the original, or else in these globals.
        namespace.pop("__name__", None)
        return _copy(inner, namespace, inner.__closure__, own_code=True)

    return replace_innermost(function, with_globals)


def replace_innermost(function: Callable, replace: Callable[[types.FunctionType], Callable]) -> Any:
    """A copy of ``function`` with ``replace(inner)`` for the function inside its ``functools.wraps`` layers.

    Raises:
        Skip: A wrapper does not hold the function it wraps in its closure.
    """
    assert isinstance(function, types.FunctionType), function
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return replace(function)
    replaced = replace_innermost(inner, replace)
    cells = function.__closure__ or ()
    holds = [cell.cell_contents is inner for cell in cells]
    if not any(holds):
        raise Skip(
            f"its forward is wrapped by {function.__qualname__}, which cannot be rebuilt around another function"
        )
    closure = tuple(types.CellType(replaced) if held else cell for cell, held in zip(cells, holds, strict=True))
    copied = _copy(function, function.__globals__, closure)
    copied.__dict__["__wrapped__"] = replaced
    return copied


def _copy(
    function: types.FunctionType, namespace: dict[str, Any], closure: Any, own_code: bool = False
) -> types.FunctionType:
    # torch.compile keeps what it compiled with the code object, and its functions in the globals of the first caller.
    code = function.__code__.replace() if own_code else function.__code__
    copied = types.FunctionType(code, namespace, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__, copied.__module__ = function.__kwdefaults__, function.__module__
    copied.__dict__.update(function.__dict__)
    return copied
