"""Products with a matrix that has few rows: the parts of a low-rank adapter.

For ``x`` ``[N, H]``, ``u`` ``[N, r]`` and ``w`` ``[r, H]`` with a small r:

- ``narrow``: ``scale * x w^T``, and ``tall``: ``scale * u^T x``, by cuBLAS, which has kernels for them: in a step of a
  3B model on an H200, 7.5 and 9.2 ms at most, where Triton kernels of ours took 10.5 and 12.1
  (benchmarks/results/lora-step-h200.log);
- ``update``: ``y + scale * u w``, by a kernel of ours that reads and writes y once. ``w`` may have any strides and any
  dtype: it is cast inside. The kernel runs for fp16 and bf16; elsewhere torch's GEMM computes the same.

Sums are fp32.
"""

import torch
from torch import Tensor

from ..runtime.launch import INTERPRET, cdiv, launcher, next_power_of_2, tl, triton, use_triton

MAX_RANK = 256  # of the kernels; a wider w is an ordinary GEMM
SIXTEEN_BITS, INTERPRETED = (torch.bfloat16, torch.float16), (torch.float32,)
MIN_RANK = 16  # of tensor cores: narrower operands are padded


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
    offsets = ranks[:, None] * w_row_stride + cols[None, :].to(tl.int64) * w_col_stride
    w = tl.load(w_ptr + offsets, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)
    added = tl.dot(u, w.to(u.dtype), input_precision="ieee") * scale
    tl.store(out_ptr + rows[:, None] * out_row_stride + cols[None, :], y.to(tl.float32) + added, mask=mask)


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
        w: ``[r, H]``, in ``x``'s dtype.
        scale: multiplies the product.
        out: ``[N, r]`` to write to.

    Returns:
        ``out``, or a new tensor in ``x``'s dtype.
    """
    out = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    return torch.addmm(out, x, w.t(), beta=0, alpha=scale, out=out)


def tall(u: Tensor, x: Tensor, scale: float, transposed: bool = False) -> Tensor:
    """``scale * u^T x``: ``[r, H]``, or its transpose; ``u`` is ``[N, r]``, and ``x`` ``[N, H]`` in ``u``'s dtype."""
    first, second = (x, u) if transposed else (u, x)
    out = x.new_empty(first.shape[1], second.shape[1])
    return torch.addmm(out, first.t(), second, beta=0, alpha=scale, out=out)


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
