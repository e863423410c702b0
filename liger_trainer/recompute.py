"""Cheap results that need not be kept for backward: computed again from tensors that are kept anyway."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(result: Tensor, compute: Callable[..., Tensor], inputs: list[Tensor]):
    """A context in which whatever would save ``result`` for its backward saves how to compute it instead.

    Args:
        result: ``compute(*inputs)``, about to be used once, by a linear layer.
        compute: deterministic, so that backward sees the same numbers.
        inputs: tensors that are saved already, so that keeping them costs nothing.

    A plain context, which saves as usual, where gradients are off, while compiling (the compiler decides for itself
    what to keep) and inside activation checkpointing, which must not have ``inputs`` kept past its forward.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return nullcontext()
    pointer, size = result.data_ptr(), result.numel()
    inputs = [t.detach() for t in inputs]

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        # A linear layer saves its input reshaped to two dimensions: the same memory in another shape.
        same = tensor.numel() == size and tensor.data_ptr() == pointer and tensor.is_contiguous()
        return tensor.shape if same else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return compute(*inputs).view(packed)

    return saved_tensors_hooks(pack, unpack)
