"""Kernels that pool token scores over a vocabulary, and gather the gradients of the maxima; see linear_splade.py."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

from ..runtime.launch import launcher, tl, triton

UNROLL = 8  # rows in flight; masks are padded to a multiple of it


@triton.jit
def _log1p(x):
    # exact where 1 + x rounds: log(u) x / (u - 1)
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _max_kernel(
    logits_ptr,  # [B * T, num_cols]
    mask_ptr,  # [B, T] int32, 1 or 0, padded with zeros to a multiple of UNROLL tokens
    best_ptr,  # [B, V] fp32: the largest logit, at least 0
    argmax_ptr,  # [B, V] int32: its token, or -1
    num_tokens,
    num_cols,
    logits_row_stride,
    mask_row_stride,
    out_row_stride,
    UNROLL: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row = cols < num_cols
    best = tl.zeros([BLOCK_COLS], tl.float32)
    token = tl.full([BLOCK_COLS], -1, tl.int32)
    for start in range(0, num_tokens, UNROLL):
        for step in tl.static_range(UNROLL):
            t = start + step
            counts = cols < num_cols * tl.load(mask_ptr + b * mask_row_stride + t)
            row = b * num_tokens + t
            x = tl.load(logits_ptr + row * logits_row_stride + cols, mask=counts, other=0.0).to(tl.float32)
            x = tl.where(x != x, float("inf"), x)  # NaN must not pass for a small logit
            better = x > best
            token = tl.where(better, t, token)
            best = tl.where(better, x, best)
    tl.store(best_ptr + b * out_row_stride + cols, best, mask=in_row)
    tl.store(argmax_ptr + b * out_row_stride + cols, token, mask=in_row)


@triton.jit
def _sum_kernel(
    logits_ptr,  # [B * T, num_cols]
    mask_ptr,  # [B, T] int32, 1 or 0, padded with zeros to a multiple of UNROLL tokens
    out_ptr,  # [B, V] fp32
    num_tokens,
    num_cols,
    logits_row_stride,
    mask_row_stride,
    out_row_stride,
    TWICE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row = cols < num_cols
    total = tl.zeros([BLOCK_COLS], tl.float32)
    for t in range(num_tokens):
        counts = cols < num_cols * tl.load(mask_ptr + b * mask_row_stride + t)
        row = b * num_tokens + t
        x = tl.load(logits_ptr + row * logits_row_stride + cols, mask=counts, other=0.0).to(tl.float32)
        y = _log1p(tl.maximum(x, 0.0))
        total += _log1p(y) if TWICE else y
    tl.store(out_ptr + b * out_row_stride + cols, total, mask=in_row)


@triton.jit
def _sum_bwd_kernel(
    logits_ptr,  # [B * T, num_cols], overwritten with their gradient
    mask_ptr,  # [B, T] int32, 1 or 0, padded with zeros to a multiple of UNROLL tokens
    grad_ptr,  # [B, V] fp32
    num_tokens,
    num_cols,
    logits_row_stride,
    mask_row_stride,
    grad_row_stride,
    TWICE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row = cols < num_cols
    places = logits_ptr + row * logits_row_stride + cols
    x = tl.load(places, mask=in_row, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + (row // num_tokens) * grad_row_stride + cols, mask=in_row, other=0.0)
    g = g / (1.0 + tl.maximum(x, 0.0))
    if TWICE:
        g = g / (1.0 + _log1p(tl.maximum(x, 0.0)))
    keep = (x > 0) & (cols < num_cols * tl.load(mask_ptr + row // num_tokens * mask_row_stride + row % num_tokens))
    tl.store(places, tl.where(keep, g, 0.0).to(logits_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _dweight_kernel(
    hidden_ptr,  # [B * T, H]
    argmax_ptr,  # [B, V] int32
    grad_ptr,  # [B, V] fp32
    dweight_ptr,  # [V, H]
    num_sequences,
    num_tokens,
    num_cols,
    width,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    lanes = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_row = cols < num_cols
    in_width = lanes < width
    total = tl.zeros([BLOCK_COLS, BLOCK_WIDTH], tl.float32)
    for _ in range(num_sequences):
        token = tl.load(argmax_ptr + cols, mask=in_row, other=-1)
        g = tl.load(grad_ptr + cols, mask=in_row, other=0.0)
        keep = (token >= 0)[:, None] & in_width[None, :]
        x = tl.load(hidden_ptr + token[:, None] * width + lanes[None, :], mask=keep, other=0.0)
        total += g[:, None] * x.to(tl.float32)
        argmax_ptr += num_cols
        grad_ptr += num_cols
        hidden_ptr += num_tokens * width
    out = dweight_ptr + cols[:, None] * width + lanes[None, :]
    tl.store(out, total.to(dweight_ptr.dtype.element_ty), mask=in_row[:, None] & in_width[None, :])


@triton.jit
def _dhidden_kernel(
    weight_ptr,  # [V, H]
    entries_ptr,  # [B * chunk] int64: places in [B, chunk], sorted by token
    bounds_ptr,  # [B * T + 1] int64: where each token's entries begin
    grad_ptr,  # [B, V] fp32
    dhidden_ptr,  # [B * T, H] fp32, added to
    num_tokens,
    num_cols,
    first_col,
    chunk,
    width,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = lanes < width
    begin = tl.load(bounds_ptr + row)
    end = tl.load(bounds_ptr + row + 1)
    b = row // num_tokens
    total = tl.zeros([BLOCK_ENTRIES, BLOCK_WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_ENTRIES):
        places = start + tl.arange(0, BLOCK_ENTRIES)
        here = places < end
        cols = first_col + tl.load(entries_ptr + places, mask=here, other=0) - b * chunk
        g = tl.load(grad_ptr + b * num_cols + cols, mask=here, other=0.0)
        w = tl.load(
            weight_ptr + cols[:, None] * width + lanes[None, :], mask=here[:, None] & in_width[None, :], other=0.0
        )
        total += g[:, None] * w.to(tl.float32)
    if end > begin:
        out = dhidden_ptr + row * width + lanes
        tl.store(out, tl.load(out, mask=in_width) + tl.sum(total, 0), mask=in_width)


launch_max = launcher(_max_kernel)
launch_sum = launcher(_sum_kernel)
launch_sum_bwd = launcher(_sum_bwd_kernel)
launch_dweight = launcher(_dweight_kernel)
launch_dhidden = launcher(_dhidden_kernel)
