"""RMSNorm: ``y = x * rstd * (weight_offset + weight)`` with ``rstd = 1 / sqrt(mean(x^2) + eps)`` (arXiv 1910.07467).

Backward, with ``n = x * rstd`` and ``g = dy * (weight_offset + weight)``:
``dx = rstd * (g - n * mean(g * n))`` and ``dweight = sum over rows of dy * n``.
Saved: x, and rstd (fp32, one number per row). Moved: x and y forward; x, dy and dx backward.
The kernels are in ``shared/norm.py``.
"""

import torch
from torch import Tensor

from . import reference
from .runtime.checks import check_rows, check_vector
from .runtime.launch import use_triton
from .shared.norm import apply_norm
from .shared.norm_tiles import check_width


def out_dtype(x: Tensor, weight: Tensor | None, scale_in_fp32: bool) -> torch.dtype:
    """The dtype of the normalised output: ``x``'s, or the promoted one where the weight multiplies in its own dtype."""
    if weight is None or scale_in_fp32 or weight.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(weight.dtype, x.dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    scale_in_fp32: bool = False,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight_offset + weight)`` over the last dimension, statistics in fp32.

    Args:
        x: ``[..., N]``, fp16, bf16, fp32 or fp64; any strides.
        weight: ``[N]`` of any of these dtypes, or None.
        eps: added to the mean square.
        weight_offset: added to the weight; 1.0 for the Gemma family.
        scale_in_fp32: multiply by the weight before rounding to ``x.dtype`` (Gemma), not after (Llama).

    Returns:
        ``[..., N]`` in ``x.dtype`` if there is no weight or ``scale_in_fp32``; otherwise in the dtype that
        ``weight.dtype`` and ``x.dtype`` promote to. The gradient of ``weight`` is accumulated in fp32.

    Raises:
        TypeError: ``x`` or ``weight`` is not floating-point.
        ValueError: the last dimension is empty, or over 65536 where Triton runs; ``weight`` does not fit ``x``.
    """
    check_rows("x", x)
    if weight is not None:
        check_vector("weight", weight, x)
    dtype = out_dtype(x, weight, scale_in_fp32)
    if not use_triton(x, weight) or dtype == torch.float64:
        return reference.rms_norm(x, weight, eps, weight_offset=weight_offset, scale_in_fp32=scale_in_fp32)
    check_width(x)
    return apply_norm(x, None, weight, None, eps, weight_offset, scale_in_fp32, False, dtype)
