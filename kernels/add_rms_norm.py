"""Residual add and RMSNorm in one kernel: ``total = x + residual``, ``y = rms_norm(total)``.

Backward: the gradient of total is ``dtotal + d rms_norm(dy)``, and that is the gradient of x and of residual alike.
Saved: total, and rstd (fp32, one number a row). Moved: x, residual, total and y forward; total, dy, dtotal and the one
gradient backward. The kernels are those of ``rms_norm``.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .rms_norm import out_dtype, rms_norm_bwd, rms_norm_bwd_op, rms_norm_fwd
from .runtime.autograd import Function
from .runtime.checks import check_rows, check_same_shape, check_vector
from .runtime.launch import use_triton
from .runtime.operators import opaque_op
from .shared.norm_tiles import check_width


class AddRMSNormFunction(Function):
    """``add_rms_norm`` on ``x`` and ``residual`` of any one shape and dtype; all arguments are positional."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, weight_offset, scale_in_fp32):
        """Save the sum, the weight and rstd."""
        keep_rstd = any(ctx.needs_input_grad)
        y, total, rstd = rms_norm_fwd(x, residual, weight, eps, weight_offset, scale_in_fp32, keep_rstd)
        ctx.save_for_backward(total, weight, rstd)
        ctx.settings = (weight_offset, scale_in_fp32)
        ctx.set_materialize_grads(False)
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.mark_non_differentiable(total)  # as x + residual is, when only the weight is trained
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal):
        """Either upstream gradient may be None."""
        total, weight, rstd = ctx.saved_tensors
        needs_dx, needs_dresidual, needs_dw = ctx.needs_input_grad[:3]
        dsum, dw = dtotal, None
        if dy is not None:
            dsum, dw = rms_norm_bwd(
                dy, dtotal, total, weight, rstd, *ctx.settings, needs_dx or needs_dresidual, needs_dw
            )
        # One tensor for both: autograd adds into a gradient in place only where it holds the sole reference.
        return dsum if needs_dx else None, dsum if needs_dresidual else None, dw, None, None, None


def _fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_fp32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return rms_norm_fwd(x, residual, weight, eps, weight_offset, scale_in_fp32)


def _fake_fwd(x, residual, weight, eps, weight_offset, scale_in_fp32):
    y = x.new_empty(x.shape, dtype=out_dtype(x, weight, scale_in_fp32))
    return y, x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, dy, dtotal, _):
    needs_dx, needs_dresidual, needs_dw = ctx.needs_input_grad[:3]
    needs_dsum = needs_dx or needs_dresidual
    dsum, dw = rms_norm_bwd_op(dy, dtotal, *ctx.saved_tensors, *ctx.settings, needs_dsum, needs_dw)
    return dsum if needs_dx else None, dsum if needs_dresidual else None, dw if needs_dw else None, None, None, None


_add_rms_norm_op = opaque_op("add_rms_norm", _fwd, _fake_fwd, _differentiate, _save)


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
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if not use_triton(x) or out_dtype(x, weight, scale_in_fp32) == torch.float64:
        return reference.add_rms_norm(
            x, residual, weight, eps, weight_offset=weight_offset, scale_in_fp32=scale_in_fp32
        )
    check_width(x)
    weight = None if weight is None else weight.contiguous()
    if torch.compiler.is_compiling():
        return _add_rms_norm_op(x, residual, weight, float(eps), float(weight_offset), scale_in_fp32)[:2]
    return AddRMSNormFunction.apply(x, residual, weight, eps, weight_offset, scale_in_fp32)
