"""Kernels on rows of logits, shared by the loss ops: one read gives the loss and statistics, one more the gradient.

Shapes: logits [num_rows, num_cols], any row stride; labels, loss, lse [num_rows]; stats [5, num_rows].
With z = transform(x), p = softmax(z), t = z[label] and lse = logsumexp(z):
    loss        = (1 - eps) * (lse - t) + eps * (lse - mean(z)) + z_loss * lse^2
    stats       = log p[label]; entropy H = -sum(p log p); label is the first argmax; log(sum p^2); mean(z)
    d loss/dz_v = p_v * (1 + 2 z_loss lse) - (1 - eps) [v = label] - eps / num_cols
    d H/dz_v    = -p_v (log p_v + H);   d log p[label]/dz_v = [v = label] - p_v
Both kinds of gradient have the form p_v * (a + b * log p_v) - c * [v = label] - d with a, b, c, d constant in a row.

The softmax is online with one maximum and sum a lane and one exponential an element: lanes are merged once at
the end of the row, so the loop has no reduction in it and loads stay in flight. Full blocks are read without a mask:
a mask of odd width would undo the vectorised loads. Where loss and gradient come from one kernel, the second
pass runs from the end of the row to its start, over the part that the first left in the L2 cache.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..runtime.launch import Launcher, next_power_of_2, sm_count, tl, triton
from .options import LogitTransform

NUM_STATS = 5
ELEMENTS_PER_THREAD = 8  # a 16-byte load of bf16; two loads are in flight at a time
# The fewer programs share an SM, the more warps each needs to keep loads in flight.
STREAM_WARPS = 8  # several programs an SM: rows that are read once
# Where a second pass follows, the rows in work should still be in the 50 MB L2 cache of an H100: two programs an SM
# (264 rows of 128 KiB are 35 MB), or one where rows are larger.
PAIR_WARPS, ALONE_WARPS, PAIR_ROW_BYTES = 16, 32, 128 * 1024
ALL_STATS_WARPS = 16  # five statistics' accumulators do not fit in the 64 registers that 32 warps leave


@triton.jit
def _tanh(u):
    # 1 - 2 / (1 + exp(2u)) cancels near 0, where the Taylor series is exact to fp32
    a = tl.abs(u)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    a2 = a * a
    near = a * (1.0 + a2 * (-1.0 / 3.0 + a2 * (2.0 / 15.0 + a2 * (-17.0 / 315.0 + a2 * (62.0 / 2835.0)))))
    t = tl.where(a < 0.25, near, far)
    return tl.where(u < 0, -t, t)


@triton.jit
def _transform(x, inner, outer, HAS_SOFTCAP: tl.constexpr):
    z = x.to(tl.float32) * inner
    if HAS_SOFTCAP:
        z = _tanh(z) * outer
    return z


@triton.jit
def _fold(z, in_row, cols, label, target, m, s, w, q, total, beaten, NEED_SUM: tl.constexpr, STATS: tl.constexpr):
    # m: running maximum; s, w, q: sums of e^(z-m), (z-m) e^(z-m), e^(2(z-m)) relative to it
    d = z - m
    e = tl.exp(-tl.abs(d))
    above = d > 0
    if STATS > 0:
        w = tl.where(above, (w - d * s) * e, w + d * e)
        beaten = beaten | ((z > target) | ((z == target) & (cols < label))).to(tl.int32)
    if STATS > 1:
        q = tl.where(above, q * e * e + 1.0, q + e * e)
    if NEED_SUM:
        total += tl.where(in_row, z, 0.0)
    s = tl.where(above, s * e + 1.0, s + e)
    return tl.maximum(m, z), s, w, q, total, beaten


@triton.jit
def _dlogits(x, cols, label, lse, a, b, c, d, inner, outer, HAS_SOFTCAP: tl.constexpr, HAS_B: tl.constexpr):
    z = x.to(tl.float32) * inner
    slope = inner
    if HAS_SOFTCAP:
        t = _tanh(z)
        z = t * outer
        slope = inner * outer * (1.0 - t * t)
    log_p = z - lse
    p = tl.exp(log_p)
    g = (p * (a + b * log_p) if HAS_B else p * a) - d
    return tl.where(cols == label, g - c, g) * slope


@triton.jit
def _write_dlogits(
    x_ptr, dx_ptr, num_cols, label, lse, a, b, c, d, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK_COLS)
    steps = num_cols // (2 * BLOCK_COLS)
    for start in range(steps * 2 * BLOCK_COLS, num_cols, BLOCK_COLS):
        cols = start + lanes
        mask = cols < num_cols
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        g = _dlogits(x, cols, label, lse, a, b, c, d, inner, outer, HAS_SOFTCAP, HAS_B)
        tl.store(dx_ptr + cols, g.to(dx_ptr.dtype.element_ty), mask=mask)
    for step in range(0, steps):
        cols0 = (steps - 1 - step) * 2 * BLOCK_COLS + lanes
        cols1 = cols0 + BLOCK_COLS
        x0 = tl.load(x_ptr + cols0)
        x1 = tl.load(x_ptr + cols1)
        g0 = _dlogits(x0, cols0, label, lse, a, b, c, d, inner, outer, HAS_SOFTCAP, HAS_B)
        g1 = _dlogits(x1, cols1, label, lse, a, b, c, d, inner, outer, HAS_SOFTCAP, HAS_B)
        tl.store(dx_ptr + cols0, g0.to(dx_ptr.dtype.element_ty))
        tl.store(dx_ptr + cols1, g1.to(dx_ptr.dtype.element_ty))


@triton.jit
def _loss_rows_kernel(
    logits_ptr, labels_ptr, weights_ptr, num_items_ptr, loss_ptr, lse_ptr, stats_ptr,
    logits_row_stride, stats_row_stride, num_cols, ignore_index, label_smoothing, z_loss, inner, outer, grad_scale,
    HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_NUM_ITEMS: tl.constexpr,
    STATS: tl.constexpr, WRITE_GRAD: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, 0.0)
        return
    NEED_SUM: tl.constexpr = HAS_SMOOTHING or STATS > 1
    x_ptr = logits_ptr + row * logits_row_stride
    in_vocab = (label >= 0) & (label < num_cols)
    target = _transform(tl.load(x_ptr + label, mask=in_vocab, other=0.0), inner, outer, HAS_SOFTCAP)
    label = label.to(tl.int32)

    lanes = tl.arange(0, BLOCK_COLS)
    m = tl.full([BLOCK_COLS], -1e30, tl.float32)  # finite, so that lanes without an element merge as 0 and not as NaN
    s = tl.zeros([BLOCK_COLS], tl.float32)
    w = tl.zeros([BLOCK_COLS], tl.float32)
    q = tl.zeros([BLOCK_COLS], tl.float32)
    total = tl.zeros([BLOCK_COLS], tl.float32)
    beaten = tl.zeros([BLOCK_COLS], tl.int32)
    steps = num_cols // (2 * BLOCK_COLS)
    for step in range(0, steps):
        cols0 = step * 2 * BLOCK_COLS + lanes
        cols1 = cols0 + BLOCK_COLS
        x0 = tl.load(x_ptr + cols0)
        x1 = tl.load(x_ptr + cols1)
        z0 = _transform(x0, inner, outer, HAS_SOFTCAP)
        z1 = _transform(x1, inner, outer, HAS_SOFTCAP)
        m, s, w, q, total, beaten = _fold(z0, True, cols0, label, target, m, s, w, q, total, beaten, NEED_SUM, STATS)
        m, s, w, q, total, beaten = _fold(z1, True, cols1, label, target, m, s, w, q, total, beaten, NEED_SUM, STATS)
    for start in range(steps * 2 * BLOCK_COLS, num_cols, BLOCK_COLS):
        cols = start + lanes
        mask = cols < num_cols
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        z = tl.where(mask, _transform(x, inner, outer, HAS_SOFTCAP), -1e30)
        m, s, w, q, total, beaten = _fold(z, mask, cols, label, target, m, s, w, q, total, beaten, NEED_SUM, STATS)

    row_max = tl.max(m, 0)
    shift = m - row_max
    factor = tl.exp(shift)
    row_sum = tl.sum(s * factor, 0)
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    log_prob = (target - row_max) - log_sum
    mean = tl.sum(total, 0) / num_cols
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    loss = z_loss * lse * lse - (1.0 - label_smoothing) * log_prob
    if HAS_SMOOTHING:
        loss += label_smoothing * (lse - mean)
    tl.store(loss_ptr + row, loss * weight)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse)
    if STATS > 0:
        entropy = log_sum - tl.sum((w + shift * s) * factor, 0) / row_sum
        tl.store(stats_ptr + row, log_prob)
        tl.store(stats_ptr + stats_row_stride + row, entropy)
        tl.store(stats_ptr + 2 * stats_row_stride + row, (tl.max(beaten, 0) == 0).to(tl.float32))
    if STATS > 1:
        tl.store(stats_ptr + 3 * stats_row_stride + row, tl.log(tl.sum(q * factor * factor, 0)) - 2.0 * log_sum)
        tl.store(stats_ptr + 4 * stats_row_stride + row, mean)
    if WRITE_GRAD:
        g = weight * grad_scale
        if HAS_NUM_ITEMS:
            g = g / tl.load(num_items_ptr).to(tl.float32)
        a = g * (1.0 + 2.0 * z_loss * lse)
        c = g * (1.0 - label_smoothing)
        d = g * label_smoothing / num_cols
        _write_dlogits(x_ptr, x_ptr, num_cols, label, lse, a, 0.0, c, d, inner, outer, HAS_SOFTCAP, False, BLOCK_COLS)


@triton.jit
def _loss_grad_rows_kernel(
    logits_ptr, dlogits_ptr, labels_ptr, lse_ptr, grad_ptr, weights_ptr, scale_ptr,
    logits_row_stride, dlogits_row_stride, grad_stride, num_cols, ignore_index, label_smoothing, z_loss, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    dx_ptr = dlogits_ptr + row * dlogits_row_stride
    if label == ignore_index:
        for start in range(0, num_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            zeros = tl.zeros([BLOCK_COLS], tl.float32).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + cols, zeros, mask=cols < num_cols)
        return
    lse = tl.load(lse_ptr + row)
    g = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    if HAS_WEIGHTS:
        g = g * tl.load(weights_ptr + row).to(tl.float32)
    if HAS_SCALE:
        g = g * tl.load(scale_ptr)
    a = g * (1.0 + 2.0 * z_loss * lse)
    c = g * (1.0 - label_smoothing)
    d = g * label_smoothing / num_cols
    x_ptr = logits_ptr + row * logits_row_stride
    _write_dlogits(
        x_ptr, dx_ptr, num_cols, label.to(tl.int32), lse, a, 0.0, c, d, inner, outer, HAS_SOFTCAP, False, BLOCK_COLS
    )  # fmt: skip


@triton.jit
def _log_prob_grad_rows_kernel(
    logits_ptr, labels_ptr, lse_ptr, entropy_ptr, log_prob_grad_ptr, entropy_grad_ptr,
    logits_row_stride, num_cols, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY_GRAD: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int32)
    lse = tl.load(lse_ptr + row)
    c = -tl.load(log_prob_grad_ptr + row)
    a = c
    b = 0.0
    if HAS_ENTROPY_GRAD:
        b = -tl.load(entropy_grad_ptr + row)
        a = c + b * tl.load(entropy_ptr + row)
    x_ptr = logits_ptr + row * logits_row_stride
    _write_dlogits(
        x_ptr, x_ptr, num_cols, label, lse, a, b, c, 0.0, inner, outer, HAS_SOFTCAP, HAS_ENTROPY_GRAD, BLOCK_COLS
    )  # fmt: skip


_launch_loss = Launcher(_loss_rows_kernel)
_launch_loss_grad = Launcher(_loss_grad_rows_kernel)
_launch_log_prob_grad = Launcher(_log_prob_grad_rows_kernel)


@lru_cache(maxsize=1024)
def _block(num_cols: int, max_warps: int) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Lanes and launch options for rows of ``num_cols``: 16 bytes of bf16 a thread, no more lanes than columns."""
    lanes = min(max_warps * 32 * ELEMENTS_PER_THREAD, next_power_of_2(num_cols))
    return lanes, (("num_warps", min(max_warps, max(4, lanes // (32 * ELEMENTS_PER_THREAD)))),)


def _num_warps(logits: Tensor, two_passes: bool) -> int:
    num_rows, num_cols = logits.shape
    if num_rows <= sm_count(logits):
        return ALONE_WARPS
    if not two_passes:
        return STREAM_WARPS
    return PAIR_WARPS if num_cols * logits.element_size() <= PAIR_ROW_BYTES else ALONE_WARPS


def loss_rows(
    logits: Tensor, labels: Tensor, loss: Tensor, lse: Tensor | None, transform: LogitTransform, *, ignore_index: int,
    label_smoothing: float = 0.0, z_loss: float = 0.0, token_weights: Tensor | None = None, stats: Tensor | None = None,
    all_stats: bool = False, write_grad: bool = False, grad_scale: float = 1.0, num_items: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``loss`` and, if given, ``lse`` (fp32 ``[num_rows]``) and ``stats``; ``write_grad`` turns logits to dlogits.

    ``stats`` is fp32 ``[5, num_rows]`` of which the first three rows are written, or all five with ``all_stats``.
    dlogits are of ``loss * token_weights * grad_scale / num_items``, in place.
    """
    num_rows, num_cols = logits.shape
    level = 0 if stats is None else 1 + all_stats
    warps = _num_warps(logits, two_passes=write_grad)
    lanes, options = _block(num_cols, min(warps, ALL_STATS_WARPS) if all_stats else warps)
    _launch_loss(
        (num_rows, 1, 1),
        (logits, labels, token_weights, num_items, loss, lse, stats),
        (logits.stride(0), 0 if stats is None else stats.stride(0), num_cols, ignore_index),
        (label_smoothing, z_loss, transform.inner, transform.outer, grad_scale),
        (
            transform.has_softcap, label_smoothing != 0, token_weights is not None, num_items is not None,
            level, write_grad, lanes,
        ),
        options,
    )  # fmt: skip


def loss_grad_rows(
    logits: Tensor, dlogits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, transform: LogitTransform, *,
    ignore_index: int, label_smoothing: float = 0.0, z_loss: float = 0.0, token_weights: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``dlogits`` (may be ``logits``) with the gradient of ``sum(grad * loss * token_weights) * scale``.

    ``grad`` is ``[num_rows]`` or one element for all rows; ``scale`` fp32, one element.
    """
    num_rows, num_cols = logits.shape
    lanes, options = _block(num_cols, _num_warps(logits, two_passes=False))
    _launch_loss_grad(
        (num_rows, 1, 1),
        (logits, dlogits, labels, lse, grad, token_weights, scale),
        (logits.stride(0), dlogits.stride(0), grad.stride(0) if grad.dim() else 0, num_cols, ignore_index),
        (label_smoothing, z_loss, transform.inner, transform.outer),
        (transform.has_softcap, token_weights is not None, scale is not None, lanes),
        options,
    )


def log_prob_grad_rows(
    logits: Tensor, labels: Tensor, lse: Tensor, entropy: Tensor, log_prob_grad: Tensor, entropy_grad: Tensor | None,
    transform: LogitTransform,
) -> None:  # fmt: skip
    """Turn logits in place to the gradient of ``sum(log_prob_grad * log_prob) + sum(entropy_grad * entropy)``."""
    num_rows, num_cols = logits.shape
    lanes, options = _block(num_cols, STREAM_WARPS)
    _launch_log_prob_grad(
        (num_rows, 1, 1),
        (logits, labels, lse, entropy, log_prob_grad, entropy_grad),
        (logits.stride(0), num_cols),
        (transform.inner, transform.outer),
        (transform.has_softcap, entropy_grad is not None, lanes),
        options,
    )


def empty_rows(num_rows: int, device: torch.device) -> Tensor:
    """An uninitialised fp32 ``[num_rows]``."""
    return torch.empty(num_rows, dtype=torch.float32, device=device)
