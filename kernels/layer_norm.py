"""LayerNorm (arXiv 1607.06450): ``y = n * weight + bias``, ``n = (x - mean) * rstd``, ``rstd = 1 / sqrt(var + eps)``.

An offset may be added to ``weight``.
Backward, with ``g = dy * weight``: ``dx = rstd * (g - mean(g) - n * mean(g * n))``,
``dweight = sum over rows of dy * n`` and ``dbias = sum over rows of dy``.
Saved: x, mean and rstd (fp32, two numbers per row). Moved: x and y forward; x, dy and dx backward.
The kernels are in ``shared/norm.py``.
"""

import torch
from torch import Tensor

from . import reference
from .runtime.checks import check_rows, check_vector
from .runtime.launch import use_triton
from .shared.norm import apply_norm
from .shared.norm_tiles import check_width


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    weight_offset: float = 0.0, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``(x - mean) / sqrt(var + eps) * (weight_offset + weight) + bias`` over the last dimension, statistics in fp32.

    Rounded once.

    Args:
        x: ``[..., N]``, fp16, bf16, fp32 or fp64; any strides.
        weight: ``[N]`` of any of these dtypes, or None.
        bias: ``[N]`` of any of these dtypes, or None.
        eps: added to the variance.
        weight_offset: added to the weight; 1.0 for Nemotron.
        out_dtype: floating-point dtype of the result; by default torch's own choice: ``x.dtype``, or fp32 under CUDA
            autocast.

    Returns:
        ``[..., N]`` in ``out_dtype``.
        The gradients of ``weight`` and ``bias`` are accumulated in fp32.

    Raises:
        TypeError: an argument is not floating-point.
        ValueError: the last dimension is empty, or over 65536 where Triton runs; ``weight`` or ``bias`` does not fit.
    """
    check_rows("x", x)
    if weight is not None:
        check_vector("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, x)
    if not use_triton(x, weight, bias) or x.dtype == torch.float64:
        return reference.layer_norm(x, weight, bias, eps, weight_offset=weight_offset, out_dtype=out_dtype)
    check_width(x)
    # Autocast would widen x and keep the wide copy for backward; the kernel reads x as it is and writes fp32.
    autocast = out_dtype is None and x.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.float32 if autocast else out_dtype or x.dtype
    return apply_norm(x, None, weight, bias, eps, weight_offset, True, True, dtype)
