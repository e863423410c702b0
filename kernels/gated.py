"""The kernels behind ``swiglu`` and ``geglu``: ``out = act(gate) * up``.

Backward: ``dup = dout * act(gate)`` and ``dgate = dout * up * act'(gate)``, in one kernel.
Saved: gate and up. Moved: gate, up and out forward; dout, gate, up and both gradients backward.
All arithmetic is fp32 and rounded once. gelu's tanh form is computed as ``g * sigmoid(2 u)``, the same function without
the cancellation of ``1 + tanh(u)`` for negative u.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import as_rows, check_rows, check_same_shape
from .launch import cdiv, next_power_of_2, on_device, tl, triton

SILU, GELU_TANH, GELU_ERF = 0, 1, 2
BLOCK_SIZE = 2048


@triton.jit
def _sigmoid_and_complement(z):
    """``sigmoid(z)`` and ``1 - sigmoid(z)``, each to full precision in both tails, from one exponential."""
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z >= 0.0, larger, smaller), tl.where(z >= 0.0, smaller, larger)


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """``act(g)`` and its derivative, of which the compiler drops what the caller does not use."""
    if ACTIVATION == 0:
        s, rest = _sigmoid_and_complement(g)
        value = g * s
        slope = s + value * rest
    elif ACTIVATION == 1:
        # u = sqrt(2 / pi) * (g + 0.044715 g^3)
        s, rest = _sigmoid_and_complement(1.5957691216057308 * g * (1.0 + 0.044715 * g * g))
        value = g * s
        slope = s + value * rest * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        cdf = 0.5 * (1.0 + tl.math.erf(g * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        value = g * cdf
        slope = cdf + g * pdf
    return value, slope


@triton.jit
def _gated_fwd_kernel(
    gate_ptr,  # [num_rows, num_cols]
    up_ptr,  # [num_rows, num_cols]
    out_ptr,  # [num_rows, num_cols], contiguous
    gate_row_stride,
    up_row_stride,
    num_cols,
    col_blocks,
    ACTIVATION: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    cols = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    gate = tl.load(gate_ptr + row * gate_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(gate, ACTIVATION)
    tl.store(out_ptr + row * num_cols + cols, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_bwd_kernel(
    dout_ptr,  # [num_rows, num_cols]
    gate_ptr,  # [num_rows, num_cols]
    up_ptr,  # [num_rows, num_cols]
    dgate_ptr,  # [num_rows, num_cols]
    dup_ptr,  # [num_rows, num_cols]
    dout_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    num_cols,
    col_blocks,
    ACTIVATION: tl.constexpr,
    NEEDS_DGATE: tl.constexpr,
    NEEDS_DUP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    cols = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < num_cols
    dout = tl.load(dout_ptr + row * dout_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(gate, ACTIVATION)
    if NEEDS_DGATE:
        up = tl.load(up_ptr + row * up_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
        dgate = dout * up * slope
        tl.store(dgate_ptr + row * dgate_row_stride + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DUP:
        dup = dout * value
        tl.store(dup_ptr + row * dup_row_stride + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _as_matrices(*tensors: Tensor) -> list[Tensor]:
    """The tensors as ``[num_rows, num_cols]``; as one long row where all are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [as_rows(t) for t in tensors]


def gated_fwd(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """``act(gate) * up`` for ``gate`` and ``up`` of one shape, in the dtype they promote to."""
    out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if out.numel() == 0:
        return out
    gate, up = _as_matrices(gate, up)
    num_rows, num_cols = gate.shape
    block = min(BLOCK_SIZE, next_power_of_2(num_cols))
    col_blocks = cdiv(num_cols, block)
    with on_device(gate):
        _gated_fwd_kernel[(num_rows * col_blocks,)](
            gate_ptr=gate,
            up_ptr=up,
            out_ptr=out,
            gate_row_stride=gate.stride(0),
            up_row_stride=up.stride(0),
            num_cols=num_cols,
            col_blocks=col_blocks,
            ACTIVATION=activation,
            BLOCK_COLS=block,
            num_warps=4,
        )
    return out


def gated_bwd(
    dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None, activation: int
) -> None:
    """Fill ``dgate`` and ``dup``, each unless None; they are viewable as rows."""
    if dout.numel() == 0:
        return
    written = [t for t in (dgate, dup) if t is not None]
    dout, gate, up, *written = _as_matrices(dout, gate, up, *written)
    dgate = None if dgate is None else written[0]
    dup = None if dup is None else written[-1]
    num_rows, num_cols = gate.shape
    block = min(BLOCK_SIZE, next_power_of_2(num_cols))
    col_blocks = cdiv(num_cols, block)
    with on_device(gate):
        _gated_bwd_kernel[(num_rows * col_blocks,)](
            dout_ptr=dout,
            gate_ptr=gate,
            up_ptr=up,
            dgate_ptr=dgate,
            dup_ptr=dup,
            dout_row_stride=dout.stride(0),
            gate_row_stride=gate.stride(0),
            up_row_stride=up.stride(0),
            dgate_row_stride=0 if dgate is None else dgate.stride(0),
            dup_row_stride=0 if dup is None else dup.stride(0),
            num_cols=num_cols,
            col_blocks=col_blocks,
            ACTIVATION=activation,
            NEEDS_DGATE=dgate is not None,
            NEEDS_DUP=dup is not None,
            BLOCK_COLS=block,
            num_warps=8,
        )


class GatedFunction(torch.autograd.Function):
    """``act(gate) * up`` for two tensors, or for one that holds both halves (``up`` is None)."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        """Save the inputs only."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_fwd(*(gate.chunk(2, dim=-1) if up is None else (gate, up)), activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        """Fill one packed gradient, or those of gate and up that are needed."""
        gate, up = ctx.saved_tensors
        if up is None:
            dpacked = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
            gated_bwd(dout, *gate.chunk(2, dim=-1), *dpacked.chunk(2, dim=-1), ctx.activation)
            return dpacked, None, None
        dgate, dup = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
            for t, needed in zip((gate, up), ctx.needs_input_grad[:2], strict=True)
        )
        gated_bwd(dout, gate, up, dgate, dup, ctx.activation)
        return dgate, dup, None


def check_gated(gate: Tensor, up: Tensor | None) -> None:
    """Raise unless ``gate`` and ``up`` are floating-point and of one shape, or ``gate`` alone has two equal halves."""
    check_rows("gate", gate)
    if up is not None:
        check_same_shape("up", up, "gate", gate)
    elif gate.shape[-1] % 2:
        raise ValueError(
            f"gate: shape is {tuple(gate.shape)}; without up, the last dimension must be even (gate, then up)"
        )
