"""Kernels on slabs of the vocabulary: statistics of a row carried from slab to slab, and dlogits of one slab.

A slab is ``logits[:, start : start + num_cols]`` of all rows. Per row the statistics are a maximum and sums relative to
it, merged slab by slab as the lanes of one row are in softmax_rows.py, and the first argmax. dlogits have the form
``(p_v * (a + b * log p_v) - c * [v = label] - d) * z'(x)`` with four numbers a row, which covers every op here;
a row of zeros is a row without a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.launch import Launcher, next_power_of_2, tl, triton
from .options import LogitTransform
from .softmax_rows import _transform, _write_dlogits

NUM_SUMS = 6  # maximum, sum e^(z-m), z[label], sum z, sum (z-m) e^(z-m), sum e^(2(z-m))
MAX_LANES = 2048  # of 8 warps: a 16-byte load of bf16 a thread


@triton.jit
def _fold(z, in_row, cols, m, s, total, w, q, first, STATS: tl.constexpr):
    d = z - m
    e = tl.exp(-tl.abs(d))
    above = d > 0
    first = tl.where(above, cols, first)
    if STATS:
        w = tl.where(above, (w - d * s) * e, w + d * e)
        q = tl.where(above, q * e * e + 1.0, q + e * e)
    total += tl.where(in_row, z, 0.0)
    s = tl.where(above, s * e + 1.0, s + e)
    return tl.maximum(m, z), s, total, w, q, first


@triton.jit
def _slab_stats_kernel(
    logits_ptr, labels_ptr, sums_ptr, argmax_ptr, logits_row_stride, sums_row_stride, num_cols, col_start, inner, outer,
    FIRST: tl.constexpr, STATS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * logits_row_stride
    sums_ptr += row
    label = tl.load(labels_ptr + row).to(tl.int64) - col_start
    in_slab = (label >= 0) & (label < num_cols)
    target = _transform(tl.load(x_ptr + label, mask=in_slab, other=0.0), inner, outer, HAS_SOFTCAP)
    tl.store(sums_ptr + 2 * sums_row_stride, target, mask=in_slab)

    lanes = tl.arange(0, BLOCK_COLS)
    m = tl.full([BLOCK_COLS], -1e30, tl.float32)  # finite, so that lanes without an element merge as 0 and not as NaN
    s = tl.zeros([BLOCK_COLS], tl.float32)
    total = tl.zeros([BLOCK_COLS], tl.float32)
    w = tl.zeros([BLOCK_COLS], tl.float32)
    q = tl.zeros([BLOCK_COLS], tl.float32)
    first = tl.full([BLOCK_COLS], 2147483647, tl.int32)
    full = num_cols // BLOCK_COLS * BLOCK_COLS
    for start in range(0, full, BLOCK_COLS):
        cols = start + lanes
        z = _transform(tl.load(x_ptr + cols), inner, outer, HAS_SOFTCAP)
        m, s, total, w, q, first = _fold(z, True, cols, m, s, total, w, q, first, STATS)
    if full < num_cols:
        cols = full + lanes
        mask = cols < num_cols
        z = _transform(tl.load(x_ptr + cols, mask=mask, other=0.0), inner, outer, HAS_SOFTCAP)
        z = tl.where(mask, z, -1e30)
        m, s, total, w, q, first = _fold(z, mask, cols, m, s, total, w, q, first, STATS)

    row_max = tl.max(m, 0)
    shift = m - row_max
    factor = tl.exp(shift)
    row_w = tl.sum((w + shift * s) * factor, 0)
    row_q = tl.sum(q * factor * factor, 0)
    row_s = tl.sum(s * factor, 0)
    row_total = tl.sum(total, 0)
    argmax = tl.min(tl.where(m == row_max, first, 2147483647), 0) + col_start
    if not FIRST:
        old_max = tl.load(sums_ptr)
        old_s = tl.load(sums_ptr + sums_row_stride)
        argmax = tl.where(row_max > old_max, argmax, tl.load(argmax_ptr + row))
        new_max = tl.maximum(row_max, old_max)
        shift_new = row_max - new_max
        shift_old = old_max - new_max
        f_new = tl.exp(shift_new)
        f_old = tl.exp(shift_old)
        if STATS:
            old_w = tl.load(sums_ptr + 4 * sums_row_stride)
            old_q = tl.load(sums_ptr + 5 * sums_row_stride)
            row_w = (row_w + shift_new * row_s) * f_new + (old_w + shift_old * old_s) * f_old
            row_q = row_q * f_new * f_new + old_q * f_old * f_old
        row_s = row_s * f_new + old_s * f_old
        row_total += tl.load(sums_ptr + 3 * sums_row_stride)
        row_max = new_max
    tl.store(sums_ptr, row_max)
    tl.store(sums_ptr + sums_row_stride, row_s)
    tl.store(sums_ptr + 3 * sums_row_stride, row_total)
    if STATS:
        tl.store(sums_ptr + 4 * sums_row_stride, row_w)
        tl.store(sums_ptr + 5 * sums_row_stride, row_q)
    tl.store(argmax_ptr + row, argmax)


@triton.jit
def _slab_dlogits_kernel(
    logits_ptr, labels_ptr, lse_ptr, a_ptr, b_ptr, c_ptr, d_ptr, logits_row_stride, num_cols, col_start, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * logits_row_stride
    label = (tl.load(labels_ptr + row).to(tl.int64) - col_start).to(tl.int32)
    lse = tl.load(lse_ptr + row)
    a = tl.load(a_ptr + row)
    b = 0.0
    if HAS_B:
        b = tl.load(b_ptr + row)
    c = tl.load(c_ptr + row)
    d = tl.load(d_ptr + row)
    _write_dlogits(x_ptr, x_ptr, num_cols, label, lse, a, b, c, d, inner, outer, HAS_SOFTCAP, HAS_B, BLOCK_COLS)


_launch_stats = Launcher(_slab_stats_kernel)
_launch_dlogits = Launcher(_slab_dlogits_kernel)


class RowCoefficients(NamedTuple):
    """What dlogits of a row are made of, each fp32 ``[n]``; ``b`` is ``None`` where it is 0 everywhere."""

    a: Tensor
    b: Tensor | None
    c: Tensor
    d: Tensor


def loss_coefficients(
    row_grad: Tensor, lse: Tensor, label_smoothing: float, z_loss: float, vocab_size: int
) -> RowCoefficients:
    """For ``sum(row_grad * loss)``: see the gradient of the loss in softmax_rows.py."""
    smoothed = row_grad * (label_smoothing / vocab_size)
    return RowCoefficients(row_grad * (1.0 + 2.0 * z_loss * lse), None, row_grad * (1.0 - label_smoothing), smoothed)


def log_prob_coefficients(log_prob_grad: Tensor, entropy_grad: Tensor | None, entropy: Tensor) -> RowCoefficients:
    """For ``sum(log_prob_grad * log_prob) + sum(entropy_grad * entropy)``."""
    c, zeros = -log_prob_grad, torch.zeros_like(log_prob_grad)
    if entropy_grad is None:
        return RowCoefficients(c, None, c, zeros)
    return RowCoefficients(c - entropy_grad * entropy, -entropy_grad, c, zeros)


def _block(num_cols: int) -> tuple[int, tuple[tuple[str, int], ...]]:
    lanes = min(MAX_LANES, next_power_of_2(num_cols))
    return lanes, (("num_warps", max(1, min(8, lanes // 256))),)


def slab_stats_rows(
    logits: Tensor, labels: Tensor, sums: Tensor, argmax: Tensor, col_start: int, transform: LogitTransform, *,
    all_stats: bool,
) -> None:  # fmt: skip
    """Merge the slab ``logits`` ``[n, num_cols]`` that starts at column ``col_start`` into the rows' statistics.

    ``sums`` is fp32 ``[6, n]`` (the last two rows untouched unless ``all_stats``), ``argmax`` int32 ``[n]``; the slab
    with ``col_start`` 0 comes first and initialises them, ``sums[2]`` (the label's logit) apart.
    """
    num_rows, num_cols = logits.shape
    lanes, options = _block(num_cols)
    _launch_stats(
        (num_rows, 1, 1),
        (logits, labels, sums, argmax),
        (logits.stride(0), sums.stride(0), num_cols, col_start),
        (transform.inner, transform.outer),
        (col_start == 0, all_stats, transform.has_softcap, lanes),
        options,
    )


def slab_dlogits_rows(
    logits: Tensor, labels: Tensor, lse: Tensor, coefficients: RowCoefficients, col_start: int,
    transform: LogitTransform,
) -> None:  # fmt: skip
    """Turn the slab ``logits`` ``[n, num_cols]`` that starts at column ``col_start`` to its dlogits, in place."""
    num_rows, num_cols = logits.shape
    lanes, options = _block(num_cols)
    _launch_dlogits(
        (num_rows, 1, 1),
        (logits, labels, lse, *coefficients),
        (logits.stride(0), num_cols, col_start),
        (transform.inner, transform.outer),
        (transform.has_softcap, coefficients.b is not None, lanes),
        options,
    )
