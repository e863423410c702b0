"""Argument checks of the ops (dtype, shape and device), and the view of a tensor as rows."""

import torch
from torch import Tensor

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_floating(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` unless ``x`` is fp16, bf16, fp32 or fp64."""
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {x.dtype}; must be float16, bfloat16, float32 or float64")


def check_rows(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is floating-point with a last dimension of at least one element."""
    check_floating(name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; must be [..., N] with N > 0")


def check_vector(name: str, v: Tensor, x: Tensor) -> None:
    """Raise unless ``v`` is a floating-point vector as long as ``x``'s last dimension and on its device."""
    check_floating(name, v)
    if v.dim() != 1 or v.shape[0] != x.shape[-1]:
        raise ValueError(f"{name}: got shape {tuple(v.shape)}; must be {(x.shape[-1],)}, the input's last dimension")
    check_device(name, v, x)


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``t`` is on ``x``'s device."""
    if t.device != x.device:
        raise ValueError(f"{name}: got device {t.device}; must be {x.device}, the input's device")


def check_same_shape(name: str, t: Tensor, other: str, x: Tensor) -> None:
    """Raise unless ``t`` is floating-point and has ``x``'s shape and device; ``other`` is ``x``'s name."""
    check_floating(name, t)
    if t.shape != x.shape:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; must be {tuple(x.shape)}, the shape of {other}")
    check_device(name, t, x)


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor with ``x``'s shape and device, and its dtype unless ``dtype`` is given."""
    if (dtype is None or dtype == x.dtype) and x.is_contiguous():
        return torch.empty_like(x)  # passing keywords would double the cost of this call
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """``x`` as ``[rows, last dimension]`` with unit stride inside a row; a view if the strides allow, else a copy."""
    return unit_stride(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def row_layout(x: Tensor) -> tuple[Tensor, int]:
    """``x`` and its row stride, with all dimensions but the last flattened into rows; copies only where it must."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = as_rows(x)
    return x, x.stride(0)
