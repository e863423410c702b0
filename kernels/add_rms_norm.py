"""Residual add and RMSNorm in one kernel: ``total = x + residual``, ``y = rms_norm(total)``.

Backward: the gradient of total is ``dtotal + d rms_norm(dy)``, which is the gradient of both x and residual.
Saved: total, and rstd (fp32, one number per row). Moved: x, residual, total and y forward; total, dy, dtotal and the
one gradient backward. The kernels are in ``shared/norm.py``.
"""

import torch
from torch import Tensor

from . import reference
from .rms_norm import out_dtype
from .runtime.checks import check_rows, check_same_shape, check_vector
from .runtime.launch import use_triton
from .shared.norm import apply_norm
from .shared.norm_tiles import check_width


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    scale_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(rms_norm(x + residual), x + residual)``; the norm is over the last dimension, statistics in fp32.

    Args:
        x: ``[..., N]``, fp16, bf16, fp32 or fp64; any strides.
        residual: of ``x``'s shape; the sum is in the dtype that both promote to.
        weight: ``[N]`` of any of these dtypes, or None.
        eps: added to the mean square.
        weight_offset: added to the weight; 1.0 for the Gemma family.
        scale_in_fp32: multiply by the weight before rounding to the sum's dtype (Gemma), not after (Llama).

    Returns:
        The normalised sum ``[..., N]``, of the dtype that ``rms_norm`` gives it, and the sum itself.

    Raises:
        TypeError: an argument is not floating-point.
        ValueError: the last dimension is empty, or over 65536 where Triton runs; shapes or devices do not fit.
    """
    check_rows("x", x)
    check_same_shape("residual", residual, "x", x)
    if weight is not None:
        check_vector("weight", weight, x)
    if x.dtype != residual.dtype:
        sum_dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(sum_dtype), residual.to(sum_dtype)
    dtype = out_dtype(x, weight, scale_in_fp32)
    if not use_triton(x, residual, weight) or dtype == torch.float64:
        return reference.add_rms_norm(
            x, residual, weight, eps, weight_offset=weight_offset, scale_in_fp32=scale_in_fp32
        )
    check_width(x)
    return apply_norm(x, residual, weight, None, eps, weight_offset, scale_in_fp32, False, dtype)
