"""Logits that are not built: an empty tensor whose values cannot be read by mistake.

In training, ``lm_head`` computes the loss and no logits, and returns these. Engines and models may pass them on, cast
and scale them; what would read values raises an error that says what to do.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

# What models, accelerate, DeepSpeed and FSDP do to logits between lm_head and the caller. None of it reads a value.
_PASS = frozenset((
    "__repr__", "__format__", "__hash__", "__len__", "__set__", "alias", "as_subclass", "clone", "contiguous", "cpu",
    "cuda", "detach", "detach_", "dim", "double", "element_size", "expand_as", "float", "get_device", "half",
    "bfloat16", "is_complex", "is_contiguous", "is_floating_point", "is_inference", "is_shared", "ndimension",
    "nelement", "numel", "record_stream", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_",
    "reshape", "retain_grad", "size", "storage_offset", "stride", "tanh", "tanh_", "to", "type", "type_as", "view",
    "view_as",
))  # fmt: skip
_SCALE = frozenset((
    "mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "__mul__", "__rmul__", "__imul__", "__truediv__",
    "__itruediv__", "__div__", "__idiv__",
))  # fmt: skip
_ARRAY_INTERFACE = cast(Any, Tensor.__cuda_array_interface__).__get__


class UnbuiltLogits(Tensor):
    """An empty tensor ``[..., 0]`` in place of the logits ``[..., V]``."""

    message = "training logits are not built; set fused_loss: false in liger_config to have them"

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}: {self.message})"

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _passes(function, args):
            raise RuntimeError(cls.message)
        return super().__torch_function__(function, types, args, kwargs or {})


class LossOnlyLogits(UnbuiltLogits):
    """``UnbuiltLogits`` of an evaluation that asked for the loss only."""

    message = "logits are not built in a prediction step with prediction_loss_only; set prediction_loss_only: false"


def zero_of(empty: Tensor) -> Tensor:
    """The sum of no elements, 0, as a plain tensor that is connected to ``empty`` in the autograd graph."""
    if not isinstance(empty, UnbuiltLogits):
        return empty.sum()
    with torch._C.DisableTorchFunctionSubclass():
        return empty.sum()


def _passes(function: Callable, args: tuple) -> bool:
    """Whether ``function`` hands the empty tensor on, or says something about it other than its values."""
    name = getattr(function, "__name__", "")
    if name == "__get__":  # an attribute, such as ``shape``
        return function != _ARRAY_INTERFACE
    if name in _SCALE:  # by numbers: ``HeadForm`` has no place for a tensor
        return isinstance(args[0], UnbuiltLogits) and not any(map(torch.is_tensor, args[1:]))
    if name == "__getitem__":  # ``[..., :n]`` leaves out logits that pad the vocabulary; none are left to be read
        return isinstance(args[1], tuple) and len(args[1]) == 2 and args[1][0] is ... and isinstance(args[1][1], slice)
    return name in _PASS
