"""The base class of the ops' autograd functions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch._C import _autograd
from torch.autograd import forward_ad


class _NoContext:
    """Replaces ``ctx`` when no backward can follow, and keeps nothing."""

    needs_input_grad = (False,) * 16  # at least as many as any op has arguments

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` whose ``apply`` costs less: a sixth of an op's host time, a third without gradients.

    What is left out binds default arguments and unwraps tensors that leaked out of a functorch transform; our functions
    have no defaults and no ``setup_context``. Inside a transform, and in forward-mode differentiation, ``definition``
    takes the place of ``forward``: autograd itself knows how to differentiate it. A backward that is differentiated
    again (``create_graph=True``, so gradients are enabled in it) returns ``differentiate(definition, ...)``.
    """

    definition: ClassVar[Callable | None] = None  # takes the arguments of ``forward``, and computes it in plain PyTorch

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run ``forward`` and record ``backward``; positional arguments only."""
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:  # is_transformed, inlined
            return super().apply(*args) if cls.definition is None else cls.definition(*args)
        if not torch.is_grad_enabled():
            return cls.forward(_NoContext(), *args)
        # torch's stubs lack this base class's method, and a cast would cost host time.
        return super(torch.autograd.Function, cls).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def are_saved_tensors_hooked() -> bool:
    """Whether saved tensors are intercepted, as by activation checkpointing or offloading."""
    return _autograd._top_saved_tensors_default_hooks(False) is not None


def differentiate(
    definition: Callable, args: Sequence[Any], upstream: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of ``args`` that can be differentiated again, for a backward that runs with ``create_graph=True``.

    Args:
        definition: What the op computes, in plain PyTorch.
        args: Its arguments. Those that require no gradient, and those that are no tensors, get ``None``.
        upstream: The gradient of each of its outputs, or ``None``.
    """
    if all(grad is None for grad in upstream):
        return (None,) * len(args)
    # Views, because one argument may depend on another, as hidden states on a tied weight: the gradient of a view
    # leaves out what comes by way of other arguments.
    arguments = [a.view_as(a) if torch.is_tensor(a) and a.requires_grad else a for a in args]
    outputs = definition(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=False) if g is not None and o.requires_grad]
    inputs = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    results, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(results, inputs, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if torch.is_tensor(a) and a.requires_grad else None for a in arguments)


def once_differentiable(message: str) -> Callable[[Callable], Callable]:
    """Decorates a backward without second derivatives: differentiating its results is an error, ``message``."""

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            fails = cast(Any, torch._C)._functions.DelayedError(message.encode(), len(found))
            return fails(*(None if grad is None else grad.detach().requires_grad_() for grad in found))

        return wrapper

    return decorate
