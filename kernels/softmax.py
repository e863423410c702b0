"""Softmax over the last dimension: ``y = exp(x - max) / sum exp(x - max)``.

Backward: ``dx = y * (dy - sum y dy)``. Saved: y. Moved: x and y forward; y, dy and dx backward, where a second reading
of a row comes from the L2 cache. Statistics are fp32, and results are rounded once. The sum of 16-bit results is 1 only
to their precision: where it matters, pass fp32.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

from typing import Any

import torch
from torch import Tensor

from . import reference
from .linear_loss.rows import row_block, row_warps
from .runtime.autograd import Function
from .runtime.checks import as_rows, check_rows
from .runtime.launch import launcher, tl, triton, use_triton
from .runtime.operators import opaque_op


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,  # [num_rows, num_cols]
    out_ptr,  # [num_rows, num_cols], contiguous
    row_stride,
    num_cols,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    out_ptr += row * num_cols
    lanes = tl.arange(0, BLOCK_COLS)
    m = tl.full([BLOCK_COLS], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK_COLS], tl.float32)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + lanes
        x = tl.load(x_ptr + cols, mask=cols < num_cols, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(m, x)
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # of a lane that has seen nothing but -inf
        s = s * tl.exp(m - shift) + tl.exp(x - shift)
        m = higher
    row_max = tl.max(m, 0)
    scale = 1.0 / tl.sum(s * tl.exp(m - row_max), 0)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + lanes
        x = tl.load(x_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
        y = tl.exp(x - row_max) * scale
        tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=cols < num_cols)


@triton.jit
def _softmax_bwd_kernel(
    dout_ptr,  # [num_rows, num_cols]
    out_ptr,  # [num_rows, num_cols], contiguous
    dx_ptr,  # [num_rows, num_cols], contiguous
    dout_row_stride,
    num_cols,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dout_ptr += row * dout_row_stride
    out_ptr += row * num_cols
    dx_ptr += row * num_cols
    lanes = tl.arange(0, BLOCK_COLS)
    total = tl.zeros([BLOCK_COLS], tl.float32)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + lanes
        mask = cols < num_cols
        y = tl.load(out_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        total += y * tl.load(dout_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    inner = tl.sum(total, 0)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + lanes
        mask = cols < num_cols
        y = tl.load(out_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + cols, (y * (dout - inner)).to(dx_ptr.dtype.element_ty), mask=mask)


_launch_fwd = launcher(_softmax_fwd_kernel)
_launch_bwd = launcher(_softmax_bwd_kernel)


def softmax_fwd(x: Tensor) -> Tensor:
    """The softmax of ``x`` ``[..., N]``, contiguous."""
    rows, out = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, num_cols = rows.shape
    if num_rows:
        lanes, options = row_block(num_cols, row_warps(rows, two_passes=True))
        _launch_fwd(
            (num_rows, 1, 1),
            options,
            x_ptr=rows,
            out_ptr=out,
            row_stride=rows.stride(0),
            num_cols=num_cols,
            BLOCK_COLS=lanes,
        )
    return out


def softmax_bwd(dout: Tensor, out: Tensor) -> Tensor:
    """The gradient of ``x`` for the forward's result ``out`` and its gradient."""
    rows, dx = as_rows(dout), torch.empty_like(out)
    num_rows, num_cols = rows.shape
    if num_rows:
        lanes, options = row_block(num_cols, row_warps(rows, two_passes=True))
        _launch_bwd(
            (num_rows, 1, 1),
            options,
            dout_ptr=rows,
            out_ptr=out,
            dx_ptr=dx,
            dout_row_stride=rows.stride(0),
            num_cols=num_cols,
            BLOCK_COLS=lanes,
        )
    return dx


class SoftmaxFunction(Function):
    """``softmax`` over the last dimension."""

    @staticmethod
    def definition(x: Tensor) -> Tensor:
        """The same in plain PyTorch."""
        return reference.softmax(x)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Save the result only."""
        out = softmax_fwd(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor | None:
        """The gradient of ``x``."""
        (out,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # ``out`` as autograd knows it: its own derivative leads back to ``x``
            wide = out.to(torch.promote_types(out.dtype, torch.float32))
            return (wide * (dout - (wide * dout).sum(-1, keepdim=True))).to(out.dtype)
        return softmax_bwd(dout, out)


def _fake_fwd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(dout: Tensor, out: Tensor) -> Tensor:
    return out.new_empty(out.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor]:
    return (_softmax_bwd_op(dout, *ctx.saved_tensors),)


_softmax_bwd_op = opaque_op("softmax_bwd", softmax_bwd, _fake_bwd)
_softmax_op = opaque_op("softmax", softmax_fwd, _fake_fwd, _differentiate, _save)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension, computed in fp32 and rounded once.

    Args:
        x: ``[..., N]``, fp16, bf16, fp32 or fp64; any strides. A row needs one element that is not ``-inf``.

    Returns:
        ``[..., N]`` in ``x``'s dtype, contiguous.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: the last dimension is empty.
    """
    check_rows("x", x)
    if not use_triton(x) or x.dtype == torch.float64:
        return reference.softmax(x)
    return _softmax_op(x) if torch.compiler.is_compiling() else SoftmaxFunction.apply(x)
