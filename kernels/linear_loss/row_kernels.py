"""Triton kernels on rows of logits: per-row loss and statistics, and logits overwritten by their gradient.

Formulas, with z = transform(x), p = softmax(z), t = z[label] and lse = logsumexp(z):
    loss        = (1 - eps) * (lse - t) + eps * (lse - mean(z)) + z_loss * lse^2
    stats       = log p[label]; entropy H = -sum(p log p); label is the first argmax; log(sum p^2); mean(z)
    d loss/dz_v = p_v * (1 + 2 z_loss lse) - (1 - eps) [v = label] - eps / V
    d H/dz_v    = -p_v (log p_v + H)
Any mix of the two gradients is p_v * (a + b * log p_v) - c * [v = label] - d, with four coefficients per row.

A row is read as a whole (token chunks) or one vocabulary chunk after another, whose statistics are merged. The softmax
is online: each lane keeps its own maximum and sums relative to it, at the cost of one exponential per element, and
lanes are merged once at the end of the row. So the loop has no reduction in it and loads stay in flight. Full blocks
are read without a mask, because a mask of odd width would undo the vectorised loads. Where one kernel computes loss
and gradient, its second pass runs from the end of the row to its start, over what the first pass left in the L2 cache.
"""

# Triton decides what a value in a kernel is when it compiles, which a type checker cannot follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

from ..runtime.launch import launcher, tl, triton


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
    # m: running maximum of each lane; s, w, q: its sums of e^(z-m), (z-m) e^(z-m), e^(2(z-m)); total: its sum of z.
    # beaten: whether another column has a larger logit than the label, or the same one in an earlier column.
    # _fold_chunk is written separately because registers and schedule depend on the order of these lines.
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
def _fold_chunk(z, in_row, cols, m, s, total, w, q, first, STATS: tl.constexpr):
    # first: the first column of each lane that has its maximum
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
def write_dlogits(
    x_ptr,  # [num_cols]
    dx_ptr,  # [num_cols], may be x_ptr
    num_cols, label, lse, a, b, c, d, inner, outer,
    HAS_SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row of logits, from its end to its start."""
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
    logits_ptr,  # [num_rows, num_cols]; dlogits are written over it
    labels_ptr,  # [num_rows] int64 or int32
    weights_ptr,  # [num_rows] or None
    num_items_ptr,  # [1] or None
    loss_ptr,  # [num_rows] fp32
    lse_ptr,  # [num_rows] fp32, or None
    stats_ptr,  # [5, num_rows] fp32, or None
    logits_row_stride,
    stats_row_stride,
    num_cols,
    ignore_index,
    label_smoothing: float,
    z_loss: float,
    inner: float,
    outer: float,
    grad_scale: float,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    STATS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
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
    if weights_ptr is not None:
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
        if num_items_ptr is not None:
            g = g / tl.load(num_items_ptr).to(tl.float32)
        a = g * (1.0 + 2.0 * z_loss * lse)
        c = g * (1.0 - label_smoothing)
        d = g * label_smoothing / num_cols
        write_dlogits(x_ptr, x_ptr, num_cols, label, lse, a, 0.0, c, d, inner, outer, HAS_SOFTCAP, False, BLOCK_COLS)


@triton.jit
def _loss_chunk_stats_kernel(
    logits_ptr,  # [num_rows, num_cols], a vocabulary chunk
    labels_ptr,  # [num_rows] int64 or int32
    sums_ptr,  # [6, num_rows] fp32: see NUM_SUMS in rows.py
    argmax_ptr,  # [num_rows] int32
    logits_row_stride,
    sums_row_stride,
    num_cols,
    first_col,
    inner: float,
    outer: float,
    FIRST: tl.constexpr,
    STATS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * logits_row_stride
    sums_ptr += row
    label = tl.load(labels_ptr + row).to(tl.int64) - first_col
    in_chunk = (label >= 0) & (label < num_cols)
    target = _transform(tl.load(x_ptr + label, mask=in_chunk, other=0.0), inner, outer, HAS_SOFTCAP)
    tl.store(sums_ptr + 2 * sums_row_stride, target, mask=in_chunk)

    lanes = tl.arange(0, BLOCK_COLS)
    m = tl.full([BLOCK_COLS], -1e30, tl.float32)
    s = tl.zeros([BLOCK_COLS], tl.float32)
    total = tl.zeros([BLOCK_COLS], tl.float32)
    w = tl.zeros([BLOCK_COLS], tl.float32)
    q = tl.zeros([BLOCK_COLS], tl.float32)
    first = tl.full([BLOCK_COLS], 2147483647, tl.int32)
    full = num_cols // BLOCK_COLS * BLOCK_COLS
    for start in range(0, full, BLOCK_COLS):
        cols = start + lanes
        z = _transform(tl.load(x_ptr + cols), inner, outer, HAS_SOFTCAP)
        m, s, total, w, q, first = _fold_chunk(z, True, cols, m, s, total, w, q, first, STATS)
    if full < num_cols:
        cols = full + lanes
        mask = cols < num_cols
        z = _transform(tl.load(x_ptr + cols, mask=mask, other=0.0), inner, outer, HAS_SOFTCAP)
        z = tl.where(mask, z, -1e30)
        m, s, total, w, q, first = _fold_chunk(z, mask, cols, m, s, total, w, q, first, STATS)

    row_max = tl.max(m, 0)
    shift = m - row_max
    factor = tl.exp(shift)
    row_w = tl.sum((w + shift * s) * factor, 0)
    row_q = tl.sum(q * factor * factor, 0)
    row_s = tl.sum(s * factor, 0)
    row_total = tl.sum(total, 0)
    argmax = tl.min(tl.where(m == row_max, first, 2147483647), 0) + first_col
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
def _loss_dlogits_kernel(
    logits_ptr,  # [num_rows, num_cols]; dlogits are written over it
    labels_ptr,  # [num_rows] int64 or int32
    lse_ptr,  # [num_rows] fp32
    a_ptr,  # [num_rows] fp32
    b_ptr,  # [num_rows] fp32, or None
    c_ptr,  # [num_rows] fp32
    d_ptr,  # [num_rows] fp32
    logits_row_stride,
    num_cols,
    first_col,
    inner: float,
    outer: float,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * logits_row_stride
    label = (tl.load(labels_ptr + row).to(tl.int64) - first_col).to(tl.int32)
    lse = tl.load(lse_ptr + row)
    a = tl.load(a_ptr + row)
    b = 0.0
    if b_ptr is not None:
        b = tl.load(b_ptr + row)
    c = tl.load(c_ptr + row)
    d = tl.load(d_ptr + row)
    HAS_B: tl.constexpr = b_ptr is not None
    write_dlogits(x_ptr, x_ptr, num_cols, label, lse, a, b, c, d, inner, outer, HAS_SOFTCAP, HAS_B, BLOCK_COLS)


launch_loss_rows = launcher(_loss_rows_kernel)
launch_chunk_stats = launcher(_loss_chunk_stats_kernel)
launch_dlogits = launcher(_loss_dlogits_kernel)
