"""LayerNorm (arXiv 1607.06450): ``y = n * weight + bias``, ``n = (x - mean) * rstd``, ``rstd = 1 / sqrt(var + eps)``.

Backward, with ``g = dy * weight``: ``dx = rstd * (g - mean(g) - n * mean(g * n))``, ``dweight = sum over rows of
dy * n`` and ``dbias = sum over rows of dy``.
Saved: x, mean and rstd (fp32, two numbers a row). Moved: x and y forward; x, dy and dx backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .inputs import as_rows, check_rows, check_vector
from .launch import on_device, tl, triton, use_triton
from .norm_tiles import check_width, load_per_row, persistent_tiling, row_tiling, sum_partials


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [num_rows, num_cols]
    weight_ptr,  # [num_cols]
    bias_ptr,  # [num_cols]
    y_ptr,  # [num_rows, num_cols], contiguous
    mean_ptr,  # [num_rows] fp32
    rstd_ptr,  # [num_rows] fp32
    x_row_stride,
    num_rows,
    num_cols,
    eps,
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
        y *= weight.to(tl.float32)[None, :]
    if HAS_BIAS:
        y += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * num_cols + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows[:, None], mean, mask=row_mask)
    tl.store(rstd_ptr + rows[:, None], rstd, mask=row_mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # [num_rows, num_cols]
    x_ptr,  # [num_rows, num_cols]
    weight_ptr,  # [num_cols]
    mean_ptr,  # [num_rows] fp32
    rstd_ptr,  # [num_rows] fp32
    dx_ptr,  # [num_rows, num_cols], contiguous
    dw_partial_ptr,  # [num_programs, num_cols] fp32
    db_partial_ptr,  # [num_programs, num_cols] fp32
    dy_row_stride,
    x_row_stride,
    num_rows,
    num_cols,
    num_tiles,
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
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
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
        mean = load_per_row(mean_ptr, first_row, num_rows, TILE_ROWS)
        rstd = load_per_row(rstd_ptr, first_row, num_rows, TILE_ROWS)
        normed = (x - mean) * rstd  # not zero beyond num_cols, but dy is, and every use below multiplies by it
        if NEEDS_DW:
            dw += dy * normed
        if NEEDS_DB:
            db += dy
        if NEEDS_DX:
            if HAS_WEIGHT:
                dy *= weight
            mean_g = tl.sum(dy, axis=1, keep_dims=True) / num_cols
            mean_gn = tl.sum(dy * normed, axis=1, keep_dims=True) / num_cols
            dx = rstd * (dy - mean_g - normed * mean_gn)
            dx_offsets = rows[:, None] * num_cols + cols[None, :]
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial_offsets = tl.program_id(0).to(tl.int64) * num_cols + cols
    if NEEDS_DW:
        tl.store(dw_partial_ptr + partial_offsets, tl.sum(dw, axis=0), mask=col_mask)
    if NEEDS_DB:
        tl.store(db_partial_ptr + partial_offsets, tl.sum(db, axis=0), mask=col_mask)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(y, mean, rstd)`` for ``x`` ``[..., num_cols]``: y of ``dtype``, the others ``[num_rows]``."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    x = as_rows(x)
    num_rows, num_cols = x.shape
    mean, rstd = torch.empty(2, num_rows, dtype=torch.float32, device=x.device).unbind()
    if num_rows == 0:
        return y, mean, rstd
    tiling = row_tiling(x)
    with on_device(x):
        _layer_norm_fwd_kernel[(tiling.num_programs,)](
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            x_row_stride=x.stride(0),
            num_rows=num_rows,
            num_cols=num_cols,
            eps=float(eps),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            TILE_ROWS=tiling.tile_rows,
            BLOCK_COLS=tiling.block_cols,
            **tiling.options,
        )
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype, mean: Tensor, rstd: Tensor,
    needs_dx: bool, needs_dw: bool, needs_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``(dx, dweight, dbias)``, each None unless asked for."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else None
    x, dy = as_rows(x), as_rows(dy)
    num_rows, num_cols = x.shape
    wanted = needs_dw + needs_db
    if num_rows == 0:
        dw = torch.zeros(num_cols, dtype=weight.dtype, device=x.device) if needs_dw else None
        db = torch.zeros(num_cols, dtype=bias_dtype, device=x.device) if needs_db else None
        return dx, dw, db
    tiling = persistent_tiling(x, dy.element_size() + x.element_size()) if wanted else row_tiling(x)
    with on_device(x):
        partials = torch.empty(wanted, tiling.num_programs, num_cols, dtype=torch.float32, device=x.device)
        _layer_norm_bwd_kernel[(tiling.num_programs,)](
            dy_ptr=dy,
            x_ptr=x,
            weight_ptr=weight,
            mean_ptr=mean,
            rstd_ptr=rstd,
            dx_ptr=dx,
            dw_partial_ptr=partials[0] if needs_dw else None,
            db_partial_ptr=partials[-1] if needs_db else None,
            dy_row_stride=dy.stride(0),
            x_row_stride=x.stride(0),
            num_rows=num_rows,
            num_cols=num_cols,
            num_tiles=tiling.num_tiles,
            HAS_WEIGHT=weight is not None,
            NEEDS_DX=needs_dx,
            NEEDS_DW=needs_dw,
            NEEDS_DB=needs_db,
            TILE_ROWS=tiling.tile_rows,
            BLOCK_COLS=tiling.block_cols,
            NUM_STAGES=tiling.num_stages,
            **tiling.options,
        )
        if needs_dw and needs_db and weight.dtype != bias_dtype:
            return dx, sum_partials(partials[:1], weight.dtype)[0], sum_partials(partials[1:], bias_dtype)[0]
        sums = sum_partials(partials, weight.dtype if needs_dw else bias_dtype) if wanted else None
    return dx, sums[0] if needs_dw else None, sums[-1] if needs_db else None


class LayerNormFunction(torch.autograd.Function):
    """``layer_norm`` on ``x`` of any shape, with the output's dtype; all arguments are positional."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        """Save x, the weight, mean and rstd."""
        y, mean, rstd = layer_norm_fwd(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Compute only the gradients that are needed."""
        x, weight, mean, rstd = ctx.saved_tensors
        return *layer_norm_bwd(dy, x, weight, ctx.bias_dtype, mean, rstd, *ctx.needs_input_grad[:3]), None, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, statistics in fp32, rounded once.

    Args:
        x: ``[..., N]``, fp16, bf16, fp32 or fp64; any strides.
        weight: ``[N]`` of any of these dtypes, or None.
        bias: ``[N]`` of any of these dtypes, or None.
        eps: added to the variance.

    Returns:
        ``[..., N]`` in ``x.dtype``; in fp32 under CUDA autocast, as torch's own layer_norm gives it.
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
        return reference.layer_norm(x, weight, bias, eps)
    check_width(x)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    # Autocast would widen x and keep the wide copy for backward; the kernel reads x as it is and writes fp32.
    dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
    return LayerNormFunction.apply(x, weight, bias, eps, dtype)
