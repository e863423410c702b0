"""LayerNorm (arXiv 1607.06450): ``y = n * weight + bias``, ``n = (x - mean) * rstd``, ``rstd = 1 / sqrt(var + eps)``.

An offset may be added to ``weight``.
Backward, with ``g = dy * weight``: ``dx = rstd * (g - mean(g) - n * mean(g * n))``,
``dweight = sum over rows of dy * n`` and ``dbias = sum over rows of dy``.
Saved: x, mean and rstd (fp32, two numbers a row). Moved: x and y forward; x, dy and dx backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .runtime.autograd import Function
from .runtime.checks import check_rows, check_vector, dense_like, row_layout
from .runtime.launch import Launcher, sm_count, tl, triton, use_triton
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
def _layer_norm_fwd_kernel(
    x_ptr,  # [num_rows, num_cols]
    weight_ptr,  # [num_cols]
    bias_ptr,  # [num_cols]
    y_ptr,  # [num_rows, num_cols], contiguous
    stats_ptr,  # [2, num_rows] fp32: mean and rstd; or None
    x_row_stride,
    num_rows,
    num_cols,
    eps,
    weight_offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    row_mask = (rows < num_rows)[:, None]
    mask = row_mask & (cols < num_cols)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    if HAS_WEIGHT:  # before the reductions, so that its latency hides behind that of x
        weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0)
    x = x.to(tl.float32)
    mean = tl.sum(x, axis=1, keep_dims=True) / num_cols
    centred = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / num_cols + eps)
    y = centred * rstd
    if HAS_WEIGHT:
        y *= weight.to(tl.float32)[None, :] + weight_offset
    if HAS_BIAS:
        y += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * num_cols + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        tl.store(stats_ptr + rows[:, None], mean, mask=row_mask)
        tl.store(stats_ptr + num_rows + rows[:, None], rstd, mask=row_mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # [num_rows, num_cols]
    x_ptr,  # [num_rows, num_cols]
    weight_ptr,  # [num_cols]
    stats_ptr,  # [2, num_rows] fp32: mean and rstd
    dx_ptr,  # [num_rows, num_cols], contiguous
    dw_partial_ptr,  # [num_programs, num_cols]
    db_partial_ptr,  # [num_programs, num_cols]
    dy_row_stride,
    x_row_stride,
    num_rows,
    num_cols,
    num_tiles,
    weight_offset,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_COLS)
    col_mask = cols < num_cols
    KEEP_WEIGHT: tl.constexpr = BLOCK_COLS < 16384  # in wider rows it would push others out of the registers
    if HAS_WEIGHT and KEEP_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :] + weight_offset
    if NEEDS_DW:
        dw = tl.zeros((TILE_ROWS, BLOCK_COLS), dtype=tl.float32)
    if NEEDS_DB:
        db = tl.zeros((TILE_ROWS, BLOCK_COLS), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=NUM_STAGES):
        first_row = tl.cast(tile, tl.int64) * TILE_ROWS
        rows = first_row + tl.arange(0, TILE_ROWS)
        mask = (rows < num_rows)[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = load_per_row(stats_ptr, first_row, num_rows, TILE_ROWS)
        rstd = load_per_row(stats_ptr + num_rows, first_row, num_rows, TILE_ROWS)
        normed = (x - mean) * rstd  # not zero beyond num_cols, but dy is, and every use below multiplies by it
        if NEEDS_DW:
            dw += dy * normed
        if NEEDS_DB:
            db += dy
        if NEEDS_DX:
            if HAS_WEIGHT:
                if not KEEP_WEIGHT:
                    weight = (
                        tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :] + weight_offset
                    )
                dy *= weight
            mean_g = tl.sum(dy, axis=1, keep_dims=True) / num_cols
            mean_gn = tl.sum(dy * normed, axis=1, keep_dims=True) / num_cols
            dx = rstd * (dy - mean_g - normed * mean_gn)
            dx_offsets = rows[:, None] * num_cols + cols[None, :]
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial_offsets = tl.program_id(0).to(tl.int64) * num_cols + cols
    if NEEDS_DW:
        dw_sum = tl.sum(dw, axis=0).to(dw_partial_ptr.dtype.element_ty)
        tl.store(dw_partial_ptr + partial_offsets, dw_sum, mask=col_mask)
    if NEEDS_DB:
        db_sum = tl.sum(db, axis=0).to(db_partial_ptr.dtype.element_ty)
        tl.store(db_partial_ptr + partial_offsets, db_sum, mask=col_mask)


_launch_fwd = Launcher(_layer_norm_fwd_kernel)
_launch_bwd = Launcher(_layer_norm_bwd_kernel)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, dtype: torch.dtype,
    keep_stats: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return ``(y, stats)`` for ``x`` ``[..., num_cols]``: y of ``dtype``, mean and rstd as fp32 ``[2, num_rows]``.

    The statistics are for backward: where none will follow, ``keep_stats=False`` saves the host their allocation.
    """
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols
    y = dense_like(x, dtype)
    # One allocation: each costs the host some 2 us.
    stats = x.new_empty(2, num_rows, dtype=torch.float32) if keep_stats else None
    if num_rows:
        x, x_stride = row_layout(x)
        tiling = row_tiling(num_rows, num_cols, sm_count(x))
        _launch_fwd(
            (tiling.num_programs, 1, 1),
            (x, weight, bias, y, stats),
            (x_stride, num_rows, num_cols),
            (eps, weight_offset),
            (weight is not None, bias is not None, tiling.tile_rows, tiling.block_cols),
            tiling.options,
        )
    return y, stats


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None, stats: Tensor, weight_offset: float,
    needs_dx: bool, needs_dw: bool, needs_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``(dx, dweight, dbias)``, each None unless asked for."""
    num_cols, num_rows = x.shape[-1], stats.shape[1]
    dx = dense_like(x) if needs_dx else None
    if num_rows == 0:
        dw = x.new_zeros(num_cols, dtype=weight.dtype) if needs_dw else None
        db = x.new_zeros(num_cols, dtype=bias_dtype) if needs_db else None
        return dx, dw, db
    x, x_stride = row_layout(x)
    dy, dy_stride = row_layout(dy)
    wanted, partials = needs_dw + needs_db, None
    dtype = weight.dtype if needs_dw else bias_dtype
    apart = wanted == 2 and dtype != bias_dtype
    summed = wanted > 0 and sums_in_backward(wanted * num_cols)
    if summed:
        tiling = persistent_tiling(num_rows, num_cols, sm_count(x), dy.element_size() + x.element_size())
        partials = new_partials(x, wanted, tiling.num_programs, torch.float32 if apart else dtype)
    else:
        tiling = row_tiling(num_rows, num_cols, sm_count(x))
        if wanted:
            partials = column_partials(dy, dy_stride, x, x_stride, *stats, needs_dw, needs_db)
    if summed or needs_dx:
        _launch_bwd(
            (tiling.num_programs, 1, 1),
            (
                dy, x, weight, stats, dx,
                partials[0] if summed and needs_dw else None, partials[-1] if summed and needs_db else None,
            ),
            (dy_stride, x_stride, num_rows, num_cols, tiling.num_tiles),
            (weight_offset,),
            (
                weight is not None, needs_dx, summed and needs_dw, summed and needs_db,
                tiling.tile_rows, tiling.block_cols, tiling.num_stages,
            ),
            tiling.options,
        )  # fmt: skip
    if apart:
        return dx, sum_partials(partials[:1], dtype)[0], sum_partials(partials[1:], bias_dtype)[0]
    sums = sum_partials(partials, dtype) if wanted else None
    return dx, sums[0] if needs_dw else None, sums[-1] if needs_db else None


class LayerNormFunction(Function):
    """``layer_norm`` on ``x`` of any shape, with the output's dtype; all arguments are positional."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, weight_offset, dtype):
        """Save x, the weight, mean and rstd."""
        y, stats = layer_norm_fwd(x, weight, bias, eps, weight_offset, dtype, any(ctx.needs_input_grad))
        ctx.save_for_backward(x, weight, stats)
        ctx.bias_dtype, ctx.weight_offset = None if bias is None else bias.dtype, weight_offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Compute only the gradients that are needed."""
        x, weight, stats = ctx.saved_tensors
        grads = layer_norm_bwd(dy, x, weight, ctx.bias_dtype, stats, ctx.weight_offset, *ctx.needs_input_grad[:3])
        return *grads, None, None, None


def _fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return layer_norm_fwd(x, weight, bias, eps, weight_offset, dtype)


def _fake_fwd(x, weight, bias, eps, weight_offset, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


def _bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None, stats: Tensor, weight_offset: float,
    needs_dx: bool, needs_dw: bool, needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dw, db = layer_norm_bwd(dy, x, weight, bias_dtype, stats, weight_offset, needs_dx, needs_dw, needs_db)
    # dweight and dbias can be rows of one tensor; what an operator returns must not share memory.
    return or_empty(dx, x), or_empty(dw, x), or_empty(db, x) if dw is None or db is None else db.clone()


def _fake_bwd(dy, x, weight, bias_dtype, stats, weight_offset, needs_dx, needs_dw, needs_db):
    return (
        x.new_empty(x.shape if needs_dx else 0),
        weight.new_empty(weight.shape) if needs_dw else x.new_empty(0),
        x.new_empty(x.shape[-1], dtype=bias_dtype) if needs_db else x.new_empty(0),
    )


def _save(ctx, inputs, output):
    x, weight, bias, _, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy, _):
    x, weight, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _layer_norm_bwd_op(dy, x, weight, ctx.bias_dtype, stats, ctx.weight_offset, *needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None


_layer_norm_bwd_op = opaque_op("layer_norm_bwd", _bwd, _fake_bwd)
_layer_norm_op = opaque_op("layer_norm", _fwd, _fake_fwd, _differentiate, _save)


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
        out_dtype: floating-point dtype of the result; by default that of torch's own layer_norm: ``x.dtype``, or fp32
            under CUDA autocast.

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
    if not use_triton(x) or x.dtype == torch.float64:
        return reference.layer_norm(x, weight, bias, eps, weight_offset=weight_offset, out_dtype=out_dtype)
    check_width(x)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    # Autocast would widen x and keep the wide copy for backward; the kernel reads x as it is and writes fp32.
    autocast = out_dtype is None and x.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.float32 if autocast else out_dtype or x.dtype
    if torch.compiler.is_compiling():
        return _layer_norm_op(x, weight, bias, float(eps), float(weight_offset), dtype)[0]
    return LayerNormFunction.apply(x, weight, bias, eps, weight_offset, dtype)
