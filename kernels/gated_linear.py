"""``F.linear(act(gate) * up, weight, bias)`` that does not keep ``act(gate) * up`` for backward.

Forward: the gated kernel, then one GEMM. Saved: gate, up and the weight. A plain gated MLP also saves the product, a
third of its activations. Backward: ``dh = dout @ weight``; one kernel reads dh, gate and up, writes both gradients and
recomputes ``h = act(gate) * up``; then ``dweight = dout^T h``. Compared with saving h, this costs one more write of h
and no more reads. To save memory, dup overwrites dh, and a large h is computed in column parts, each stored in the
columns of dgate that are filled last. For the last part, gate and up are read twice.

Activation checkpointing runs the forward again only to recover saved tensors, and torch stops it at the last one. torch
collects the tensors of a Function when its forward ends, so a single node would first run a GEMM whose result nobody
needs: 27 % of the second forward of a Llama 3 8B layer. There the op is therefore two nodes: the first saves and
computes nothing, the second computes and saves nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime.autograd import Function, are_saved_tensors_hooked, differentiate
from .runtime.launch import cdiv, use_triton
from .runtime.operators import opaque_op
from .shared.gated import ACTIVATIONS, Gating, check_gated, gated_bwd, gated_fwd

# From this size on, h is computed in parts that share dgate's memory. For a smaller h the extra launches cost too much.
PARTED_BYTES = 256 * 2**20
# With more parts, fewer columns of gate and up are read twice, but the GEMMs are smaller (benchmarks/NOTES.md).
PARTS, PART_ALIGNMENT = 4, 256


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return gate, up


def _compute(out: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, gating: Gating) -> None:
    """Fill ``out`` ``[..., H]``, contiguous."""
    hidden = gated_fwd(*_halves(gate, up), gating)
    rows, weight = hidden.view(-1, hidden.shape[-1]), weight.to(hidden.dtype)
    if bias is None:
        torch.mm(rows, weight.t(), out=out.view(-1, out.shape[-1]))
    else:
        torch.addmm(bias.to(hidden.dtype), rows, weight.t(), out=out.view(-1, out.shape[-1]))


def _backward_by_parts(
    rows: Tensor, dhidden: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, gating: Gating
) -> Tensor:
    """Fill ``dgate``, overwrite ``dhidden`` with dup, and return dweight ``[H, I]`` in the dtype of ``rows``."""
    width = gate.shape[-1]
    part = min(cdiv(cdiv(width, PARTS), PART_ALIGNMENT) * PART_ALIGNMENT, width)
    tail = width - part
    dweight = rows.new_empty(rows.shape[1], width)

    def add(span: slice, hidden: Tensor) -> None:
        torch.mm(rows.t(), hidden.reshape(-1, hidden.shape[-1]), out=dweight[:, span])

    for start in range(0, tail, part):
        span = slice(start, min(start + part, tail))
        cut = dhidden[..., span]
        hidden = dgate[..., tail : tail + cut.shape[-1]]
        gated_bwd(cut, gate[..., span], up[..., span], dgate[..., span], cut, gating, hidden)
        add(span, hidden)
    # The last part's h lies where its dgate belongs: use h first, then read gate and up again for dgate.
    last = slice(tail, width)
    cut, own = dhidden[..., last], dgate[..., last]
    gated_bwd(cut, gate[..., last], up[..., last], None, None, gating, own)
    add(last, own)
    gated_bwd(cut, gate[..., last], up[..., last], own, cut, gating)
    return dweight


def _product(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``a @ b`` as ``shape``, in ``a``'s dtype: with ``out=``, autocast has no effect even if it is on in backward."""
    out = a.new_empty(shape)
    torch.mm(a, b, out=out.view(-1, shape[-1]))
    return out


def gated_linear_bwd(
    dout: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, gating: Gating, needs_gate: bool, needs_up: bool,
    needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``(dgate, dup, dweight, dbias)``; ``h`` is recomputed only if the weight needs its gradient."""
    rows = dout.reshape(-1, dout.shape[-1])
    first, second = _halves(gate, up)
    dgate = dup = dweight = hidden = None
    if not (needs_gate or needs_up):
        hidden = gated_fwd(first, second, gating).to(rows.dtype) if needs_weight else None
    elif up is None:
        dhidden = _product(rows, weight.to(rows.dtype), first.shape)
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        hidden = dhidden if needs_weight else None
        dfirst, dsecond = dgate.chunk(2, dim=-1)
        gated_bwd(dhidden, first, second, dfirst, dsecond, gating, hidden)
    else:
        dhidden = _product(rows, weight.to(rows.dtype), first.shape)
        dgate = torch.empty_like(dhidden) if needs_gate else None
        dup = dhidden if needs_up else None
        if dgate is not None and needs_up and needs_weight and dhidden.nbytes >= PARTED_BYTES:
            dweight = _backward_by_parts(rows, dhidden, gate, up, dgate, gating)
        else:
            hidden = torch.empty_like(dhidden) if needs_weight else None
            gated_bwd(dhidden, gate, up, dgate, dup, gating, hidden)
    if hidden is not None:
        dweight = _product(rows.t(), hidden.view(-1, first.shape[-1]), (rows.shape[1], first.shape[-1]))
    dweight = None if dweight is None else dweight.to(weight.dtype)
    dbias = rows.sum(0, dtype=torch.float32).to(weight.dtype) if needs_bias else None
    return dgate, dup, dweight, dbias


class _SaveInputs(Function):
    """The node that saves: it returns uninitialised memory for the result and runs the backward of the whole op."""

    @staticmethod
    def definition(gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, gating: Gating) -> Tensor:
        """The whole op in plain PyTorch, whose GEMM runs in ``gate``'s dtype."""
        hidden = gating.define(gate, up)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, gating: Gating
    ) -> Tensor:
        """Save the inputs, which are in memory anyway; compute nothing."""
        ctx.save_for_backward(gate, up, weight)
        ctx.gating = gating
        return gate.new_empty((*gate.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Compute only the gradients that are needed."""
        gate, up, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Any bias will do: its gradient does not depend on its values.
            bias = weight.new_zeros(weight.shape[0], requires_grad=True) if ctx.needs_input_grad[3] else None
            return differentiate(_SaveInputs.definition, (gate, up, weight, bias, ctx.gating), (dout,))
        return *gated_linear_bwd(dout, gate, up, weight, ctx.gating, *ctx.needs_input_grad[:4]), None


class GatedLinearFunction(_SaveInputs):
    """``gated_linear``; all arguments are positional."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, gating: Gating
    ) -> Tensor:
        """Save and compute."""
        out = _SaveInputs.forward(ctx, gate, up, weight, bias, gating)
        _compute(out, gate, up, weight, bias, gating)
        return out


class _FillResult(Function):
    """The node that computes: it fills the memory it is given and passes the gradient on unchanged."""

    @staticmethod
    def definition(out: Tensor, *inputs: Any) -> Tensor:
        """``out``, which ``_SaveInputs.definition`` has computed."""
        return out

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Any) -> Tensor:
        """Fill ``out``."""
        _compute(out, *inputs)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Return ``dout`` as the gradient of ``out``."""
        return dout, None, None, None, None, None


def _fwd(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: int, gate_multiplier: float,
    down_multiplier: float,
) -> Tensor:  # fmt: skip
    out = _fake_fwd(gate, up, weight)
    _compute(out, gate, up, weight, bias, Gating(activation, gate_multiplier, down_multiplier))
    return out


def _bwd(
    dout: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, activation: int, gate_multiplier: float,
    down_multiplier: float, needs_gate: bool, needs_up: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    gating = Gating(activation, gate_multiplier, down_multiplier)
    return gated_linear_bwd(dout, gate, up, weight, gating, needs_gate, needs_up, needs_weight, needs_bias)


def _fake_fwd(gate: Tensor, up: Tensor | None, weight: Tensor, *_: Any) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], weight.shape[0]))


def _fake_bwd(
    dout: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, activation: int, gate_multiplier: float,
    down_multiplier: float, needs_gate: bool, needs_up: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return (
        gate.new_empty(gate.shape) if needs_gate else None,
        gate.new_empty(gate.shape) if needs_up and up is not None else None,
        weight.new_empty(weight.shape) if needs_weight else None,
        weight.new_empty(weight.shape[:1]) if needs_bias else None,
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, weight, _, *ctx.gating = inputs
    ctx.save_for_backward(gate, up, weight)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return _gated_linear_bwd_op(dout, *ctx.saved_tensors, *ctx.gating, *ctx.needs_input_grad[:4])


_gated_linear_bwd_op = opaque_op("gated_linear_bwd", _bwd, _fake_bwd)
_gated_linear_op = opaque_op("gated_linear", _fwd, _fake_fwd, _differentiate, _save)


def gated_linear(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, activation: str = "silu",
    gate_multiplier: float = 1.0, down_multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """``F.linear(down_multiplier * act(gate_multiplier * gate) * up, weight, bias)``, whose product is not kept.

    Args:
        gate: ``[..., I]``, fp16, bf16, fp32 or fp64. Without ``up``, ``[..., 2 * I]``: gate, then up.
        up: like ``gate`` in shape and dtype, or None.
        weight: ``[H, I]`` in ``gate``'s dtype; in any dtype under autocast, where the GEMMs run in ``gate``'s.
        bias: ``[H]`` in ``weight``'s dtype, or None.
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"gelu"`` (exact).
        gate_multiplier, down_multiplier: constants. In Falcon-H1 the second one follows the projection, which has no
            bias there: that is the same.

    Returns:
        ``[..., H]`` in ``gate``'s dtype. Where Triton does not run, the definition computes it and keeps the product.

    Raises:
        TypeError: ``gate`` or ``up`` is not floating-point.
        ValueError: shapes, dtypes or devices do not fit together; ``activation`` is unknown.
    """
    check_gated(gate, up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; must be one of {', '.join(map(repr, ACTIVATIONS))}")
    width = gate.shape[-1] // (2 if up is None else 1)
    if weight.dim() != 2 or weight.shape[1] != width or weight.device != gate.device:
        expected = f"[H, {width}] on {gate.device}"
        raise ValueError(f"weight: got {tuple(weight.shape)} on {weight.device}; must be {expected}")
    autocast = torch.is_autocast_enabled(gate.device.type)
    if (not autocast and weight.dtype != gate.dtype) or (up is not None and up.dtype != gate.dtype):
        raise ValueError(
            f"weight, up: got dtypes {weight.dtype}, {None if up is None else up.dtype}; must be gate.dtype = "
            f"{gate.dtype} (weight: any under autocast)"
        )
    gating = Gating(ACTIVATIONS[activation], float(gate_multiplier), float(down_multiplier))
    if not use_triton(gate, up, weight, bias) or gate.dtype == torch.float64:
        return F.linear(gating.define(gate, up), weight, bias)
    inputs = (gate, up, weight, bias)
    if torch.compiler.is_compiling():
        return _gated_linear_op(*inputs, *gating)
    if not are_saved_tensors_hooked() or not torch.is_grad_enabled():
        return GatedLinearFunction.apply(*inputs, gating)
    out = _SaveInputs.apply(*inputs, gating)
    return _FillResult.apply(out, *(None if t is None else t.detach() for t in inputs), gating)
