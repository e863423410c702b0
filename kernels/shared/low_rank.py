"""Products with a matrix that has few rows, at the speed of memory: the parts of a low-rank adapter.

For ``x`` ``[N, H]``, ``u`` ``[N, r]`` and ``w`` ``[r, H]`` with a small r:

- ``narrow``: ``u = scale * x w^T`` reads x once;
- ``tall``: ``dw = scale * u^T x`` reads x once. Programs sum parts of the rows; another kernel adds these sums in a
  fixed order;
- ``update``: ``y + scale * u w`` reads and writes y once.

``w`` may have any strides and any dtype: it is cast to x's inside. Sums are fp32. They run for fp16 and bf16, where
tensor cores are as fast as memory; elsewhere torch's own GEMMs compute the same.
"""

import torch
from torch import Tensor

from ..runtime.launch import INTERPRET, cdiv, launcher, next_power_of_2, sm_count, tl, triton, use_triton
from .norm_tiles import sum_partials

MAX_RANK = 256  # of the kernels; a wider w is an ordinary GEMM
SIXTEEN_BITS, INTERPRETED = (torch.bfloat16, torch.float16), (torch.float32,)
MIN_RANK = 16  # of tensor cores: narrower operands are padded


@triton.jit
def _load_w(w_ptr, w_row_stride, w_col_stride, ranks, cols, rank, num_cols):
    """The tile ``[RANK, BLOCK_COLS]`` of w."""
    offsets = ranks[:, None] * w_row_stride + cols[None, :].to(tl.int64) * w_col_stride
    return tl.load(w_ptr + offsets, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit
def _narrow_kernel(
    x_ptr,  # [num_rows, num_cols]
    w_ptr,  # [rank, num_cols]
    out_ptr,  # [num_rows, rank]
    x_row_stride,
    w_row_stride,
    w_col_stride,
    out_row_stride,
    num_rows,
    num_cols,
    rank,
    scale: float,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    ranks = tl.arange(0, RANK)
    row_mask = (rows < num_rows)[:, None]
    total = tl.zeros((TILE_ROWS, RANK), dtype=tl.float32)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        x = tl.load(
            x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=row_mask & (cols < num_cols)[None, :], other=0.0
        )
        w = _load_w(w_ptr, w_row_stride, w_col_stride, ranks, cols, rank, num_cols).to(x.dtype)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    out = out_ptr + rows[:, None] * out_row_stride + ranks[None, :]
    tl.store(out, total * scale, mask=row_mask & (ranks < rank)[None, :])


@triton.jit
def _tall_kernel(
    u_ptr,  # [num_rows, rank]
    x_ptr,  # [num_rows, num_cols]
    partial_ptr,  # [programs, ...]: the entries of [rank, num_cols], in the order of the two strides
    u_row_stride,
    x_row_stride,
    partial_rank_stride,
    partial_col_stride,
    num_rows,
    num_cols,
    rank,
    rows_per_program,
    scale: float,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    ranks = tl.arange(0, RANK)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    col_mask, rank_mask = (cols < num_cols)[None, :], (ranks < rank)[None, :]
    total = tl.zeros((RANK, BLOCK_COLS), dtype=tl.float32)
    for start in range(first, last, TILE_ROWS):
        rows = start + tl.arange(0, TILE_ROWS)
        row_mask, rows = (rows < last)[:, None], rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows * x_row_stride + cols[None, :], mask=row_mask & col_mask, other=0.0)
        u = tl.load(u_ptr + rows * u_row_stride + ranks[None, :], mask=row_mask & rank_mask, other=0.0)
        total = tl.dot(tl.trans(u), x, total, input_precision="ieee")
    offsets = ranks[:, None] * partial_rank_stride + cols[None, :].to(tl.int64) * partial_col_stride
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * num_cols * rank + offsets
    tl.store(partial, total * scale, mask=tl.trans(rank_mask) & col_mask)


@triton.jit
def _update_kernel(
    y_ptr,  # [num_rows, num_cols]
    u_ptr,  # [num_rows, rank]
    w_ptr,  # [rank, num_cols]
    out_ptr,  # [num_rows, num_cols], which may be y
    y_row_stride,
    u_row_stride,
    w_row_stride,
    w_col_stride,
    out_row_stride,
    num_rows,
    num_cols,
    col_blocks,
    rank,
    scale: float,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    rows = (program // col_blocks) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = ((program % col_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int32)
    ranks = tl.arange(0, RANK)
    row_mask = (rows < num_rows)[:, None]
    mask = row_mask & (cols < num_cols)[None, :]
    y = tl.load(y_ptr + rows[:, None] * y_row_stride + cols[None, :], mask=mask, other=0.0)
    u = tl.load(
        u_ptr + rows[:, None] * u_row_stride + ranks[None, :], mask=row_mask & (ranks < rank)[None, :], other=0.0
    )
    w = _load_w(w_ptr, w_row_stride, w_col_stride, ranks, cols, rank, num_cols).to(u.dtype)
    added = tl.dot(u, w, input_precision="ieee") * scale
    tl.store(out_ptr + rows[:, None] * out_row_stride + cols[None, :], y.to(tl.float32) + added, mask=mask)


_launch_narrow = launcher(_narrow_kernel)
_launch_tall = launcher(_tall_kernel)
_launch_update = launcher(_update_kernel)


def _takes(rank: int, *tensors: Tensor) -> bool:
    """Whether the kernels compute it: 16-bit numbers on a GPU, or the interpreter's fp32."""
    x = tensors[0]
    if x.dtype not in (INTERPRETED if INTERPRET else SIXTEEN_BITS) or not 0 < rank <= MAX_RANK or x.numel() == 0:
        return False
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            return False
    return use_triton(*tensors)


def narrow(x: Tensor, w: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """``scale * x w^T``.

    Args:
        x: ``[N, H]``.
        w: ``[r, H]``, any floating dtype.
        scale: multiplies the product.
        out: ``[N, r]`` to write to.

    Returns:
        ``out``, or a new tensor in ``x``'s dtype.
    """
    rank = w.shape[0]
    out = x.new_empty(x.shape[0], rank) if out is None else out
    if not _takes(rank, x, out):
        return torch.addmm(out, x, w.to(x.dtype).t(), beta=0, alpha=scale, out=out)
    padded = max(MIN_RANK, next_power_of_2(rank))
    tile = 32
    _launch_narrow(
        (cdiv(x.shape[0], tile), 1, 1),
        (("num_warps", 4), ("num_stages", 4)),
        x_ptr=x, w_ptr=w, out_ptr=out, x_row_stride=x.stride(0), w_row_stride=w.stride(0), w_col_stride=w.stride(1),
        out_row_stride=out.stride(0), num_rows=x.shape[0], num_cols=x.shape[1], rank=rank, scale=scale,
        TILE_ROWS=tile, BLOCK_COLS=128, RANK=padded,
    )  # fmt: skip
    return out


def tall(u: Tensor, x: Tensor, scale: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """``scale * u^T x`` in ``dtype``: ``[r, H]``, or its transpose; ``u`` is ``[N, r]`` and ``x`` ``[N, H]``."""
    rank, num_cols, num_rows = u.shape[1], x.shape[1], x.shape[0]
    shape = (num_cols, rank) if transposed else (rank, num_cols)
    if not _takes(rank, x, u):
        first, second = (x, u) if transposed else (u, x)
        out = x.new_empty(shape)
        return torch.addmm(out, first.t(), second, beta=0, alpha=scale, out=out).to(dtype)
    padded = max(MIN_RANK, next_power_of_2(rank))
    block, tile = 128, 64
    blocks = cdiv(num_cols, block)
    programs = max(1, min(cdiv(num_rows, tile), 2 * sm_count(x) // blocks))
    per_program = cdiv(cdiv(num_rows, programs), tile) * tile
    programs = cdiv(num_rows, per_program)
    partials = x.new_empty(1, programs, rank * num_cols, dtype=torch.float32)
    _launch_tall(
        (blocks, programs, 1),
        (("num_warps", 4), ("num_stages", 4)),
        u_ptr=u, x_ptr=x, partial_ptr=partials, u_row_stride=u.stride(0), x_row_stride=x.stride(0),
        partial_rank_stride=1 if transposed else num_cols, partial_col_stride=rank if transposed else 1,
        num_rows=num_rows, num_cols=num_cols, rank=rank, rows_per_program=per_program, scale=scale,
        TILE_ROWS=tile, BLOCK_COLS=block, RANK=padded,
    )  # fmt: skip
    return sum_partials(partials, dtype).view(shape)


def update(y: Tensor, u: Tensor, w: Tensor, scale: float, out: Tensor) -> None:
    """Write ``y + scale * u w`` to ``out``, which may be ``y`` ``[N, H]``; ``u`` is ``[N, r]`` and ``w`` ``[r, H]``."""
    rank = w.shape[0]
    if not _takes(rank, y, u, out):
        torch.addmm(y, u, w.to(u.dtype), alpha=scale, out=out)
        return
    padded = max(MIN_RANK, next_power_of_2(rank))
    tile, block = 64, 128
    col_blocks = cdiv(y.shape[1], block)
    _launch_update(
        (cdiv(y.shape[0], tile) * col_blocks, 1, 1),
        (("num_warps", 4), ("num_stages", 1)),
        y_ptr=y, u_ptr=u, w_ptr=w, out_ptr=out, y_row_stride=y.stride(0), u_row_stride=u.stride(0),
        w_row_stride=w.stride(0), w_col_stride=w.stride(1), out_row_stride=out.stride(0), num_rows=y.shape[0],
        num_cols=y.shape[1], col_blocks=col_blocks, rank=rank, scale=scale, TILE_ROWS=tile, BLOCK_COLS=block,
        RANK=padded,
    )  # fmt: skip
