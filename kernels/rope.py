"""Rotary position embedding of q and k in one launch (arXiv 2104.09864).

Each pair ``(x1, x2)`` of a head's rotary part becomes ``(x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)``. A pair is one element
of each half or, interleaved, two neighbours. (c1, c2) and (s1, s2) are the pair's entries in cos and sin; c1 may differ
from c2, and s1 from s2. With deinterleave, neighbours are read and halves are written.
Backward: ``dx1 = dy1 * c1 + dy2 * s2`` and ``dx2 = dy2 * c2 - dy1 * s1``, by the same kernel.
Saved: cos and sin. Moved, forward and backward alike: q and k, read and written once. The small tables stay in L2.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .runtime.autograd import Function, differentiate
from .runtime.checks import check_device, check_floating, unit_stride
from .runtime.launch import cdiv, launcher, next_power_of_2, sm_count, tl, triton, use_triton
from .runtime.operators import opaque_op

TILE_SIZE = 4096  # elements of q or k per program
PROGRAMS_PER_SM = 8  # tiles shrink until there are this many
TILE_HEADS = 8  # heads that share one load of the tables; with more, few k heads would leave lanes idle


@triton.jit
def _load_table(
    base, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, PAIRED: tl.constexpr, INTERLEAVED: tl.constexpr, mask
):
    """The two table entries of every pair, in fp32; a ``PAIRED`` table has one entry per pair, which serves as both."""
    if PAIRED:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        first = tl.load(base + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
        second = first
    else:
        first, second = _load_pairs(base, HALF, BLOCK_HALF, INTERLEAVED, mask)
    return first, second


@triton.jit
def _load_pairs(base, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr, mask):
    """The elements of all pairs, each fp32 ``[A, B, BLOCK_HALF]``, in the rows that start at ``base`` ``[A, B, 1]``."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        both = tl.load(base + cols, mask=mask & (cols < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (base.shape[0], base.shape[1], BLOCK_HALF, 2)))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        first = tl.load(base + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
        second = tl.load(base + HALF + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_batch_stride, x_head_stride, x_token_stride, y_batch_stride, y_head_stride, y_token_stride,
    num_heads, first_head, batch, tokens, num_tokens, cos_base, sin_base, BACKWARD: tl.constexpr, PAIRED: tl.constexpr,
    HALF: tl.constexpr, TAIL: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    LOAD_INTERLEAVED: tl.constexpr, STORE_INTERLEAVED: tl.constexpr, TILE_HEADS: tl.constexpr,
):  # fmt: skip
    heads = (first_head + tl.arange(0, TILE_HEADS)).to(tl.int64)
    token_mask = (tokens < num_tokens)[:, None, None]
    mask = token_mask & (heads < num_heads)[None, :, None]
    tokens = tokens[:, None, None]
    heads = heads[None, :, None]
    x_base = x_ptr + batch * x_batch_stride + heads * x_head_stride + tokens * x_token_stride
    y_base = y_ptr + batch * y_batch_stride + heads * y_head_stride + tokens * y_token_stride
    # Load the tables in the tile's full shape: repeated reads hit L1, whereas converting a layout would stall.
    cos_base += tl.zeros((1, TILE_HEADS, 1), dtype=tl.int64)
    sin_base += tl.zeros((1, TILE_HEADS, 1), dtype=tl.int64)
    x1, x2 = _load_pairs(x_base, HALF, BLOCK_HALF, LOAD_INTERLEAVED, mask)
    c1, c2 = _load_table(cos_base, HALF, BLOCK_HALF, PAIRED, LOAD_INTERLEAVED, mask)
    s1, s2 = _load_table(sin_base, HALF, BLOCK_HALF, PAIRED, LOAD_INTERLEAVED, mask)
    if BACKWARD:
        s1, s2 = -s2, -s1
    y1 = (x1 * c1 - x2 * s1).to(y_ptr.dtype.element_ty)
    y2 = (x2 * c2 + x1 * s2).to(y_ptr.dtype.element_ty)
    if STORE_INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        both = tl.reshape(tl.join(y1, y2), (y1.shape[0], y1.shape[1], 2 * BLOCK_HALF))
        tl.store(y_base + cols, both, mask=mask & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        tl.store(y_base + cols, y1, mask=mask & (cols < HALF))
        tl.store(y_base + HALF + cols, y2, mask=mask & (cols < HALF))
    if TAIL > 0:
        cols = tl.arange(0, BLOCK_TAIL)[None, None, :]
        tail = tl.load(x_base + 2 * HALF + cols, mask=mask & (cols < TAIL))
        tl.store(y_base + 2 * HALF + cols, tail, mask=mask & (cols < TAIL))


# HALF and TAIL are constants: Triton then knows that a width such as 40 or 48 is a multiple of 8, and makes the masked
# accesses 16 bytes wide.
@triton.jit
def _rope_kernel(
    q_ptr,  # [B, H_q, T, D]; this and the next three may have any memory order
    k_ptr,  # [B, H_k, T, D], or None
    q_out_ptr,  # [B, H_q, T, D]
    k_out_ptr,  # [B, H_k, T, D], or None
    cos_ptr,  # [B, T, 2 * HALF], or [B, T, HALF] if PAIRED
    sin_ptr,  # like cos
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    q_out_batch_stride,
    q_out_head_stride,
    q_out_token_stride,
    k_out_batch_stride,
    k_out_head_stride,
    k_out_token_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    num_q_heads,
    num_k_heads,
    num_tokens,
    q_chunks,
    k_chunks,
    BACKWARD: tl.constexpr,
    LOAD_INTERLEAVED: tl.constexpr,
    STORE_INTERLEAVED: tl.constexpr,  # if it differs from LOAD_INTERLEAVED, the tables are PAIRED
    PAIRED: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    # Head chunks vary fastest, so that programs with the same table entries and neighbouring memory run together.
    chunk = tl.program_id(0) % (q_chunks + k_chunks)
    block = tl.program_id(0) // (q_chunks + k_chunks)
    token_blocks = tl.cdiv(num_tokens, TILE_TOKENS)
    batch = (block // token_blocks).to(tl.int64)
    tokens = (block % token_blocks).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    cos_base = (cos_ptr + batch * cos_batch_stride + tokens * cos_token_stride)[:, None, None]
    sin_base = (sin_ptr + batch * sin_batch_stride + tokens * sin_token_stride)[:, None, None]
    if k_ptr is not None and chunk >= q_chunks:
        _rotate_heads(
            k_ptr, k_out_ptr, k_batch_stride, k_head_stride, k_token_stride, k_out_batch_stride, k_out_head_stride,
            k_out_token_stride, num_k_heads, (chunk - q_chunks) * TILE_HEADS, batch, tokens, num_tokens, cos_base,
            sin_base, BACKWARD, PAIRED, HALF, TAIL, BLOCK_HALF, BLOCK_TAIL, LOAD_INTERLEAVED, STORE_INTERLEAVED,
            TILE_HEADS,
        )  # fmt: skip
    else:
        _rotate_heads(
            q_ptr, q_out_ptr, q_batch_stride, q_head_stride, q_token_stride, q_out_batch_stride, q_out_head_stride,
            q_out_token_stride, num_q_heads, chunk * TILE_HEADS, batch, tokens, num_tokens, cos_base, sin_base,
            BACKWARD, PAIRED, HALF, TAIL, BLOCK_HALF, BLOCK_TAIL, LOAD_INTERLEAVED, STORE_INTERLEAVED, TILE_HEADS,
        )  # fmt: skip


def _strides(x: Tensor, unsqueeze_dim: int) -> tuple[int, int, int]:
    """Strides of batch, head and token."""
    batch, second, third, _ = x.stride()
    return (batch, second, third) if unsqueeze_dim == 1 else (batch, third, second)


_launch_rope = launcher(_rope_kernel)


class _Tiling(NamedTuple):
    """The grid, the head chunks of q and k, and the kernel's constants from HALF to TILE_HEADS."""

    num_programs: int
    q_chunks: int
    k_chunks: int
    half: int
    tail: int
    block_half: int
    block_tail: int
    tile_tokens: int
    tile_heads: int


@lru_cache(maxsize=4096)
def _tiling(
    batch: int, num_tokens: int, q_heads: int, k_heads: int, head_dim: int, rotary_dim: int, sms: int
) -> _Tiling:
    """Tiles of ``TILE_SIZE`` elements, with fewer tokens if there would be too few programs."""
    half, tail = rotary_dim // 2, head_dim - rotary_dim
    blocks = next_power_of_2(half), next_power_of_2(tail)
    tile_heads = min(TILE_HEADS, next_power_of_2(max(q_heads, k_heads)))
    tile_tokens = max(1, min(TILE_SIZE // (2 * blocks[0] * tile_heads), next_power_of_2(num_tokens)))
    q_chunks, k_chunks = cdiv(q_heads, tile_heads), cdiv(k_heads, tile_heads)
    while tile_tokens > 1 and batch * cdiv(num_tokens, tile_tokens) * (q_chunks + k_chunks) < PROGRAMS_PER_SM * sms:
        tile_tokens //= 2
    programs = batch * cdiv(num_tokens, tile_tokens) * (q_chunks + k_chunks)
    return _Tiling(programs, q_chunks, k_chunks, half, tail, *blocks, tile_tokens, tile_heads)


def _rotate(
    q: Tensor, q_out: Tensor, k: Tensor | None, k_out: Tensor | None, cos: Tensor, sin: Tensor, rotary_dim: int,
    interleaved: bool, deinterleave: bool, unsqueeze_dim: int, backward: bool,
) -> None:  # fmt: skip
    """Rotate ``q`` into ``q_out`` and, unless None, ``k`` into ``k_out``."""
    shape, k_heads = q.shape, 0 if k is None else k.shape[unsqueeze_dim]
    batch, num_tokens, q_heads, head_dim = shape[0], shape[3 - unsqueeze_dim], shape[unsqueeze_dim], shape[3]
    if batch * num_tokens * (q_heads + k_heads) == 0:
        return
    tiling = _tiling(batch, num_tokens, q_heads, k_heads, head_dim, rotary_dim, sm_count(q))
    q_batch, q_head, q_token = _strides(q, unsqueeze_dim)
    q_out_batch, q_out_head, q_out_token = _strides(q_out, unsqueeze_dim)
    k_batch, k_head, k_token = k_out_batch, k_out_head, k_out_token = (0, 0, 0)
    if k is not None and k_out is not None:
        k_batch, k_head, k_token = _strides(k, unsqueeze_dim)
        k_out_batch, k_out_head, k_out_token = _strides(k_out, unsqueeze_dim)
    cos_batch, cos_token, _ = cos.stride()
    sin_batch, sin_token, _ = sin.stride()
    _launch_rope(
        (tiling.num_programs, 1, 1),
        (("num_warps", 4),),
        q_ptr=q, k_ptr=k, q_out_ptr=q_out, k_out_ptr=k_out, cos_ptr=cos, sin_ptr=sin,
        q_batch_stride=q_batch, q_head_stride=q_head, q_token_stride=q_token,
        k_batch_stride=k_batch, k_head_stride=k_head, k_token_stride=k_token,
        q_out_batch_stride=q_out_batch, q_out_head_stride=q_out_head, q_out_token_stride=q_out_token,
        k_out_batch_stride=k_out_batch, k_out_head_stride=k_out_head, k_out_token_stride=k_out_token,
        cos_batch_stride=0 if cos.shape[0] == 1 else cos_batch, cos_token_stride=cos_token,
        sin_batch_stride=0 if sin.shape[0] == 1 else sin_batch, sin_token_stride=sin_token,
        num_q_heads=q_heads, num_k_heads=k_heads, num_tokens=num_tokens,
        q_chunks=tiling.q_chunks, k_chunks=tiling.k_chunks, BACKWARD=backward, PAIRED=cos.shape[2] != rotary_dim,
        LOAD_INTERLEAVED=interleaved and not (deinterleave and backward),
        STORE_INTERLEAVED=interleaved and (backward or not deinterleave),
        HALF=tiling.half, TAIL=tiling.tail, BLOCK_HALF=tiling.block_half, BLOCK_TAIL=tiling.block_tail,
        TILE_TOKENS=tiling.tile_tokens, TILE_HEADS=tiling.tile_heads,
    )  # fmt: skip


def rope_fwd(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, deinterleave: bool,
    unsqueeze_dim: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the rotated ``q`` and ``k``, in their shapes and memory order."""
    q, k = unit_stride(q), None if k is None else unit_stride(k)
    q_out, k_out = torch.empty_like(q), None if k is None else torch.empty_like(k)
    _rotate(q, q_out, k, k_out, cos, sin, rotary_dim, interleaved, deinterleave, unsqueeze_dim, backward=False)
    return q_out, k_out


def rope_bwd(
    dq: Tensor | None, dk: Tensor | None, q_strides: tuple[int, ...], k_strides: tuple[int, ...], cos: Tensor,
    sin: Tensor, *settings: Any,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of ``q`` and ``k`` with the given strides, None where the upstream gradient is None."""
    dq, dk = (None if grad is None else unit_stride(grad) for grad in (dq, dk))
    dq_out, dk_out = (
        None if grad is None else torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
        for grad, strides in ((dq, q_strides), (dk, k_strides))
    )
    if dq is not None and dq_out is not None:
        _rotate(dq, dq_out, dk, dk_out, cos, sin, *settings, backward=True)
    elif dk is not None and dk_out is not None:
        _rotate(dk, dk_out, None, None, cos, sin, *settings, backward=True)
    return dq_out, dk_out


class RopeFunction(Function):
    """``rope`` of ``q`` and, unless None, ``k``; all arguments are positional."""

    @staticmethod
    def definition(*args: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The same in plain PyTorch."""
        names = ("rotary_dim", "interleaved", "deinterleave", "unsqueeze_dim")
        return reference.rope(*args[:4], compute_in_fp32=True, **dict(zip(names, args[4:], strict=True)))

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *settings: Any
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Save the tables only."""
        q_out, k_out = rope_fwd(q, k, cos, sin, *settings)
        ctx.save_for_backward(cos, sin)
        # Gradients get the outputs' strides, which keep the inputs' memory order, so the layer before copies nothing.
        ctx.strides = (q_out.stride(), () if k_out is None else k_out.stride())
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return q_out if k is None else (q_out, k_out)

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Either upstream gradient may be None."""
        dq, dk = dq if ctx.needs_input_grad[0] else None, dk if ctx.needs_input_grad[1] else None
        if torch.is_grad_enabled():  # a rotation's gradient does not depend on its input, so zeros will do
            known = (None, *ctx.saved_tensors, *ctx.settings)
            pairs = ((None if g is None else torch.zeros_like(g, requires_grad=True), g) for g in (dq, dk))
            return *(differentiate(RopeFunction.definition, (x, *known), (g,))[0] for x, g in pairs), *(None,) * 6
        return *rope_bwd(dq, dk, *ctx.strides, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


def _fake_fwd(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(unit_stride(q)), None if k is None else torch.empty_like(unit_stride(k))


def _bwd(
    dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool,
    deinterleave: bool, unsqueeze_dim: int,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    q_strides, k_strides = (() if grad is None else torch.empty_like(unit_stride(grad)).stride() for grad in (dq, dk))
    return rope_bwd(dq, dk, q_strides, k_strides, cos, sin, rotary_dim, interleaved, deinterleave, unsqueeze_dim)


def _fake_bwd(dq: Tensor | None, dk: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.empty_like(unit_stride(grad)) for grad in (dq, dk))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.settings = inputs[4:]
    ctx.set_materialize_grads(False)
    if inputs[1] is None:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = [grad if needed else None for grad, needed in zip((dq, dk), ctx.needs_input_grad, strict=False)]
    found = _rope_bwd_op(*grads, *ctx.saved_tensors, *ctx.settings)
    return tuple(None if grad is None else out for grad, out in zip(grads, found, strict=True))


_rope_bwd_op = opaque_op("rope_bwd", _bwd, _fake_bwd)
_rope_op = opaque_op("rope", rope_fwd, _fake_fwd, _differentiate, _save)


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotary_dim: int | None, unsqueeze_dim: int) -> int:
    """Raise for arguments that do not fit together; return the rotary dimension."""
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim: got {unsqueeze_dim}; must be 1 ([B, H, T, D]) or 2 ([B, T, H, D])")
    check_floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: got shape {tuple(q.shape)}; must be 4-dimensional")
    batch, num_tokens, head_dim = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    if k is not None:
        check_floating("k", k)
        if k.dim() != 4 or (k.shape[0], k.shape[3 - unsqueeze_dim], k.shape[3]) != (batch, num_tokens, head_dim):
            raise ValueError(f"k: got shape {tuple(k.shape)}; must be q's {tuple(q.shape)}, except the number of heads")
        check_device("k", k, q)
    width = cos.shape[-1] if cos.dim() else 0
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        if table.shape not in ((batch, num_tokens, width), (1, num_tokens, width)):
            expected = f"[{batch} or 1, {num_tokens}, {width}], the same width for cos and sin"
            raise ValueError(f"{name}: got shape {tuple(table.shape)}; must be {expected}")
        if table.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires grad; must be constant, as .detach() makes it")
        check_device(name, table, q)
    rotary_dim = width if rotary_dim is None else rotary_dim
    if rotary_dim not in (width, 2 * width) or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        expected = f"that width or twice it, even and at most the head dimension {head_dim}"
        raise ValueError(f"rotary_dim: got {rotary_dim} with tables of width {width}; must be {expected}")
    return rotary_dim


def rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None,
    deinterleave: bool = False, unsqueeze_dim: int = 1, compute_in_fp32: bool = False,
) -> tuple[Tensor, Tensor] | Tensor:  # fmt: skip
    """Rotary position embedding of the first ``rotary_dim`` elements of each head; the rest passes through.

    Args:
        q: ``[B, H_q, T, D]``, or ``[B, T, H_q, D]`` with ``unsqueeze_dim=2``; fp16, bf16, fp32 or fp64; any strides.
        k: like ``q``, but possibly with another number of heads; or None.
        cos: ``[B or 1, T, rotary_dim]``; or ``[B or 1, T, rotary_dim / 2]``, one entry per pair, if ``rotary_dim``
            is given as twice that width. Any floating dtype; gets no gradient.
        sin: like ``cos``.
        interleaved: a pair is two neighbouring elements, not one element of each half.
        rotary_dim: width of the rotary part; by default the tables' width.
        deinterleave: return the first elements of all pairs, then the second ones (DeepSeek-V3); needs ``interleaved``
            and tables with one entry per pair.
        unsqueeze_dim: the dimension of the heads in ``q`` and ``k``, 1 or 2.
        compute_in_fp32: where Triton does not run, compute in fp32, as the kernel always does.

    Returns:
        The rotated ``q`` and ``k``, or ``q`` alone if ``k`` is None, in the input's dtype, shape and memory order.

    Raises:
        TypeError: an argument is not floating-point.
        ValueError: shapes, devices, ``rotary_dim`` or ``deinterleave`` do not fit together; ``cos`` or ``sin``
            requires a gradient.
    """
    width = _check(q, k, cos, sin, rotary_dim, unsqueeze_dim)
    if deinterleave and not (interleaved and width == 2 * cos.shape[-1]):
        raise ValueError(
            f"deinterleave: got True with interleaved={interleaved}, tables of width {cos.shape[-1]} and rotary_dim "
            f"{width}; must be False unless interleaved=True with one table entry per pair"
        )
    if not use_triton(q, k, cos, sin) or torch.float64 in (q.dtype, q.dtype if k is None else k.dtype):
        return reference.rope(
            q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim, deinterleave=deinterleave,
            unsqueeze_dim=unsqueeze_dim, compute_in_fp32=compute_in_fp32,
        )  # fmt: skip
    cos, sin = unit_stride(cos), unit_stride(sin)
    if torch.compiler.is_compiling():
        rotated = _rope_op(q, k, cos, sin, width, interleaved, deinterleave, unsqueeze_dim)
        return rotated[0] if k is None else rotated
    return RopeFunction.apply(q, k, cos, sin, width, interleaved, deinterleave, unsqueeze_dim)
