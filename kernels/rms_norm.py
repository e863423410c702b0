"""RMSNorm: ``y = x * rstd * (weight_offset + weight)`` with ``rstd = 1 / sqrt(mean(x^2) + eps)`` (arXiv 1910.07467).

Backward, with ``n = x * rstd`` and ``g = dy * (weight_offset + weight)``:
``dx = rstd * (g - n * mean(g * n))`` and ``dweight = sum over rows of dy * n``.
Saved: x, and rstd (fp32, one number a row). Moved: x and y forward; x, dy and dx backward.
The kernels also serve ``add_rms_norm``: forward adds a residual first, backward adds the gradient of that sum.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .runtime.autograd import Function
from .runtime.checks import check_rows, check_vector, dense_like, row_layout
from .runtime.launch import launcher, sm_count, tl, triton, use_triton
from .runtime.operators import opaque_op, or_empty
from .shared.norm_tiles import (
    check_width,
    column_partials,
    load_per_row,
    new_partials,
    persistent_tiling,
    row_tiling,
    sum_partials,
    sums_in_backward,
)


@triton.jit
def _load_scale(weight_ptr, weight_offset, cols, num_cols, SCALE_IN_FP32: tl.constexpr):
    weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0)
    scale = weight.to(tl.float32) + weight_offset
    if not SCALE_IN_FP32:  # the modules that scale in the weight's dtype also round weight + offset to it
        scale = scale.to(weight.dtype).to(tl.float32)
    return scale[None, :]


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # [num_rows, num_cols]
    residual_ptr,  # [num_rows, num_cols]
    weight_ptr,  # [num_cols]
    y_ptr,  # [num_rows, num_cols], contiguous
    total_ptr,  # [num_rows, num_cols], contiguous
    rstd_ptr,  # [num_rows] fp32, or None
    x_row_stride,
    residual_row_stride,
    num_rows,
    num_cols,
    eps: float,
    weight_offset: float,
    SCALE_IN_FP32: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    out_offsets = rows[:, None] * num_cols + cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    x_dtype = x.dtype
    if residual_ptr is not None:
        residual_offsets = rows[:, None] * residual_row_stride + cols[None, :]
        residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0)
        # What is normalised is the sum as the next layer reads it, rounded.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_dtype)
        tl.store(total_ptr + out_offsets, x, mask=mask)
    if weight_ptr is not None:  # before the reduction, so that its latency hides behind that of x
        scale = _load_scale(weight_ptr, weight_offset, cols, num_cols, SCALE_IN_FP32)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / num_cols + eps)
    y = x * rstd
    if weight_ptr is not None:
        if not SCALE_IN_FP32:
            y = y.to(x_dtype).to(tl.float32)
        y *= scale
    tl.store(y_ptr + out_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows[:, None], rstd, mask=(rows < num_rows)[:, None])


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,  # [num_rows, num_cols]
    dtotal_ptr,  # [num_rows, num_cols]
    x_ptr,  # [num_rows, num_cols]
    weight_ptr,  # [num_cols]
    rstd_ptr,  # [num_rows] fp32
    dx_ptr,  # [num_rows, num_cols], contiguous
    dw_partial_ptr,  # [num_programs, num_cols]
    dy_row_stride,
    dtotal_row_stride,
    x_row_stride,
    num_rows,
    num_cols,
    num_tiles,
    weight_offset: float,
    SCALE_IN_FP32: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_COLS)
    col_mask = cols < num_cols
    KEEP_SCALE: tl.constexpr = BLOCK_COLS < 16384  # in wider rows it would push others out of the registers
    if weight_ptr is not None and KEEP_SCALE:
        scale = _load_scale(weight_ptr, weight_offset, cols, num_cols, SCALE_IN_FP32)
    if dw_partial_ptr is not None:
        dw = tl.zeros((TILE_ROWS, BLOCK_COLS), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=NUM_STAGES):
        first_row = tl.cast(tile, tl.int64) * TILE_ROWS
        rows = first_row + tl.arange(0, TILE_ROWS)
        mask = (rows < num_rows)[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = load_per_row(rstd_ptr, first_row, num_rows, TILE_ROWS)
        normed = x * rstd
        if dw_partial_ptr is not None:
            dw += dy * normed
        if dx_ptr is not None:
            if weight_ptr is not None:
                if not KEEP_SCALE:
                    scale = _load_scale(weight_ptr, weight_offset, cols, num_cols, SCALE_IN_FP32)
                dy *= scale
            dx = rstd * (dy - normed * (tl.sum(dy * normed, axis=1, keep_dims=True) / num_cols))
            if dtotal_ptr is not None:
                dtotal_offsets = rows[:, None] * dtotal_row_stride + cols[None, :]
                dx += tl.load(dtotal_ptr + dtotal_offsets, mask=mask, other=0.0).to(tl.float32)
            dx_offsets = rows[:, None] * num_cols + cols[None, :]
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dw_partial_ptr is not None:
        row = tl.program_id(0).to(tl.int64)
        dw_sum = tl.sum(dw, axis=0).to(dw_partial_ptr.dtype.element_ty)
        tl.store(dw_partial_ptr + row * num_cols + cols, dw_sum, mask=col_mask)


_launch_fwd = launcher(_rms_norm_fwd_kernel)
_launch_bwd = launcher(_rms_norm_bwd_kernel)


def rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weight_offset: float, scale_in_fp32: bool,
    keep_rstd: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``(y, x + residual, rstd)`` for ``x`` and ``residual`` ``[..., num_cols]``; ``rstd`` is ``[num_rows]``.

    ``rstd`` is for backward: where none will follow, ``keep_rstd=False`` saves the host its allocation.
    """
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols
    y = dense_like(x, out_dtype(x, weight, scale_in_fp32))
    rstd = x.new_empty(num_rows, dtype=torch.float32) if keep_rstd else None
    total, residual_stride = None, 0
    if residual is not None:
        total = dense_like(x)
        residual, residual_stride = row_layout(residual)
    if num_rows:
        x, x_stride = row_layout(x)
        tiling = row_tiling(num_rows, num_cols, sm_count(x))
        _launch_fwd(
            (tiling.num_programs, 1, 1),
            tiling.options,
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            y_ptr=y,
            total_ptr=total,
            rstd_ptr=rstd,
            x_row_stride=x_stride,
            residual_row_stride=residual_stride,
            num_rows=num_rows,
            num_cols=num_cols,
            eps=eps,
            weight_offset=weight_offset,
            SCALE_IN_FP32=scale_in_fp32,
            TILE_ROWS=tiling.tile_rows,
            BLOCK_COLS=tiling.block_cols,
        )
    return y, total, rstd


def rms_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, weight_offset: float,
    scale_in_fp32: bool, needs_dx: bool, needs_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``(dx, dweight)``, each None unless needed; ``dtotal``, the gradient of ``x`` itself, is added to dx."""
    num_cols, num_rows = x.shape[-1], rstd.shape[0]
    dx = dense_like(x) if needs_dx else None
    if num_rows == 0:
        return dx, torch.zeros_like(weight) if needs_dw else None
    x, x_stride = row_layout(x)
    dy, dy_stride = row_layout(dy)
    streamed, dtotal_stride = dy.element_size() + x.element_size(), 0
    if dtotal is not None:
        dtotal, dtotal_stride = row_layout(dtotal)
        streamed += dtotal.element_size()
    summed = needs_dw and sums_in_backward(num_cols)
    if summed:
        tiling = persistent_tiling(num_rows, num_cols, sm_count(x), streamed)
        partials = new_partials(x, 1, tiling.num_programs, weight.dtype)
    else:
        tiling = row_tiling(num_rows, num_cols, sm_count(x))
        partials = column_partials(dy, dy_stride, x, x_stride, None, rstd, True, False) if needs_dw else None
    if summed or needs_dx:
        _launch_bwd(
            (tiling.num_programs, 1, 1),
            tiling.options,
            dy_ptr=dy,
            dtotal_ptr=dtotal,
            x_ptr=x,
            weight_ptr=weight,
            rstd_ptr=rstd,
            dx_ptr=dx,
            dw_partial_ptr=partials if summed else None,
            dy_row_stride=dy_stride,
            dtotal_row_stride=dtotal_stride,
            x_row_stride=x_stride,
            num_rows=num_rows,
            num_cols=num_cols,
            num_tiles=tiling.num_tiles,
            weight_offset=weight_offset,
            SCALE_IN_FP32=scale_in_fp32,
            TILE_ROWS=tiling.tile_rows,
            BLOCK_COLS=tiling.block_cols,
            NUM_STAGES=tiling.num_stages,
        )
    return dx, sum_partials(partials, weight.dtype)[0] if needs_dw else None


class RMSNormFunction(Function):
    """``rms_norm`` on ``x`` of any shape; all arguments are positional."""

    @staticmethod
    def forward(ctx, x, weight, eps, weight_offset, scale_in_fp32):
        """Save x, the weight and rstd."""
        keep_rstd = any(ctx.needs_input_grad)
        y, _, rstd = rms_norm_fwd(x, None, weight, eps, weight_offset, scale_in_fp32, keep_rstd)
        ctx.save_for_backward(x, weight, rstd)
        ctx.settings = (weight_offset, scale_in_fp32)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Compute only the gradients that are needed."""
        x, weight, rstd = ctx.saved_tensors
        dx, dw = rms_norm_bwd(dy, None, x, weight, rstd, *ctx.settings, *ctx.needs_input_grad[:2])
        return dx, dw, None, None, None


def out_dtype(x: Tensor, weight: Tensor | None, scale_in_fp32: bool) -> torch.dtype:
    """The dtype of the normalised output: ``x``'s, or the promoted one where the weight multiplies in its own dtype."""
    if weight is None or scale_in_fp32 or weight.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(weight.dtype, x.dtype)


def _fwd(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    y, _, rstd = rms_norm_fwd(x, None, weight, eps, weight_offset, scale_in_fp32)
    return y, rstd


def _fake_fwd(x, weight, eps, weight_offset, scale_in_fp32):
    y = x.new_empty(x.shape, dtype=out_dtype(x, weight, scale_in_fp32))
    return y, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, weight_offset: float,
    scale_in_fp32: bool, needs_dx: bool, needs_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dw = rms_norm_bwd(dy, dtotal, x, weight, rstd, weight_offset, scale_in_fp32, needs_dx, needs_dw)
    return or_empty(dx, x), or_empty(dw, x)


def _fake_bwd(dy, dtotal, x, weight, rstd, weight_offset, scale_in_fp32, needs_dx, needs_dw):
    return x.new_empty(x.shape if needs_dx else 0), weight.new_empty(weight.shape) if needs_dw else x.new_empty(0)


def _save(ctx, inputs, output):
    x, weight, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy, _):
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    dx, dw = rms_norm_bwd_op(dy, None, *ctx.saved_tensors, *ctx.settings, needs_dx, needs_dw)
    return dx if needs_dx else None, dw if needs_dw else None, None, None, None


rms_norm_bwd_op = opaque_op("rms_norm_bwd", _bwd, _fake_bwd)
_rms_norm_op = opaque_op("rms_norm", _fwd, _fake_fwd, _differentiate, _save)


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
    if not use_triton(x) or out_dtype(x, weight, scale_in_fp32) == torch.float64:
        return reference.rms_norm(x, weight, eps, weight_offset=weight_offset, scale_in_fp32=scale_in_fp32)
    check_width(x)
    weight = None if weight is None else weight.contiguous()
    if torch.compiler.is_compiling():
        return _rms_norm_op(x, weight, float(eps), float(weight_offset), scale_in_fp32)[0]
    return RMSNormFunction.apply(x, weight, eps, weight_offset, scale_in_fp32)
