"""Logits that are computed when something reads them.

In evaluation nothing tells a model whether its caller wants the logits or only the loss. With these, a loss-only
evaluation never builds them, and ``compute_metrics`` gets real ones.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten
# What models, accelerate and DeepSpeed do to logits between lm_head and the caller: these stay lazy, others compute.
_STAY_LAZY = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.tanh.default,
    aten._to_copy.default, aten.alias.default, aten.detach.default,
}  # fmt: skip
_READ_MEMORY = frozenset((
    "numpy", "__array__", "tolist", "item", "cpu", "data_ptr", "storage", "untyped_storage", "pin_memory",
    "share_memory_", "__reduce_ex__", "__deepcopy__",
))  # fmt: skip


class LazyLogits(Tensor):
    """A tensor of known shape, dtype and device whose values ``compute()`` makes on first use, without gradients."""

    @staticmethod
    def __new__(cls, compute, shape, dtype, device):
        """``compute``: a function of no arguments that returns a tensor of this shape, dtype and device."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._compute = compute
        self._values = None
        return self

    def materialize(self) -> Tensor:
        """The values as an ordinary tensor; computed once."""
        if self._values is None:
            with torch.no_grad():
                self._values, self._compute = self._compute(), None
        return self._values

    def __repr__(self) -> str:
        state = "not computed" if self._values is None else "computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # These read memory behind the dispatcher's back.
        if getattr(function, "__name__", "") in _READ_MEMORY:
            args = tree_map(_materialized, args)
        with torch._C.DisableTorchFunctionSubclass():  # the default would rewrap results as this class
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        lazy = args[0]
        if function in _STAY_LAZY and isinstance(lazy, cls) and not any(_is_tensor_of_values(a) for a in args[1:]):
            same_device = torch.device(kwargs.get("device") or lazy.device) == lazy.device
            if same_device and lazy._values is None:
                dtype = kwargs.get("dtype") or lazy.dtype
                return cls(lambda: function(lazy.materialize(), *args[1:], **kwargs), lazy.shape, dtype, lazy.device)
        return function(*tree_map(_materialized, args), **tree_map(_materialized, kwargs))


def _materialized(value):
    return value.materialize() if isinstance(value, LazyLogits) else value


def _is_tensor_of_values(value) -> bool:
    """Whether a second operand could change the shape or dtype: any tensor but a 0-d one."""
    return torch.is_tensor(value) and value.ndim > 0
