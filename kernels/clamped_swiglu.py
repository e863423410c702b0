"""The SwiGLU of GPT-OSS (arXiv 2508.10925): gate and up are clamped, the sigmoid is scaled, ``up`` is shifted.

With ``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)``: ``out = g * sigmoid(alpha * g) * (u + offset)``.
Backward, with ``s = sigmoid(alpha * g)``: ``dup = dout * g * s`` where ``|up| <= limit``, and
``dgate = dout * (u + offset) * s * (1 + alpha * g * (1 - s))`` where ``gate <= limit``; zero elsewhere.
Saved: gate_up. Moved: gate_up and out forward; dout, gate_up and its gradient backward. All arithmetic is fp32, rounded
once.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .runtime.autograd import Function, differentiate
from .runtime.checks import check_rows, dense_like, row_layout
from .runtime.launch import cdiv, launcher, next_power_of_2, tl, triton, use_triton
from .runtime.operators import opaque_op
from .shared.gated import _sigmoid_and_complement

BLOCK_SIZE = 1024  # pairs per program


@triton.jit
def _load_pairs(ptr, start, num_cols, INTERLEAVED: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """gate and up of the ``BLOCK_COLS`` pairs from ``start`` on, in fp32."""
    if INTERLEAVED:
        lanes = 2 * start + tl.arange(0, 2 * BLOCK_COLS)
        both = tl.load(ptr + lanes, mask=lanes < 2 * num_cols, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (BLOCK_COLS, 2)))
    else:
        cols = start + tl.arange(0, BLOCK_COLS)
        gate = tl.load(ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
        up = tl.load(ptr + num_cols + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _factors(gate, up, limit, alpha, offset):
    """``g * s``, its derivative, and ``u + offset``; clamped by comparisons, so that NaN stays NaN."""
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    s, rest = _sigmoid_and_complement(alpha * g)
    return g * s, s + alpha * g * s * rest, u + offset


@triton.jit
def _clamped_swiglu_fwd_kernel(
    gate_up_ptr,  # [num_rows, 2 * num_cols]
    out_ptr,  # [num_rows, num_cols], contiguous
    gate_up_row_stride,
    num_cols,
    col_blocks,
    limit: float,
    alpha: float,
    offset: float,
    INTERLEAVED: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    start = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS
    gate, up = _load_pairs(gate_up_ptr + row * gate_up_row_stride, start, num_cols, INTERLEAVED, BLOCK_COLS)
    value, _, shifted = _factors(gate, up, limit, alpha, offset)
    cols = start + tl.arange(0, BLOCK_COLS)
    out = (value * shifted).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_cols + cols, out, mask=cols < num_cols)


@triton.jit
def _clamped_swiglu_bwd_kernel(
    dout_ptr,  # [num_rows, num_cols]
    gate_up_ptr,  # [num_rows, 2 * num_cols]
    dgate_up_ptr,  # [num_rows, 2 * num_cols], contiguous
    dout_row_stride,
    gate_up_row_stride,
    num_cols,
    col_blocks,
    limit: float,
    alpha: float,
    offset: float,
    INTERLEAVED: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    start = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS
    cols = start + tl.arange(0, BLOCK_COLS)
    dout = tl.load(dout_ptr + row * dout_row_stride + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    gate, up = _load_pairs(gate_up_ptr + row * gate_up_row_stride, start, num_cols, INTERLEAVED, BLOCK_COLS)
    value, slope, shifted = _factors(gate, up, limit, alpha, offset)
    dgate = tl.where(gate <= limit, dout * shifted * slope, 0.0).to(dgate_up_ptr.dtype.element_ty)
    dup = tl.where(tl.abs(up) <= limit, dout * value, 0.0).to(dgate_up_ptr.dtype.element_ty)
    dgate_up_ptr += row * 2 * num_cols
    if INTERLEAVED:
        lanes = 2 * start + tl.arange(0, 2 * BLOCK_COLS)
        both = tl.reshape(tl.join(dgate, dup), (2 * BLOCK_COLS,))
        tl.store(dgate_up_ptr + lanes, both, mask=lanes < 2 * num_cols)
    else:
        tl.store(dgate_up_ptr + cols, dgate, mask=cols < num_cols)
        tl.store(dgate_up_ptr + num_cols + cols, dup, mask=cols < num_cols)


_launch_fwd = launcher(_clamped_swiglu_fwd_kernel)
_launch_bwd = launcher(_clamped_swiglu_bwd_kernel)


def _grid(num_rows: int, num_cols: int) -> tuple[tuple[int, int, int], int, int]:
    """The launch grid, blocks per row, and pairs per block."""
    block = min(BLOCK_SIZE, next_power_of_2(num_cols))
    col_blocks = cdiv(num_cols, block)
    return (num_rows * col_blocks, 1, 1), col_blocks, block


def clamped_swiglu_fwd(gate_up: Tensor, limit: float, alpha: float, offset: float, interleaved: bool) -> Tensor:
    """The result ``[..., I]`` for ``gate_up`` ``[..., 2 * I]``, in its dtype."""
    num_cols = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], num_cols))
    if out.numel():
        rows, stride = row_layout(gate_up)
        grid, col_blocks, block = _grid(out.numel() // num_cols, num_cols)
        _launch_fwd(
            grid,
            (("num_warps", 4),),
            gate_up_ptr=rows,
            out_ptr=out,
            gate_up_row_stride=stride,
            num_cols=num_cols,
            col_blocks=col_blocks,
            limit=limit,
            alpha=alpha,
            offset=offset,
            INTERLEAVED=interleaved,
            BLOCK_COLS=block,
        )
    return out


def clamped_swiglu_bwd(
    dout: Tensor, gate_up: Tensor, limit: float, alpha: float, offset: float, interleaved: bool
) -> Tensor:
    """The gradient of ``gate_up``, contiguous."""
    dgate_up, num_cols = dense_like(gate_up), dout.shape[-1]
    if dout.numel():
        (dout, dout_stride), (rows, stride) = row_layout(dout), row_layout(gate_up)
        grid, col_blocks, block = _grid(dout.numel() // num_cols, num_cols)
        _launch_bwd(
            grid,
            (("num_warps", 4),),
            dout_ptr=dout,
            gate_up_ptr=rows,
            dgate_up_ptr=dgate_up,
            dout_row_stride=dout_stride,
            gate_up_row_stride=stride,
            num_cols=num_cols,
            col_blocks=col_blocks,
            limit=limit,
            alpha=alpha,
            offset=offset,
            INTERLEAVED=interleaved,
            BLOCK_COLS=block,
        )
    return dgate_up


class ClampedSwigluFunction(Function):
    """``clamped_swiglu``; all arguments are positional."""

    @staticmethod
    def definition(gate_up: Tensor, limit: float, alpha: float, offset: float, interleaved: bool) -> Tensor:
        """The same in plain PyTorch."""
        return reference.clamped_swiglu(gate_up, limit=limit, alpha=alpha, offset=offset, interleaved=interleaved)

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float, alpha: float, offset: float, interleaved: bool) -> Tensor:
        """Save the input only."""
        ctx.save_for_backward(gate_up)
        ctx.settings = (limit, alpha, offset, interleaved)
        return clamped_swiglu_fwd(gate_up, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Only ``gate_up`` has a gradient."""
        if torch.is_grad_enabled():
            return differentiate(ClampedSwigluFunction.definition, (*ctx.saved_tensors, *ctx.settings), (dout,))
        return clamped_swiglu_bwd(dout, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _fake_fwd(gate_up: Tensor, *_: Any) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _fake_bwd(dout: Tensor, gate_up: Tensor, *_: Any) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate_up, *ctx.settings = inputs
    ctx.save_for_backward(gate_up)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor]:
    return (_clamped_swiglu_bwd_op(dout, *ctx.saved_tensors, *ctx.settings),)


_clamped_swiglu_bwd_op = opaque_op("clamped_swiglu_bwd", clamped_swiglu_bwd, _fake_bwd)
_clamped_swiglu_op = opaque_op("clamped_swiglu", clamped_swiglu_fwd, _fake_fwd, _differentiate, _save)


@lru_cache(maxsize=64)
def _rounded(limit: float, dtype: torch.dtype) -> float:
    """``limit`` rounded to the tensor's dtype, as torch's clamp does."""
    return float(torch.tensor(limit, dtype=dtype))


def clamped_swiglu(
    gate_up: Tensor, *, limit: float = 7.0, alpha: float = 1.702, offset: float = 1.0, interleaved: bool = False
) -> Tensor:
    """``g * sigmoid(alpha * g) * (u + offset)`` with ``g = min(gate, limit)``, ``u = clamp(up, -limit, limit)``.

    Args:
        gate_up: ``[..., 2 * I]``, fp16, bf16, fp32 or fp64, any strides: gate, then up.
        limit: the clamp's bound, greater than 0.
        alpha: scales the sigmoid's argument; 1 for SiLU.
        offset: added to up after the clamp.
        interleaved: ``gate_up`` alternates gate and up.

    Returns:
        ``[..., I]`` in ``gate_up``'s dtype.

    Raises:
        TypeError: ``gate_up`` is not floating-point.
        ValueError: its last dimension is empty or odd; ``limit`` is not greater than 0.
    """
    check_rows("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got shape {tuple(gate_up.shape)}; must be [..., 2 * I]")
    if not limit > 0:
        raise ValueError(f"limit: got {limit}; must be greater than 0")
    if not use_triton(gate_up) or gate_up.dtype == torch.float64:
        return reference.clamped_swiglu(gate_up, limit=limit, alpha=alpha, offset=offset, interleaved=interleaved)
    settings = (_rounded(float(limit), gate_up.dtype), float(alpha), float(offset), interleaved)
    apply = _clamped_swiglu_op if torch.compiler.is_compiling() else ClampedSwigluFunction.apply
    return apply(gate_up, *settings)
