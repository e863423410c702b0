"""Operations on rows of logits: loss and statistics of whole rows or vocabulary chunks, and their gradient in place.

The formulas are in row_kernels.py. ``loss_rows`` reads whole rows; ``ChunkStats`` gives the same numbers for rows that
arrive one vocabulary chunk after another; ``dlogits_rows`` serves both. Where kernels do not run, plain_rows.py does.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.launch import next_power_of_2, sm_count
from .options import ALL_STATS, NO_STATS, NUM_STATS, LogitTransform
from .plain_rows import add_chunk_stats, dlogits, row_blocks, runs_kernels
from .row_kernels import launch_chunk_stats, launch_dlogits, launch_loss_rows

NUM_SUMS = 6  # maximum m, sum e^(z-m), z[label], sum z, sum (z-m) e^(z-m), sum e^(2(z-m))
ELEMENTS_PER_THREAD = 8  # a 16-byte load of bf16; whole rows have two loads in flight at a time
# The fewer programs share an SM, the more warps each needs to keep loads in flight.
STREAM_WARPS = 8  # several programs per SM: rows that are read once
# Where a second pass follows, the rows being worked on should still be in the 50 MB L2 cache of an H100: two programs
# per SM (264 rows of 128 KiB are 35 MB), or one where rows are larger.
PAIR_WARPS, ALONE_WARPS, PAIR_ROW_BYTES = 16, 32, 128 * 1024
ALL_STATS_WARPS = 16  # five statistics' accumulators do not fit in the 64 registers that 32 warps leave


class RowCoefficients(NamedTuple):
    """The four numbers per row that make up dlogits, each ``[n]``; ``b`` is ``None`` where it is 0 everywhere."""

    a: Tensor
    b: Tensor | None
    c: Tensor
    d: Tensor

    def select(self, span: slice | Tensor) -> "RowCoefficients":
        """The coefficients of the rows in ``span``."""
        b = None if self.b is None else self.b[span]
        return RowCoefficients(self.a[span], b, self.c[span], self.d[span])


def row_coefficients(
    row_grad: Tensor, lse: Tensor, vocab_size: int, label_smoothing: float, z_loss: float,
    entropy_grad: Tensor | None = None, entropy: Tensor | None = None,
) -> RowCoefficients:  # fmt: skip
    """Coefficients of ``sum(row_grad * loss) + sum(entropy_grad * entropy)``; zeros for rows without a gradient."""
    a = row_grad * (1.0 + 2.0 * z_loss * lse)
    b, c = None, row_grad * (1.0 - label_smoothing)
    if entropy_grad is not None and entropy is not None:
        a, b = a - entropy_grad * entropy, -entropy_grad
    return RowCoefficients(a, b, c, row_grad * (label_smoothing / vocab_size))


def token_loss(lse: Tensor, stats: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """The loss of each row ``[n]`` from its statistics ``[5, n]``."""
    return z_loss * lse.square() - (1.0 - label_smoothing) * stats[0] + label_smoothing * (lse - stats[4])


@lru_cache(maxsize=1024)
def row_block(num_cols: int, max_warps: int, min_warps: int = 4) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Lanes and launch options for rows of ``num_cols``: 16 bytes of bf16 per thread, no more lanes than columns."""
    lanes = min(max_warps * 32 * ELEMENTS_PER_THREAD, next_power_of_2(num_cols))
    return lanes, (("num_warps", min(max_warps, max(min_warps, lanes // (32 * ELEMENTS_PER_THREAD)))),)


def row_warps(logits: Tensor, two_passes: bool) -> int:
    """The most warps that a program for one row of ``logits`` should have."""
    num_rows, num_cols = logits.shape
    if num_rows <= sm_count(logits):
        return ALONE_WARPS
    if not two_passes:
        return STREAM_WARPS
    return PAIR_WARPS if num_cols * logits.element_size() <= PAIR_ROW_BYTES else ALONE_WARPS


def loss_rows(
    logits: Tensor, labels: Tensor, loss: Tensor, lse: Tensor | None, transform: LogitTransform, *, ignore_index: int,
    label_smoothing: float = 0.0, z_loss: float = 0.0, token_weights: Tensor | None = None, stats: Tensor | None = None,
    level: int = NO_STATS, grad_scale: float | None = None, num_items: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute losses and statistics of whole rows, and with ``grad_scale`` overwrite the logits with their gradient.

    Args:
        logits: ``[n, V]``.
        labels: ``[n]``; a row whose label is ``ignore_index`` is not read, and its logits are left alone.
        loss: written, ``[n]`` in fp32, or fp64 for fp64 logits.
        lse: written unless ``None``, as ``loss``.
        transform: from ``logits`` to z.
        ignore_index, label_smoothing, z_loss: as in ``cross_entropy``.
        token_weights: ``[n]``, multiplied into loss and gradient.
        stats: ``[5, n]`` like ``loss``, of which ``LABEL_STATS`` writes the first three rows, and ``ALL_STATS`` all.
        level: ``NO_STATS``, ``LABEL_STATS`` or ``ALL_STATS``.
        grad_scale: write the gradient of ``loss * grad_scale / num_items``.
        num_items: one element, or ``None`` for 1.
    """
    num_rows, num_cols = logits.shape
    write_grad = grad_scale is not None
    if not runs_kernels(logits):
        factors = (label_smoothing, z_loss, token_weights, grad_scale, num_items)
        _plain_loss_rows(logits, labels, loss, lse, stats, transform, ignore_index, level, *factors)
        return
    warps = row_warps(logits, two_passes=write_grad)
    lanes, launch_options = row_block(num_cols, min(warps, ALL_STATS_WARPS) if level == ALL_STATS else warps)
    launch_loss_rows(
        (num_rows, 1, 1),
        launch_options,
        logits_ptr=logits,
        labels_ptr=labels,
        weights_ptr=token_weights,
        num_items_ptr=num_items,
        loss_ptr=loss,
        lse_ptr=lse,
        stats_ptr=stats,
        logits_row_stride=logits.stride(0),
        stats_row_stride=0 if stats is None else stats.stride(0),
        num_cols=num_cols,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        inner=transform.inner,
        outer=transform.outer,
        grad_scale=grad_scale if write_grad else 1.0,
        HAS_SOFTCAP=transform.has_softcap,
        HAS_SMOOTHING=label_smoothing != 0,
        STATS=level,
        WRITE_GRAD=write_grad,
        BLOCK_COLS=lanes,
    )


def _plain_loss_rows(
    logits: Tensor, labels: Tensor, loss: Tensor, lse: Tensor | None, stats: Tensor | None, transform: LogitTransform,
    ignore_index: int, level: int, label_smoothing: float, z_loss: float, token_weights: Tensor | None,
    grad_scale: float | None, num_items: Tensor | None,
) -> None:  # fmt: skip
    num_cols = logits.shape[1]
    loss.zero_()
    if lse is not None:
        lse.zero_()
    for block in row_blocks(num_cols, labels, ignore_index):
        x, x_labels = logits[block], labels[block]
        sums = ChunkStats(x_labels, transform, level > NO_STATS, loss.dtype)
        add_chunk_stats(x, x_labels, sums.sums, sums.argmax, 0, transform, sums.all_stats)
        x_lse, x_stats = sums.finish(num_cols)
        weights = torch.ones_like(x_lse) if token_weights is None else token_weights[block].to(loss.dtype)
        loss[block] = token_loss(x_lse, x_stats, label_smoothing, z_loss) * weights
        if lse is not None:
            lse[block] = x_lse
        if stats is not None:
            stats[:, block] = x_stats
        if grad_scale is not None:
            row_grad = weights * grad_scale if num_items is None else weights * grad_scale / num_items
            coefficients = row_coefficients(row_grad, x_lse, num_cols, label_smoothing, z_loss)
            logits[block] = dlogits(x, x_labels, x_lse, *coefficients, transform).to(logits.dtype)


def dlogits_rows(
    logits: Tensor, labels: Tensor, lse: Tensor, coefficients: RowCoefficients, transform: LogitTransform,
    first_col: int = 0,
) -> None:  # fmt: skip
    """Overwrite ``logits`` ``[n, num_cols]``, which start at column ``first_col`` of the rows, with their gradient."""
    num_rows, num_cols = logits.shape
    if not runs_kernels(logits):
        for block in row_blocks(num_cols, labels):
            of_rows = coefficients.select(block)
            grad = dlogits(logits[block], labels[block], lse[block], *of_rows, transform, first_col)
            logits[block] = grad.to(logits.dtype)
        return
    lanes, launch_options = row_block(num_cols, STREAM_WARPS, min_warps=1)
    launch_dlogits(
        (num_rows, 1, 1),
        launch_options,
        logits_ptr=logits,
        labels_ptr=labels,
        lse_ptr=lse,
        a_ptr=coefficients.a,
        b_ptr=coefficients.b,
        c_ptr=coefficients.c,
        d_ptr=coefficients.d,
        logits_row_stride=logits.stride(0),
        num_cols=num_cols,
        first_col=first_col,
        inner=transform.inner,
        outer=transform.outer,
        HAS_SOFTCAP=transform.has_softcap,
        BLOCK_COLS=lanes,
    )


class ChunkStats:
    """Statistics of ``n`` rows of logits that arrive one vocabulary chunk after another."""

    def __init__(self, labels: Tensor, transform: LogitTransform, all_stats: bool, dtype: torch.dtype) -> None:
        self.labels, self.transform, self.all_stats = labels, transform, all_stats
        self.sums = torch.zeros((NUM_SUMS, labels.shape[0]), dtype=dtype, device=labels.device)
        self.argmax = torch.empty(labels.shape[0], dtype=torch.int32, device=labels.device)

    def add(self, logits: Tensor, first_col: int) -> None:
        """Merge ``logits`` ``[n, num_cols]``, which start at column ``first_col``; the chunk with column 0 is first."""
        num_rows, num_cols = logits.shape
        if not runs_kernels(logits):
            for block in row_blocks(num_cols, self.labels):
                sums, argmax = self.sums[:, block], self.argmax[block]
                add_chunk_stats(
                    logits[block], self.labels[block], sums, argmax, first_col, self.transform, self.all_stats
                )
            return
        lanes, launch_options = row_block(num_cols, STREAM_WARPS, min_warps=1)
        launch_chunk_stats(
            (num_rows, 1, 1),
            launch_options,
            logits_ptr=logits,
            labels_ptr=self.labels,
            sums_ptr=self.sums,
            argmax_ptr=self.argmax,
            logits_row_stride=logits.stride(0),
            sums_row_stride=self.sums.stride(0),
            num_cols=num_cols,
            first_col=first_col,
            inner=self.transform.inner,
            outer=self.transform.outer,
            FIRST=first_col == 0,
            STATS=self.all_stats,
            HAS_SOFTCAP=self.transform.has_softcap,
            BLOCK_COLS=lanes,
        )

    def finish(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """``(lse [n], stats [5, n])``; entropy and ``log(sum p^2)`` are zeros unless ``all_stats``."""
        peak, total, target, sum_z, sum_w, sum_q = self.sums
        log_sum = total.log()
        stats = torch.zeros((NUM_STATS, total.shape[0]), dtype=total.dtype, device=total.device)
        stats[0] = target - peak - log_sum
        stats[2] = self.argmax == self.labels
        stats[4] = sum_z / vocab_size
        if self.all_stats:
            stats[1] = log_sum - sum_w / total
            stats[3] = sum_q.log() - 2.0 * log_sum
        return peak + log_sum, stats


def empty_rows(num_rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised ``[num_rows]``."""
    return torch.empty(num_rows, dtype=dtype, device=device)
