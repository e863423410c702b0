"""What the normalisation kernels share: how rows are cut into tiles, per-row loads, and the sum of partial gradients.

A tile is ``[TILE_ROWS, BLOCK_COLS]`` with ``BLOCK_COLS >= num_cols``: a row never leaves the registers, and narrow
rows share a program. Weight gradients are summed by a persistent grid: each program adds up its tiles in registers and
writes one fp32 row of partials; a second kernel adds the rows in a fixed order, so two runs are bit-equal.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launcher, cdiv, next_power_of_2, register_limit, tl, triton

MAX_COLS = 65536  # 64 elements a thread with 32 warps; beyond that a row no longer fits the registers
TILE_SIZE = 4096  # elements of a tile of narrow rows
SMEM_BYTES = 160 * 1024  # of an SM's 228 KiB, for prefetched rows; the rest stays L1 cache
MAX_STAGES = 3


class Tiling(NamedTuple):
    """Tile shape and launch of one norm kernel; ``options`` are Triton's launch options."""

    tile_rows: int
    block_cols: int
    num_tiles: int
    num_programs: int
    num_stages: int
    options: tuple[tuple[str, int], ...]


def _tile(num_rows: int, num_cols: int, programs: int) -> tuple[int, int]:
    """Rows and columns of a tile: ``TILE_SIZE`` elements, or fewer rows where that would leave programs idle."""
    block_cols = next_power_of_2(num_cols)
    tile_rows = max(1, min(TILE_SIZE // block_cols, next_power_of_2(cdiv(num_rows, programs))))
    return tile_rows, block_cols


@lru_cache(maxsize=4096)
def row_tiling(num_rows: int, num_cols: int, sms: int) -> Tiling:
    """One tile a program, for kernels on ``[num_rows, num_cols]`` that write per row only."""
    tile_rows, block_cols = _tile(num_rows, num_cols, 4 * sms)
    num_tiles = cdiv(num_rows, tile_rows)
    num_warps = min(max(tile_rows * block_cols // 1024, 4), 32)
    return Tiling(tile_rows, block_cols, num_tiles, num_tiles, 1, (("num_warps", num_warps),))


@lru_cache(maxsize=4096)
def persistent_tiling(num_rows: int, num_cols: int, sms: int, bytes_per_element: int) -> Tiling:
    """As many programs as run at once, each looping over tiles and prefetching ``bytes_per_element`` of its inputs.

    A program more than fits would run alone at the end, hence the register limit that makes the count certain.
    """
    per_sm = max(1, 2 * TILE_SIZE // max(next_power_of_2(num_cols), TILE_SIZE))
    programs = per_sm * sms
    tile_rows, block_cols = _tile(num_rows, num_cols, programs)
    num_tiles = cdiv(num_rows, tile_rows)
    num_warps = min(max(tile_rows * block_cols // 512, 4), 32)
    # Triton keeps one buffer fewer than it has stages.
    stages = min(1 + SMEM_BYTES // (per_sm * tile_rows * block_cols * bytes_per_element), MAX_STAGES)
    options = (("num_warps", num_warps), *register_limit(min(65536 // (32 * num_warps * per_sm), 255)))
    return Tiling(tile_rows, block_cols, num_tiles, min(programs, num_tiles), stages, options)


def check_width(x: Tensor) -> None:
    """Raise ``ValueError`` for rows that are too wide to stay in registers."""
    if x.shape[-1] > MAX_COLS:
        raise ValueError(f"x: last dimension is {x.shape[-1]}; the Triton kernels allow at most {MAX_COLS}")


@triton.jit
def load_per_row(ptr, first_row, num_rows, TILE_ROWS: tl.constexpr):
    """One number for each row of a tile, as a scalar if the tile is one row and as ``[TILE_ROWS, 1]`` otherwise."""
    if TILE_ROWS == 1:
        # A scalar load: the loop's prefetching would give a one-element tensor a shared-memory buffer of its own.
        values = tl.load(ptr + first_row)
    else:
        rows = first_row + tl.arange(0, TILE_ROWS)
        values = tl.load(ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
    return values


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


_launch_sum_partials = Launcher(_sum_partials_kernel)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of fp32 ``partials`` ``[stack, num_partials, num_cols]`` over ``num_partials``, rounded once to ``dtype``."""
    stack, num_partials, num_cols = partials.shape
    out = partials.new_empty(stack, num_cols, dtype=dtype)
    _launch_sum_partials(
        (cdiv(num_cols, 32), stack, 1),
        (partials, out),
        (num_partials, num_cols),
        (),
        (128, 32),  # BLOCK_PARTIALS, BLOCK_COLS
        (("num_warps", 8),),
    )
    return out
