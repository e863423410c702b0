"""Logits that are computed when something reads them.

In evaluation, nothing tells a model whether its caller wants the logits or only the loss. With lazy logits, an
evaluation that needs only the loss never builds them, and ``compute_metrics`` gets real ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten
# What models, accelerate and DeepSpeed do to logits between lm_head and the caller. These stay lazy, others compute.
_STAY_LAZY = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.tanh.default,
    aten._to_copy.default, aten.alias.default, aten.detach.default,
}  # fmt: skip
_READ_MEMORY = frozenset((
    "numpy", "__array__", "tolist", "item", "cpu", "data_ptr", "storage", "untyped_storage", "pin_memory",
    "share_memory_", "__reduce_ex__", "__deepcopy__",
))  # fmt: skip


class LazyLogits(Tensor):
    """A tensor of known shape, dtype and device. ``compute`` makes its values on first use, without gradients."""

    _compute: Callable[[], Tensor]
    _values: Tensor | None

    @staticmethod
    def __new__(
        cls: type["LazyLogits"],
        compute: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> "LazyLogits":
        """Make one from ``compute``, which returns a tensor of this shape, dtype and device."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._compute = compute
        self._values = None
        return self

    def materialize(self) -> Tensor:
        """The values as an ordinary tensor; computed once."""
        if self._values is None:
            with torch.no_grad():
                self._values = self._compute()
            del self._compute  # it holds the hidden states
        return self._values

    def __repr__(self) -> str:
        state = "not computed" if self._values is None else "computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # These read memory without going through the dispatcher.
        if getattr(function, "__name__", "") in _READ_MEMORY:
            args = tree_map(_materialized, args)
        with torch._C.DisableTorchFunctionSubclass():  # the default would wrap results as this class
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = args[0]
        if function in _STAY_LAZY and isinstance(lazy, cls) and not any(_is_tensor_of_values(a) for a in args[1:]):
            same_device = torch.device(kwargs.get("device") or lazy.device) == lazy.device
            if same_device and lazy._values is None:
                dtype = kwargs.get("dtype") or lazy.dtype
                return cls(lambda: function(lazy.materialize(), *args[1:], **kwargs), lazy.shape, dtype, lazy.device)
        return function(*tree_map(_materialized, args), **tree_map(_materialized, kwargs))


def _materialized(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value


def _is_tensor_of_values(value: Any) -> bool:
    """Whether a second operand could change the shape or dtype, as any tensor but a 0-d one can."""
    return torch.is_tensor(value) and value.ndim > 0
