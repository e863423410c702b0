"""Shared code of the normalisation kernels: tile shapes, per-row loads, and the sum of partial gradients.

A tile is ``[TILE_ROWS, BLOCK_COLS]`` with ``BLOCK_COLS >= num_cols``: a row stays in registers, and narrow rows share a
program. A persistent grid sums the weight gradients: each program adds up its tiles in registers and writes one fp32
row of partial sums. A second kernel adds these rows in a fixed order, so two runs are bit-equal. If a single program
processes all rows, it writes the gradient directly. Rows wider than ``MAX_SUMMED_COLS`` leave no registers for these
sums; for them a separate kernel reads x and dy again, by columns.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.launch import cdiv, launcher, next_power_of_2, register_limit, sm_count, tl, triton

MAX_COLS = 65536  # 64 elements per thread with 32 warps; wider rows do not fit in the registers
TILE_SIZE = 4096  # elements per tile of narrow rows
SMEM_BYTES = 160 * 1024  # per SM, for prefetched rows; the rest of its 228 KiB stays L1 cache
MAX_SUMMED_COLS = 16384  # 16 elements per thread of a row, and as many fp32 sums, fit in the registers
# Triton specialises on whether a width is a multiple of 16. If it is not, rows may start at unaligned addresses: Triton
# then emits narrow accesses and does not prefetch. More warps hide the latency.
ALIGNED = 16
COLUMN_TILE = (8, 512)  # rows and columns per step of the kernel that sums by columns


def sums_in_backward(num_cols: int) -> bool:
    """Whether the kernel that computes dx also sums the gradients of weight and bias."""
    return num_cols <= MAX_SUMMED_COLS


class Tiling(NamedTuple):
    """Tile shape and launch of one norm kernel; ``options`` are Triton's launch options."""

    tile_rows: int
    block_cols: int
    num_tiles: int
    num_programs: int
    num_stages: int
    options: tuple[tuple[str, int], ...]


def _tile(num_rows: int, num_cols: int, programs: int) -> tuple[int, int]:
    """Rows and columns of a tile: ``TILE_SIZE`` elements, or fewer rows if that would leave programs idle."""
    block_cols = next_power_of_2(num_cols)
    tile_rows = max(1, min(TILE_SIZE // block_cols, next_power_of_2(cdiv(num_rows, programs))))
    return tile_rows, block_cols


@lru_cache(maxsize=4096)
def row_tiling(num_rows: int, num_cols: int, sms: int) -> Tiling:
    """One tile per program, for kernels on ``[num_rows, num_cols]`` that write per row only."""
    tile_rows, block_cols = _tile(num_rows, num_cols, 4 * sms)
    num_tiles = cdiv(num_rows, tile_rows)
    num_warps = min(max(tile_rows * block_cols // (512 if num_cols % ALIGNED else 1024), 4), 32)
    return Tiling(tile_rows, block_cols, num_tiles, num_tiles, 1, (("num_warps", num_warps),))


@lru_cache(maxsize=4096)
def persistent_tiling(num_rows: int, num_cols: int, sms: int, bytes_per_element: int) -> Tiling:
    """As many programs as run at once, each looping over tiles and prefetching ``bytes_per_element`` of its inputs.

    One program more than fits would run alone at the end. The register limit guarantees that all of them fit.
    """
    block_cols = next_power_of_2(num_cols)
    # The fastest on an H100 (benchmarks/NOTES.md): two programs per SM for tiles of several rows, one for wider rows.
    per_sm, elements_per_thread, max_stages = (2, 16, 3) if block_cols < TILE_SIZE else (1, 16, 3)
    if block_cols == TILE_SIZE:
        elements_per_thread, max_stages = 32, 4
    elif block_cols >= MAX_SUMMED_COLS:  # no registers are left for prefetching
        max_stages = 1
    if num_cols % ALIGNED and block_cols >= TILE_SIZE:
        elements_per_thread = 8
    programs = per_sm * sms
    tile_rows, block_cols = _tile(num_rows, num_cols, programs)
    num_tiles = cdiv(num_rows, tile_rows)
    num_warps = min(max(tile_rows * block_cols // (32 * elements_per_thread), 4), 32)
    # Triton allocates one buffer fewer than there are stages.
    stages = min(1 + SMEM_BYTES // (per_sm * tile_rows * block_cols * bytes_per_element), max_stages)
    options = (("num_warps", num_warps), *register_limit(min(65536 // (32 * num_warps * per_sm), 255)))
    return Tiling(tile_rows, block_cols, num_tiles, min(programs, num_tiles), stages, options)


def check_width(x: Tensor) -> None:
    """Raise ``ValueError`` for rows that are too wide to stay in registers."""
    if x.shape[-1] > MAX_COLS:
        raise ValueError(f"x: got last dimension {x.shape[-1]}; must be at most {MAX_COLS} for the Triton kernels")


@triton.jit
def load_per_row(ptr, first_row, num_rows, TILE_ROWS: tl.constexpr):
    """One number per row of a tile: a scalar if the tile is one row, otherwise ``[TILE_ROWS, 1]``."""
    if TILE_ROWS == 1:
        # Load a scalar: to prefetch a one-element tensor, the loop would need another buffer in shared memory.
        values = tl.load(ptr + first_row)
    else:
        rows = first_row + tl.arange(0, TILE_ROWS)
        values = tl.load(ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
    return values


@triton.jit
def _column_partials_kernel(
    dy_ptr,  # [num_rows, num_cols]
    x_ptr,  # [num_rows, num_cols]
    mean_ptr,  # [num_rows] fp32, or None
    rstd_ptr,  # [num_rows] fp32
    dw_partial_ptr,  # [num_programs(1), num_cols] fp32, or None
    db_partial_ptr,  # [num_programs(1), num_cols] fp32, or None
    dy_row_stride,
    x_row_stride,
    num_rows,
    num_cols,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = cols < num_cols
    dw = tl.zeros((TILE_ROWS, BLOCK_COLS), dtype=tl.float32)
    db = tl.zeros((TILE_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in tl.range(tl.program_id(1) * TILE_ROWS, num_rows, tl.num_programs(1) * TILE_ROWS, num_stages=3):
        rows = tl.cast(start, tl.int64) + tl.arange(0, TILE_ROWS)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & col_mask[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if dw_partial_ptr is not None:
            x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            if mean_ptr is not None:
                x -= tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
            dw += dy * (x * tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None])
        if db_partial_ptr is not None:
            db += dy
    partial_offsets = tl.program_id(1).to(tl.int64) * num_cols + cols
    if dw_partial_ptr is not None:
        tl.store(dw_partial_ptr + partial_offsets, tl.sum(dw, axis=0), mask=col_mask)
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + partial_offsets, tl.sum(db, axis=0), mask=col_mask)


_launch_column_partials = launcher(_column_partials_kernel)


def column_partials(
    dy: Tensor, dy_stride: int, x: Tensor, x_stride: int, stats: Tensor, needs_dw: bool, needs_db: bool
) -> Tensor:
    """fp32 partials ``[needs_dw + needs_db, programs, num_cols]`` of dweight ``dy * (x - mean) * rstd`` and dbias.

    ``stats`` is rstd ``[1, num_rows]``, or rstd and mean ``[2, num_rows]``.
    """
    num_rows, num_cols = stats.shape[1], x.shape[-1]
    tile_rows, block_cols = COLUMN_TILE
    col_blocks = cdiv(num_cols, block_cols)
    splits = max(1, min(cdiv(num_rows, tile_rows), 8 * sm_count(x) // col_blocks))
    partials = x.new_empty(needs_dw + needs_db, splits, num_cols, dtype=torch.float32)
    _launch_column_partials(
        (col_blocks, splits, 1),
        (("num_warps", 8),),
        dy_ptr=dy,
        x_ptr=x,
        mean_ptr=stats[1] if len(stats) == 2 else None,
        rstd_ptr=stats[0],
        dw_partial_ptr=partials[0] if needs_dw else None,
        db_partial_ptr=partials[-1] if needs_db else None,
        dy_row_stride=dy_stride,
        x_row_stride=x_stride,
        num_rows=num_rows,
        num_cols=num_cols,
        TILE_ROWS=tile_rows,
        BLOCK_COLS=block_cols,
    )
    return partials


def new_partials(x: Tensor, stack: int, programs: int, dtype: torch.dtype) -> Tensor:
    """Memory for the partial sums of a persistent grid, ``[stack, programs, num_cols]``.

    It is fp32, or ``dtype`` if a single program computes the whole gradient.
    """
    return x.new_empty(stack, programs, x.shape[-1], dtype=torch.float32 if programs > 1 else dtype)


SUM_TILE = 4096  # numbers that a program of the kernel below adds at a time; its rows have 32 at least


@triton.jit
def _sum_partials_kernel(
    partial_ptr,  # [stack, num_partials, num_cols] fp32
    out_ptr,  # [stack, num_cols]
    num_partials,
    num_cols,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    layer = tl.program_id(1).to(tl.int64)
    col_mask = cols < num_cols
    total = tl.zeros((BLOCK_PARTIALS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, num_partials, BLOCK_PARTIALS):
        rows = start + tl.arange(0, BLOCK_PARTIALS)
        offsets = (layer * num_partials + rows)[:, None] * num_cols + cols[None, :]
        total += tl.load(partial_ptr + offsets, mask=(rows < num_partials)[:, None] & col_mask[None, :], other=0.0)
    tl.store(out_ptr + layer * num_cols + cols, tl.sum(total, axis=0), mask=col_mask)


_launch_sum_partials = launcher(_sum_partials_kernel)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of ``partials`` ``[stack, num_partials, num_cols]`` over ``num_partials``, rounded once to ``dtype``."""
    stack, num_partials, num_cols = partials.shape
    if num_partials == 1:
        return partials[:, 0].to(dtype)
    out = partials.new_empty(stack, num_cols, dtype=dtype)
    block_partials = min(next_power_of_2(num_partials), SUM_TILE // 32)
    block_cols = SUM_TILE // block_partials
    _launch_sum_partials(
        (cdiv(num_cols, block_cols), stack, 1),
        (("num_warps", 8),),
        partial_ptr=partials,
        out_ptr=out,
        num_partials=num_partials,
        num_cols=num_cols,
        BLOCK_PARTIALS=block_partials,
        BLOCK_COLS=block_cols,
    )
    return out
