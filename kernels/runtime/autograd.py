"""The base class of the ops' autograd functions."""

from typing import Any

import torch
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
    have no defaults and no ``setup_context``. Inside a transform, and in forward-mode differentiation, torch's own
    ``apply`` answers, with its error.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run ``forward`` and record ``backward``; positional arguments only."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return cls.forward(_NoContext(), *args)
        # torch's stubs lack this base class's method, and a cast would cost host time.
        return super(torch.autograd.Function, cls).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
