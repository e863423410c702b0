"""RMSNorm and LayerNorm, each with an optional residual: kernels, autograd node and operator.

With ``z = x``, or ``x + residual``, or in LayerNorm ``z - mean(z)``: ``n = z * rstd`` with
``rstd = 1 / sqrt(mean(z^2) + eps)``, and ``y = n * scale + bias`` with ``scale = weight_offset + weight``.
Backward, with ``g = dy * scale``: ``dx = rstd * (g - n * mean(g * n))``, in LayerNorm also ``- rstd * mean(g)``;
``dweight = sum over rows of dy * n`` and ``dbias = sum over rows of dy``. The residual's gradient is also dx.
Saved: x (or the sum with the residual), the weight, and the statistics (fp32, one or two numbers per row).
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..runtime.autograd import Function, differentiate
from ..runtime.checks import dense_like, row_layout
from ..runtime.launch import launcher, sm_count, tl, triton
from ..runtime.operators import opaque_op
from .norm_tiles import (
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
    if not SCALE_IN_FP32:  # modules that scale in the weight's dtype also round weight + offset to it
        scale = scale.to(weight.dtype).to(tl.float32)
    return scale[None, :]


@triton.jit
def _norm_fwd_kernel(
    x_ptr,  # [num_rows, num_cols]
    residual_ptr,  # [num_rows, num_cols], or None
    weight_ptr,  # [num_cols], or None
    bias_ptr,  # [num_cols], or None
    y_ptr,  # [num_rows, num_cols], contiguous
    total_ptr,  # [num_rows, num_cols], contiguous: x + residual; None without a residual
    stats_ptr,  # [1 or 2, num_rows] fp32: rstd, and the mean if CENTRED; or None
    x_row_stride,
    residual_row_stride,
    num_rows,
    num_cols,
    eps: float,
    weight_offset: float,
    CENTRED: tl.constexpr,
    SCALE_IN_FP32: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    row_mask = (rows < num_rows)[:, None]
    mask = row_mask & (cols < num_cols)[None, :]
    out_offsets = rows[:, None] * num_cols + cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    x_dtype = x.dtype
    if residual_ptr is not None:
        residual_offsets = rows[:, None] * residual_row_stride + cols[None, :]
        residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0)
        # Normalise the sum as the next layer reads it: rounded.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_dtype)
        tl.store(total_ptr + out_offsets, x, mask=mask)
    # Issue these loads before the reductions, so that their latency overlaps with loading x.
    if weight_ptr is not None:
        scale = _load_scale(weight_ptr, weight_offset, cols, num_cols, SCALE_IN_FP32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0)
    x = x.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1, keep_dims=True) / num_cols
        x = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / num_cols + eps)
    y = x * rstd
    if weight_ptr is not None:
        if not SCALE_IN_FP32:
            y = y.to(x_dtype).to(tl.float32)
        y *= scale
    if bias_ptr is not None:
        y += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + out_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        tl.store(stats_ptr + rows[:, None], rstd, mask=row_mask)
        if CENTRED:
            tl.store(stats_ptr + num_rows + rows[:, None], mean, mask=row_mask)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr,  # [num_rows, num_cols]
    dtotal_ptr,  # [num_rows, num_cols], or None: the gradient of x itself, added to dx
    x_ptr,  # [num_rows, num_cols]
    weight_ptr,  # [num_cols], or None
    stats_ptr,  # [1 or 2, num_rows] fp32: rstd, and the mean if CENTRED
    dx_ptr,  # [num_rows, num_cols], contiguous, or None
    dw_partial_ptr,  # [num_programs, num_cols], or None
    db_partial_ptr,  # [num_programs, num_cols], or None
    dy_row_stride,
    dtotal_row_stride,
    x_row_stride,
    num_rows,
    num_cols,
    num_tiles,
    weight_offset: float,
    CENTRED: tl.constexpr,
    SCALE_IN_FP32: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_COLS)
    col_mask = cols < num_cols
    KEEP_SCALE: tl.constexpr = BLOCK_COLS < 16384  # in wider rows the scale would not fit in the registers
    if weight_ptr is not None and KEEP_SCALE:
        scale = _load_scale(weight_ptr, weight_offset, cols, num_cols, SCALE_IN_FP32)
    if dw_partial_ptr is not None:
        dw = tl.zeros((TILE_ROWS, BLOCK_COLS), dtype=tl.float32)
    if db_partial_ptr is not None:
        db = tl.zeros((TILE_ROWS, BLOCK_COLS), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=NUM_STAGES):
        first_row = tl.cast(tile, tl.int64) * TILE_ROWS
        rows = first_row + tl.arange(0, TILE_ROWS)
        mask = (rows < num_rows)[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            x -= load_per_row(stats_ptr + num_rows, first_row, num_rows, TILE_ROWS)
        rstd = load_per_row(stats_ptr, first_row, num_rows, TILE_ROWS)
        normed = x * rstd  # not zero beyond num_cols if CENTRED, but dy is, and every use multiplies by it
        if dw_partial_ptr is not None:
            dw += dy * normed
        if db_partial_ptr is not None:
            db += dy
        if dx_ptr is not None:
            if weight_ptr is not None:
                if not KEEP_SCALE:
                    scale = _load_scale(weight_ptr, weight_offset, cols, num_cols, SCALE_IN_FP32)
                dy *= scale
            rest = dy
            if CENTRED:
                rest = dy - tl.sum(dy, axis=1, keep_dims=True) / num_cols
            dx = rstd * (rest - normed * (tl.sum(dy * normed, axis=1, keep_dims=True) / num_cols))
            if dtotal_ptr is not None:
                dtotal_offsets = rows[:, None] * dtotal_row_stride + cols[None, :]
                dx += tl.load(dtotal_ptr + dtotal_offsets, mask=mask, other=0.0).to(tl.float32)
            dx_offsets = rows[:, None] * num_cols + cols[None, :]
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial_offsets = tl.program_id(0).to(tl.int64) * num_cols + cols
    if dw_partial_ptr is not None:
        dw_sum = tl.sum(dw, axis=0).to(dw_partial_ptr.dtype.element_ty)
        tl.store(dw_partial_ptr + partial_offsets, dw_sum, mask=col_mask)
    if db_partial_ptr is not None:
        db_sum = tl.sum(db, axis=0).to(db_partial_ptr.dtype.element_ty)
        tl.store(db_partial_ptr + partial_offsets, db_sum, mask=col_mask)


_launch_fwd = launcher(_norm_fwd_kernel)
_launch_bwd = launcher(_norm_bwd_kernel)


def norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float,
    scale_in_fp32: bool, centred: bool, dtype: torch.dtype, keep_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``(y, x + residual, stats)`` for ``x`` and ``residual`` ``[..., num_cols]``; y is of ``dtype``.

    ``stats`` is fp32 ``[1, num_rows]``: rstd; or ``[2, num_rows]`` if ``centred``: rstd and mean. It is for backward:
    where none can follow, ``keep_stats=False`` saves the host its allocation, some 2 us.
    """
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols
    y = dense_like(x, dtype)
    stats = x.new_empty(2 if centred else 1, num_rows, dtype=torch.float32) if keep_stats else None
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
            bias_ptr=bias,
            y_ptr=y,
            total_ptr=total,
            stats_ptr=stats,
            x_row_stride=x_stride,
            residual_row_stride=residual_stride,
            num_rows=num_rows,
            num_cols=num_cols,
            eps=eps,
            weight_offset=weight_offset,
            CENTRED=centred,
            SCALE_IN_FP32=scale_in_fp32,
            TILE_ROWS=tiling.tile_rows,
            BLOCK_COLS=tiling.block_cols,
        )
    return y, total, stats


def norm_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, stats: Tensor,
    bias_dtype: torch.dtype | None, weight_offset: float, scale_in_fp32: bool, needs_dx: bool, needs_dw: bool,
    needs_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``(dx, dweight, dbias)``, each None unless needed; ``dtotal``, the gradient of ``x`` itself, is added."""
    num_cols, num_rows = x.shape[-1], stats.shape[1]
    dx = dense_like(x) if needs_dx else None
    dw_dtype = x.dtype if weight is None else weight.dtype
    db_dtype = bias_dtype or x.dtype
    if num_rows == 0:
        dw = x.new_zeros(num_cols, dtype=dw_dtype) if needs_dw else None
        db = x.new_zeros(num_cols, dtype=db_dtype) if needs_db else None
        return dx, dw, db
    x, x_stride = row_layout(x)
    dy, dy_stride = row_layout(dy)
    streamed, dtotal_stride = dy.element_size() + x.element_size(), 0
    if dtotal is not None:
        dtotal, dtotal_stride = row_layout(dtotal)
        streamed += dtotal.element_size()
    wanted, dtype = needs_dw + needs_db, dw_dtype if needs_dw else db_dtype
    apart = wanted == 2 and dw_dtype != db_dtype
    summed = wanted > 0 and sums_in_backward(wanted * num_cols)
    partials = dw_partials = db_partials = None
    if summed:
        tiling = persistent_tiling(num_rows, num_cols, sm_count(x), streamed)
        partials = new_partials(x, wanted, tiling.num_programs, torch.float32 if apart else dtype)
        dw_partials = partials if needs_dw else None  # the first of the stack
        db_partials = partials[-1] if needs_db else None
    else:
        tiling = row_tiling(num_rows, num_cols, sm_count(x))
        if wanted:
            partials = column_partials(dy, dy_stride, x, x_stride, stats, needs_dw, needs_db)
    if summed or needs_dx:
        _launch_bwd(
            (tiling.num_programs, 1, 1),
            tiling.options,
            dy_ptr=dy,
            dtotal_ptr=dtotal,
            x_ptr=x,
            weight_ptr=weight,
            stats_ptr=stats,
            dx_ptr=dx,
            dw_partial_ptr=dw_partials,
            db_partial_ptr=db_partials,
            dy_row_stride=dy_stride,
            dtotal_row_stride=dtotal_stride,
            x_row_stride=x_stride,
            num_rows=num_rows,
            num_cols=num_cols,
            num_tiles=tiling.num_tiles,
            weight_offset=weight_offset,
            CENTRED=stats.shape[0] == 2,
            SCALE_IN_FP32=scale_in_fp32,
            TILE_ROWS=tiling.tile_rows,
            BLOCK_COLS=tiling.block_cols,
            NUM_STAGES=tiling.num_stages,
        )
    if partials is None:
        return dx, None, None
    if apart:
        return dx, sum_partials(partials[:1], dw_dtype)[0], sum_partials(partials[1:], db_dtype)[0]
    sums = sum_partials(partials, dtype)
    return dx, sums[0] if needs_dw else None, sums[-1] if needs_db else None


class NormFunction(Function):
    """Norm of ``x``; or of ``x + residual``, and that sum. All arguments are positional."""

    @staticmethod
    def definition(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
        weight_offset: float, scale_in_fp32: bool, centred: bool, dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """The same in plain PyTorch."""
        total = x if residual is None else x + residual
        if centred:
            y = reference.layer_norm(total, weight, bias, eps, weight_offset=weight_offset, out_dtype=dtype)
        else:
            y = reference.rms_norm(total, weight, eps, weight_offset=weight_offset, scale_in_fp32=scale_in_fp32)
        return y if residual is None else (y, total)

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
        weight_offset: float, scale_in_fp32: bool, centred: bool, dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor | None]:  # fmt: skip
        """Save what is normalised, the weight and the statistics."""
        keep = any(ctx.needs_input_grad)
        y, total, stats = norm_fwd(x, residual, weight, bias, eps, weight_offset, scale_in_fp32, centred, dtype, keep)
        ctx.save_for_backward(x if residual is None else total, weight, stats)
        bias_dtype = None if bias is None else bias.dtype
        ctx.settings = (bias_dtype, weight_offset, scale_in_fp32, eps, centred, dtype)
        if residual is None:
            return y
        ctx.set_materialize_grads(False)
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.mark_non_differentiable(total)  # like x + residual itself when only the weight is trained
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Compute only the gradients that are needed; with a residual, either upstream gradient may be None."""
        x, weight, stats = ctx.saved_tensors
        bias_dtype, weight_offset, scale_in_fp32, eps, centred, dtype = ctx.settings
        needs_dx, needs_dresidual, needs_dw, needs_db = ctx.needs_input_grad[:4]
        dx, dw, db = dtotal, None, None
        if torch.is_grad_enabled():
            # Any bias will do: its gradient does not depend on its values.
            bias = x.new_zeros(x.shape[-1], dtype=bias_dtype, requires_grad=True) if needs_db else None
            args = (x, None, weight, bias, eps, weight_offset, scale_in_fp32, centred, dtype)
            dx, _, dw, db, *_ = differentiate(NormFunction.definition, args, (dy,))
            dx = dtotal if dx is None else dx if dtotal is None else dx + dtotal
        elif dy is not None:
            dx, dw, db = norm_bwd(
                dy, dtotal, x, weight, stats, bias_dtype, weight_offset, scale_in_fp32, needs_dx or needs_dresidual,
                needs_dw, needs_db,
            )  # fmt: skip
        # One tensor for both: autograd adds into a gradient in place only where it holds the sole reference.
        return (dx if needs_dx else None, dx if needs_dresidual else None, dw, db, *(None,) * 5)


def _fake_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float,
    scale_in_fp32: bool, centred: bool, dtype: torch.dtype, keep_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    total = None if residual is None else x.new_empty(x.shape)
    stats = x.new_empty(2 if centred else 1, x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), total, stats


def _fake_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, stats: Tensor,
    bias_dtype: torch.dtype | None, weight_offset: float, scale_in_fp32: bool, needs_dx: bool, needs_dw: bool,
    needs_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return (
        x.new_empty(x.shape) if needs_dx else None,
        weight.new_empty(weight.shape) if needs_dw and weight is not None else None,
        x.new_empty(x.shape[-1], dtype=bias_dtype) if needs_db else None,
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, _, weight_offset, scale_in_fp32, *_ = inputs
    _, total, stats = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, stats)
    ctx.settings = (None if bias is None else bias.dtype, weight_offset, scale_in_fp32)
    ctx.mark_non_differentiable(*((stats,) if ctx.has_residual else (total, stats)))


def _differentiate(ctx: Any, dy: Tensor, dtotal: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    needs_dx, needs_dresidual, *needs = ctx.needs_input_grad[:4]
    upstream = (dy, dtotal if ctx.has_residual else None)
    dx, dw, db = _norm_bwd_op(*upstream, *ctx.saved_tensors, *ctx.settings, needs_dx or needs_dresidual, *needs)
    return dx, dx, dw, db


_norm_bwd_op = opaque_op("norm_bwd", norm_bwd, _fake_bwd)
_norm_op = opaque_op("norm", norm_fwd, _fake_fwd, _differentiate, _save)


def apply_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float,
    scale_in_fp32: bool, centred: bool, dtype: torch.dtype,
) -> Any:  # fmt: skip
    """The norm of ``x``, a tensor of dtype ``dtype``; or of ``x + residual``, and that sum. For checked arguments."""
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    if torch.compiler.is_compiling():
        settings = (float(eps), float(weight_offset), scale_in_fp32, centred, dtype, True)
        y, total, _ = _norm_op(x, residual, weight, bias, *settings)
        return y if residual is None else (y, total)
    return NormFunction.apply(x, residual, weight, bias, eps, weight_offset, scale_in_fp32, centred, dtype)
