"""The kernels behind ``swiglu`` and ``geglu``: ``out = d * act(g * gate) * up``.

g and d are constants, 1 by default.

Backward: ``dup = dout * d * act(g * gate)`` and ``dgate = dout * d * up * g * act'(g * gate)``, in one kernel.
Saved: gate and up. Moved: gate, up and out forward; dout, gate, up and both gradients backward.
All arithmetic is fp32; results are rounded once. The tanh form of gelu is computed as ``g * sigmoid(2 u)``: the same
function, without the cancellation in ``1 + tanh(u)`` for negative u.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..runtime.autograd import Function, differentiate
from ..runtime.checks import check_rows, check_same_shape, dense_like, row_layout
from ..runtime.launch import cdiv, launcher, next_power_of_2, sm_count, tl, triton
from ..runtime.operators import opaque_op

SILU, GELU_TANH, GELU_ERF = 0, 1, 2
ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH, "gelu": GELU_ERF}
DEFINITIONS = {
    SILU: reference.swiglu,
    GELU_TANH: partial(reference.geglu, approximate="tanh"),
    GELU_ERF: partial(reference.geglu, approximate="none"),
}


class Gating(NamedTuple):
    """``down_multiplier * act(gate_multiplier * gate) * up``."""

    activation: int
    gate_multiplier: float = 1.0
    down_multiplier: float = 1.0

    def define(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """The same in plain PyTorch."""
        multipliers = {"gate_multiplier": self.gate_multiplier, "down_multiplier": self.down_multiplier}
        return DEFINITIONS[self.activation](gate, up, **multipliers)


BLOCK_SIZE = 2048
# Forward: with up to this many blocks per SM, blocks of half the size are faster.
SMALL_GRID = 4


@triton.jit
def _sigmoid_and_complement(z):
    """``sigmoid(z)`` and ``1 - sigmoid(z)``, each to full precision in both tails, from one exponential."""
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z >= 0.0, larger, smaller), tl.where(z >= 0.0, smaller, larger)


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """``act(g)`` and its derivative; the compiler removes the one that the caller does not use."""
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
def _load(ptr, cols, num_cols, MASKED: tl.constexpr):
    # Full blocks need no mask. With an odd num_cols, a mask would prevent vectorised access.
    values = tl.load(ptr + cols, mask=cols < num_cols, other=0.0) if MASKED else tl.load(ptr + cols)
    return values.to(tl.float32)


@triton.jit
def _store(ptr, cols, num_cols, values, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + cols, values.to(ptr.dtype.element_ty), mask=cols < num_cols)
    else:
        tl.store(ptr + cols, values.to(ptr.dtype.element_ty))


@triton.jit
def _gated_fwd_block(
    gate_ptr, up_ptr, out_ptr, cols, num_cols, gate_multiplier, down_multiplier, ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    gate = _load(gate_ptr, cols, num_cols, MASKED) * gate_multiplier
    up = _load(up_ptr, cols, num_cols, MASKED)
    value, _ = _activation(gate, ACTIVATION)
    _store(out_ptr, cols, num_cols, value * down_multiplier * up, MASKED)


@triton.jit
def _gated_fwd_kernel(
    gate_ptr,  # [num_rows, num_cols]
    up_ptr,  # [num_rows, num_cols]
    out_ptr,  # [num_rows, num_cols]
    gate_row_stride,
    up_row_stride,
    out_row_stride,
    num_cols,
    col_blocks,
    gate_multiplier: float,
    down_multiplier: float,
    ACTIVATION: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    start = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS
    cols = start + tl.arange(0, BLOCK_COLS)
    gate_ptr += row * gate_row_stride
    up_ptr += row * up_row_stride
    out_ptr += row * out_row_stride
    if start + BLOCK_COLS <= num_cols:
        _gated_fwd_block(gate_ptr, up_ptr, out_ptr, cols, num_cols, gate_multiplier, down_multiplier, ACTIVATION, False)
    else:
        _gated_fwd_block(gate_ptr, up_ptr, out_ptr, cols, num_cols, gate_multiplier, down_multiplier, ACTIVATION, True)


@triton.jit
def _gated_bwd_block(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, cols, num_cols, gate_multiplier, down_multiplier,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    dout = _load(dout_ptr, cols, num_cols, MASKED)
    gate = _load(gate_ptr, cols, num_cols, MASKED) * gate_multiplier
    value, slope = _activation(gate, ACTIVATION)
    value *= down_multiplier
    slope *= down_multiplier * gate_multiplier
    if dgate_ptr is not None or out_ptr is not None:
        up = _load(up_ptr, cols, num_cols, MASKED)
    if out_ptr is not None:
        _store(out_ptr, cols, num_cols, value * up, MASKED)
    if dgate_ptr is not None:
        _store(dgate_ptr, cols, num_cols, dout * up * slope, MASKED)
    if dup_ptr is not None:
        _store(dup_ptr, cols, num_cols, dout * value, MASKED)


@triton.jit
def _gated_bwd_kernel(
    dout_ptr,  # [num_rows, num_cols]
    gate_ptr,  # [num_rows, num_cols]
    up_ptr,  # [num_rows, num_cols]
    dgate_ptr,  # [num_rows, num_cols], or None
    dup_ptr,  # [num_rows, num_cols], or None
    out_ptr,  # [num_rows, num_cols], or None: the forward's result, recomputed
    dout_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    out_row_stride,
    num_cols,
    col_blocks,
    gate_multiplier: float,
    down_multiplier: float,
    ACTIVATION: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    start = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_COLS
    cols = start + tl.arange(0, BLOCK_COLS)
    dout_ptr += row * dout_row_stride
    gate_ptr += row * gate_row_stride
    up_ptr += row * up_row_stride
    if dgate_ptr is not None:
        dgate_ptr += row * dgate_row_stride
    if dup_ptr is not None:
        dup_ptr += row * dup_row_stride
    if out_ptr is not None:
        out_ptr += row * out_row_stride
    if start + BLOCK_COLS <= num_cols:
        _gated_bwd_block(
            dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, cols, num_cols, gate_multiplier, down_multiplier,
            ACTIVATION, False,
        )  # fmt: skip
    else:
        _gated_bwd_block(
            dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, cols, num_cols, gate_multiplier, down_multiplier,
            ACTIVATION, True,
        )  # fmt: skip


_launch_fwd = launcher(_gated_fwd_kernel)
_launch_bwd = launcher(_gated_bwd_kernel)


def _shared_layout(*tensors: Tensor | None) -> tuple[int, int, list[Tensor | None], list[int]]:
    """Rows, columns, the tensors and their row strides; a single row if all tensors are contiguous.

    A single row gets stride 0. Triton treats 0 as aligned and uses 16-byte accesses; an odd stride would prevent them.
    """
    present = [t for t in tensors if t is not None]
    numel = present[0].numel()
    if all(t.is_contiguous() for t in present):
        return 1, numel, list(tensors), [0] * len(tensors)
    num_cols = present[0].shape[-1]
    layouts = [(None, 0) if t is None else row_layout(t) for t in tensors]
    return numel // num_cols, num_cols, [t for t, _ in layouts], [stride for _, stride in layouts]


def gated_fwd(gate: Tensor, up: Tensor, gating: Gating) -> Tensor:
    """The result for ``gate`` and ``up`` of the same shape, in the dtype they promote to."""
    dtype = gate.dtype if gate.dtype == up.dtype else torch.promote_types(gate.dtype, up.dtype)
    out = dense_like(gate, dtype)
    if out.numel():
        num_rows, num_cols, tensors, strides = _shared_layout(gate, up, out)
        gate_rows, up_rows, out_rows = tensors
        gate_stride, up_stride, out_stride = strides
        block = BLOCK_SIZE if out.numel() > SMALL_GRID * BLOCK_SIZE * sm_count(out) else BLOCK_SIZE // 2
        block = min(block, next_power_of_2(num_cols))
        col_blocks = cdiv(num_cols, block)
        _launch_fwd(
            (num_rows * col_blocks, 1, 1),
            (("num_warps", 4),),
            gate_ptr=gate_rows,
            up_ptr=up_rows,
            out_ptr=out_rows,
            gate_row_stride=gate_stride,
            up_row_stride=up_stride,
            out_row_stride=out_stride,
            num_cols=num_cols,
            col_blocks=col_blocks,
            gate_multiplier=gating.gate_multiplier,
            down_multiplier=gating.down_multiplier,
            ACTIVATION=gating.activation,
            BLOCK_COLS=block,
        )
    return out


def gated_bwd(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor | None,
    dup: Tensor | None,
    gating: Gating,
    out: Tensor | None = None,
) -> None:
    """Fill ``dgate``, ``dup`` and ``out`` (the forward's result, recomputed), each unless None.

    The three must be viewable as rows. ``dup`` or ``out`` may be ``dout`` itself.
    """
    if dout.numel() == 0:
        return
    num_rows, num_cols, tensors, strides = _shared_layout(dout, gate, up, dgate, dup, out)
    dout_rows, gate_rows, up_rows, dgate_rows, dup_rows, out_rows = tensors
    dout_stride, gate_stride, up_stride, dgate_stride, dup_stride, out_stride = strides
    block = min(BLOCK_SIZE, next_power_of_2(num_cols))
    col_blocks = cdiv(num_cols, block)
    _launch_bwd(
        (num_rows * col_blocks, 1, 1),
        (("num_warps", 8),),
        dout_ptr=dout_rows,
        gate_ptr=gate_rows,
        up_ptr=up_rows,
        dgate_ptr=dgate_rows,
        dup_ptr=dup_rows,
        out_ptr=out_rows,
        dout_row_stride=dout_stride,
        gate_row_stride=gate_stride,
        up_row_stride=up_stride,
        dgate_row_stride=dgate_stride,
        dup_row_stride=dup_stride,
        out_row_stride=out_stride,
        num_cols=num_cols,
        col_blocks=col_blocks,
        gate_multiplier=gating.gate_multiplier,
        down_multiplier=gating.down_multiplier,
        ACTIVATION=gating.activation,
        BLOCK_COLS=block,
    )


def gated_grads(
    dout: Tensor, gate: Tensor, up: Tensor | None, gating: Gating, needs_dgate: bool, needs_dup: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``gate`` and ``up`` where needed; one packed gradient if ``gate`` holds both halves."""
    if up is None:
        dpacked = dense_like(gate)
        (gate, up), (dgate, dup) = gate.chunk(2, dim=-1), dpacked.chunk(2, dim=-1)
        gated_bwd(dout, gate, up, dgate, dup, gating)
        return dpacked, None
    dgate = dense_like(gate) if needs_dgate else None
    dup = dense_like(up) if needs_dup else None
    gated_bwd(dout, gate, up, dgate, dup, gating)
    return dgate, dup


def _activate(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return gated_fwd(gate, up, gating)


class GatedFunction(Function):
    """The gated activation; if ``up`` is None, ``gate`` holds both halves."""

    @staticmethod
    def definition(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
        """The same in plain PyTorch."""
        return gating.define(gate, up)

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
        """Save the inputs only."""
        ctx.save_for_backward(gate, up)
        ctx.gating = gating
        return _activate(gate, up, gating)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Compute only the gradients that are needed."""
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(GatedFunction.definition, (gate, up, ctx.gating), (dout,))
        needs_dgate, needs_dup, _ = ctx.needs_input_grad
        return *gated_grads(dout, gate, up, ctx.gating, needs_dgate, needs_dup), None


def _fwd(gate: Tensor, up: Tensor | None, activation: int, gate_multiplier: float, down_multiplier: float) -> Tensor:
    return _activate(gate, up, Gating(activation, gate_multiplier, down_multiplier))


def _bwd(
    dout: Tensor, gate: Tensor, up: Tensor | None, activation: int, gate_multiplier: float, down_multiplier: float,
    needs_dgate: bool, needs_dup: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    gating = Gating(activation, gate_multiplier, down_multiplier)
    return gated_grads(dout, gate, up, gating, needs_dgate, needs_dup)


def _fake_fwd(gate: Tensor, up: Tensor | None, *gating: float) -> Tensor:
    if up is None:
        return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // 2)
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _fake_bwd(
    dout: Tensor, gate: Tensor, up: Tensor | None, activation: int, gate_multiplier: float, down_multiplier: float,
    needs_dgate: bool, needs_dup: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    dup = up.new_empty(up.shape) if needs_dup and up is not None else None
    return gate.new_empty(gate.shape) if needs_dgate else None, dup


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, *ctx.gating = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return _gated_bwd_op(dout, *ctx.saved_tensors, *ctx.gating, *ctx.needs_input_grad[:2])


_gated_bwd_op = opaque_op("gated_bwd", _bwd, _fake_bwd)
_gated_op = opaque_op("gated", _fwd, _fake_fwd, _differentiate, _save)


def apply_gated(gate: Tensor, up: Tensor | None, gating: Gating) -> Tensor:
    """The gated activation; if ``up`` is None, ``gate`` holds both halves. The arguments must have been checked."""
    if torch.compiler.is_compiling():
        return _gated_op(gate, up, gating.activation, float(gating.gate_multiplier), float(gating.down_multiplier))
    return GatedFunction.apply(gate, up, gating)


def check_gated(gate: Tensor, up: Tensor | None) -> None:
    """Raise unless ``gate`` and ``up`` are floating-point and equal in shape, or ``gate`` alone has two halves."""
    check_rows("gate", gate)
    if up is not None:
        check_same_shape("up", up, "gate", gate)
    elif gate.shape[-1] % 2:
        raise ValueError(f"gate: got shape {tuple(gate.shape)}; must be [..., 2 * I] without up: gate, then up")
