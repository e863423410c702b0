"""Linear layers with low-rank adapters (LoRA, arXiv 2106.09685) that share their input.

``y_i = x W_i^T + bias_i + scale_i * (x A_i^T) B_i^T``; ``W_i`` is ``[O_i, H]``, ``A_i`` ``[r_i, H]``, ``B_i``
``[O_i, r_i]``.

Forward: one narrow GEMM gives ``u = x A^T`` for all A stacked. The ``u_i B_i^T`` are added to the base products.
Saved: x once, u, and the weights. Backward: ``du_i = scale_i * dy_i B_i`` and ``dB_i = scale_i * dy_i^T u_i``;
then ``dA = du^T x`` and ``dx = sum_i dy_i W_i + du A`` for all projections together, dx in one buffer. Nothing of the
size of x or y is written besides y and dx. Products accumulate in fp32.

All of it runs in x's dtype, unless A or B is wider and autocast is off: then u, du, dA and dB, which are products with
A and B alone, are computed in their dtype. A projection whose output is not used gets no gradients.

Memory traffic beyond the base GEMMs: x and y read, y written; dy read twice, x read, dx read and written.

``x`` may also be a gated activation, ``act(gate) * up``, the input of a gated MLP's down projection. It is then not
saved: backward recomputes it from gate and up, in the kernel that computes their gradients.

Under activation checkpointing the op is two nodes, as in ``gated_linear``: the second forward stops before the GEMMs.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import reference
from .runtime.autograd import Function, are_saved_tensors_hooked, differentiate
from .runtime.checks import as_rows, check_device, check_rows
from .runtime.launch import use_triton
from .shared.gated import ACTIVATIONS, Gating, check_gated, gated_bwd, gated_fwd
from .shared.low_rank import narrow, tall, update

FIELDS = 5  # tensors of a projection: base, weight, bias, a, b


class Dequantised(Protocol):
    """A quantised weight: ``to`` gives its values, which backward asks for again."""

    shape: torch.Size
    device: torch.device

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[O, H]`` in ``dtype``."""
        ...


class Projection(NamedTuple):
    """A linear layer with an adapter.

    Args:
        a: ``[r, H]``.
        b: ``[O, r]``.
        scale: multiplies the adapter's product.
        weight: ``[O, H]``, a tensor or ``Dequantised``; None without a base product.
        bias: ``[O]``, or None.
        base: ``[..., O]``, to which the rest is added, or None.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    weight: Tensor | Dequantised | None = None
    bias: Tensor | None = None
    base: Tensor | None = None


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in ``a``'s dtype: with ``out=``, autocast has no effect even if it is on in backward."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """All A, one below the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


def _fields(tensors: Sequence[Any]) -> list[tuple]:
    return [tuple(tensors[i : i + FIELDS]) for i in range(0, len(tensors), FIELDS)]


def _compute(outs: Sequence[Any], x: Tensor, u: Tensor, scales: Sequence[float], tensors: Sequence[Any]) -> None:
    """Fill ``outs``, contiguous."""
    rows, start = as_rows(x), 0
    for out, scale, (base, weight, bias, a, b) in zip(outs, scales, _fields(tensors), strict=True):
        out = out.view(-1, out.shape[-1])
        own = u[:, start : start + a.shape[0]]
        start += a.shape[0]
        source = out
        if weight is not None:
            weight = weight.to(x.dtype).t()
            torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias.to(x.dtype), rows, weight, out=out)
        elif base is not None:
            source = as_rows(base)
        else:
            out.zero_()
        update(source, own.to(x.dtype), b.t(), scale, out)
        if weight is None and bias is not None:
            out.add_(bias.to(x.dtype))


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    first, second = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return first, second


class _Save(Function):
    """The node that saves: it returns u and uninitialised memory for the results, and runs the backward of the op.

    Its arguments are x, or gate and up with their gating, the scales, and ``FIELDS`` tensors for each projection.
    """

    @staticmethod
    def definition(
        x: Tensor, up: Tensor | None, gating: Gating | None, scales: Sequence[float], *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        """The whole op in plain PyTorch, without u and x."""
        with torch.autocast(x.device.type, enabled=False):
            x = x if gating is None else gating.define(x, up)
            outs = [
                reference.lora_linear(x, a, b, s, weight, bias, base)
                for s, (base, weight, bias, a, b) in zip(scales, _fields(tensors), strict=True)
            ]
        return None, None, *outs

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor | None, gating: Gating | None, scales: Sequence[float], *tensors: Any
    ) -> tuple[Any, ...]:
        """Save what backward needs; of the products, compute u alone. A gated x is an output: it is not saved."""
        fields = _fields(tensors)
        hidden = x if gating is None else gated_fwd(*_halves(x, up), gating)
        stacked = _stacked([a for *_, a, _ in fields])
        u = narrow(as_rows(hidden).to(stacked.dtype), stacked)
        ctx.set_materialize_grads(False)  # u and unused results would get zeros
        ctx.gating, ctx.scales = gating, scales
        ctx.has_base = [base is not None for base, *_ in fields]
        ctx.quantised = [None if torch.is_tensor(weight) else weight for _, weight, *_ in fields]
        kept = [(weight if torch.is_tensor(weight) else None, a, b) for _, weight, _, a, b in fields]
        ctx.save_for_backward(x, up, u, *(t for each in kept for t in each))
        ctx.mark_non_differentiable(*((u,) if gating is None else (u, hidden)))
        outs = (x.new_empty(*x.shape[:-1], b.shape[0]) for *_, b in fields)
        return u, None if gating is None else hidden, *outs

    @staticmethod
    def backward(ctx: Any, _: Any, __: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute only the gradients that are needed."""
        x, up, u, *saved = ctx.saved_tensors
        weights = [saved[i : i + 3] for i in range(0, len(saved), 3)]
        for each, quantised in zip(weights, ctx.quantised, strict=True):
            each[0] = each[0] if quantised is None else quantised
        needs_x, needs_up, _, _, *needs = ctx.needs_input_grad
        needed, used = _fields(needs), [grad is not None for grad in grads]
        if not any(used):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            # Any base and bias will do: the gradients do not depend on their values.
            tensors: list[Any] = []
            for dout, (weight, a, b), need, has_base in zip(grads, weights, needed, ctx.has_base, strict=True):
                base = None if dout is None or not has_base else torch.zeros_like(dout, requires_grad=need[0])
                bias = b.new_zeros(b.shape[0], requires_grad=True) if need[2] else None
                tensors += [base, weight, bias, a, b]
            return differentiate(_Save.definition, (x, up, ctx.gating, ctx.scales, *tensors), (None, None, *grads))
        if not all(used):
            parts = u.split([a.shape[0] for _, a, _ in weights], 1)
            u = torch.cat([*itertools.compress(parts, used)], 1)
        of_used: Iterator[Any] = ([*itertools.compress(rows, used)] for rows in (ctx.scales, weights, grads, needed))
        dx, dup, gradients = _backward(x, up, ctx.gating, u, needs_x or needs_up, *of_used)
        found = iter(gradients)
        rows = (next(found) if is_used else (None,) * FIELDS for is_used in used)
        return dx, dup, None, None, *itertools.chain.from_iterable(rows)


def _backward(
    x: Tensor, up: Tensor | None, gating: Gating | None, u: Tensor, needs_x: bool, scales: Sequence[float],
    weights: Sequence[Sequence[Any]], douts: Sequence[Tensor], needed: Sequence[tuple],
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:  # fmt: skip
    """The gradients of x and up, and those of the fields of each projection."""
    needs_a, needs_weight = any(need[3] for need in needed), any(need[1] for need in needed)
    du = torch.empty_like(u) if needs_x or needs_a else None
    width = x.shape[-1] // (2 if gating is not None and up is None else 1)
    dx = x.new_empty(u.shape[0], width) if needs_x else None
    is_filled, start = False, 0
    gradients: list[list[Tensor | None]] = []
    for dout, scale, (weight, a, b), need in zip(douts, scales, weights, needed, strict=True):
        dy, span = as_rows(dout), slice(start, start + a.shape[0])
        wide = dy.to(u.dtype)
        start += a.shape[0]
        if du is not None:
            narrow(wide, b.t(), scale, du[:, span])
        if dx is not None and weight is not None:
            weight = weight.to(x.dtype)
            torch.addmm(dx, dy, weight, out=dx) if is_filled else torch.mm(dy, weight, out=dx)
            is_filled = True
        dbias = dy.sum(0, dtype=torch.float32 if x.dtype.itemsize < 4 else None) if need[2] else None
        db = tall(u[:, span], wide, scale, transposed=True) if need[4] else None
        gradients.append([dout if need[0] else None, None, dbias, None, db])
    if dx is not None and du is not None:
        dx = dx if is_filled else dx.zero_()
        update(dx, du.to(x.dtype), _stacked([a for _, a, _ in weights]), 1.0, dx)
    dgate, dup, rows = dx, None, x
    if gating is not None:
        dgate, dup, rows = _gate_gradients(x, up, gating, dx, needs_a or needs_weight)
    if du is not None and needs_a:
        das = tall(du, as_rows(rows).to(du.dtype), 1.0).split([a.shape[0] for _, a, _ in weights])
        for found, da, need in zip(gradients, das, needed, strict=True):
            found[3] = da if need[3] else None
    for found, dout, need in zip(gradients, douts, needed, strict=True):
        found[1] = _mm(as_rows(dout).t(), as_rows(rows)) if need[1] else None
    return None if dgate is None else dgate.view(x.shape), dup, gradients


def _gate_gradients(
    gate: Tensor, up: Tensor | None, gating: Gating, dhidden: Tensor | None, needs_hidden: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of gate and up, and what is gated, where needed; dup takes the memory of ``dhidden``."""
    first, second = _halves(gate, up)
    if dhidden is None:
        return None, None, gated_fwd(first, second, gating) if needs_hidden else first
    dhidden = dhidden.view(first.shape)
    hidden = torch.empty_like(dhidden) if needs_hidden else None
    dgate = gate.new_empty(gate.shape)
    if up is None:
        dfirst, dsecond = dgate.chunk(2, dim=-1)
        gated_bwd(dhidden, first, second, dfirst, dsecond, gating, hidden)
        dup = None
    else:
        gated_bwd(dhidden, first, second, dgate, dhidden, gating, hidden)
        dup = dhidden
    return dgate, dup, dhidden if hidden is None else hidden


class LoraLinearFunction(_Save):
    """``lora_linears``; all arguments are positional."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor | None, gating: Gating | None, scales: Sequence[float], *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        """Save and compute."""
        u, hidden, *outs = _Save.forward(ctx, x, up, gating, scales, *tensors)
        _compute(outs, x if hidden is None else hidden, u, scales, tensors)
        return u, hidden, *outs


class _Fill(Function):
    """The node that computes: it fills the memory it is given and passes the gradients on unchanged."""

    @staticmethod
    def definition(count: int, *arguments: Any) -> tuple[Tensor, ...]:
        """The results, which ``_Save.definition`` has computed."""
        return arguments[:count]

    @staticmethod
    def forward(ctx: Any, count: int, *arguments: Any) -> tuple[Tensor, ...]:
        """Fill the first ``count`` arguments."""
        outs, (x, u, scales, *tensors) = arguments[:count], arguments[count:]
        _compute(outs, x, u, scales, tensors)
        ctx.mark_dirty(*outs)
        ctx.set_materialize_grads(False)
        return outs

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients as those of the results."""
        return None, *douts, *(None,) * (len(ctx.needs_input_grad) - 1 - len(douts))


def _check(x: Tensor, projections: Sequence[Projection], is_cast: bool) -> None:
    check_rows("x", x)
    if not projections:
        raise ValueError("projections: got none; must be at least one")
    for a, b, _, weight, bias, base in projections:
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != x.shape[-1] or a.shape[0] != b.shape[1]:
            expected = f"[r, {x.shape[-1]}] and [O, r]"
            raise ValueError(f"a, b: got shapes {tuple(a.shape)}, {tuple(b.shape)}; must be {expected}")
        shapes = {"weight": (weight, (b.shape[0], x.shape[-1])), "bias": (bias, (b.shape[0],))}
        shapes |= {"base": (base, (*x.shape[:-1], b.shape[0]))}
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; must be {shape}")
        if weight is not None and base is not None:
            raise ValueError("weight, base: got both; must be one of them, or neither")
        for name, tensor in (("weight", weight), ("base", base)):
            if torch.is_tensor(tensor) and not is_cast and tensor.dtype != x.dtype:
                raise ValueError(f"{name}: got dtype {tensor.dtype}; must be {x.dtype}, x's dtype, without autocast")
        for name, tensor in (("a", a), ("b", b), ("weight", weight), ("bias", bias), ("base", base)):
            if tensor is not None:
                check_device(name, cast(Tensor, tensor), x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer of ``x`` computes: autocast's, if that is on and ``x`` is not fp64."""
    device = x.device.type
    autocast = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Linear layers with an adapter each, which share the input ``x``.

    Args:
        x: ``[..., H]``, fp16, bf16, fp32 or fp64. Under autocast it is cast to autocast's dtype.
        projections: at least one. ``weight`` and ``base`` have x's dtype, or any under autocast. ``a``, ``b``
            and ``bias`` have any floating dtype. ``bias`` is cast to that of the computation, and so are ``a`` and
            ``b`` under autocast; without it, the products with them are computed in the widest of their dtypes and x's.

    Returns:
        ``[..., O]`` for each projection, in the dtype of the computation.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: shapes, dtypes or devices do not fit together, or a projection has both a weight and a base.
    """
    _check(x, projections, is_cast=torch.is_autocast_enabled(x.device.type))
    return unchecked_lora_linears(x, projections)


def unchecked_lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """``lora_linears`` without its checks, for callers who know that everything fits together."""
    return _run(x.to(compute_dtype(x)), None, None, projections)


def gated_lora_linear(gate: Tensor, up: Tensor | None, projection: Projection, activation: str = "silu") -> Tensor:
    """``lora_linear(act(gate) * up, ...)``, whose input is not kept for backward.

    Args:
        gate: ``[..., H]``, fp16, bf16, fp32 or fp64. Without ``up``, ``[..., 2 * H]``: gate, then up.
        up: like ``gate`` in shape and dtype, or None.
        projection: as in ``lora_linears``.
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"gelu"`` (exact).

    Returns:
        ``[..., O]`` in the dtype of the computation. Where Triton does not run, and under autocast to another dtype
        than ``gate``'s, the definition of the activation runs, and its result is kept.

    Raises:
        TypeError, ValueError: as in ``lora_linears``; ``activation`` is unknown.
    """
    check_gated(gate, up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; must be one of {', '.join(map(repr, ACTIVATIONS))}")
    gating = Gating(ACTIVATIONS[activation])
    kernels = use_triton(gate, up) and gate.dtype != torch.float64 and (up is None or up.dtype == gate.dtype)
    if not kernels or compute_dtype(gate) != gate.dtype or torch.compiler.is_compiling():
        return lora_linears(gating.define(gate, up), (projection,))[0]
    _check(_halves(gate, up)[0], (projection,), is_cast=torch.is_autocast_enabled(gate.device.type))
    return _run(gate, up, gating, (projection,))[0]


def _run(x: Tensor, up: Tensor | None, gating: Gating | None, projections: Sequence[Projection]) -> tuple[Any, ...]:
    scales = tuple(float(p.scale) for p in projections)
    # These casts are differentiable, so what is saved of A and B under autocast are copies, as torch's own layers save.
    adapters = [p.a.dtype for p in projections] + [p.b.dtype for p in projections]
    is_cast = torch.is_autocast_enabled(x.device.type)
    dtype = x.dtype if is_cast else functools.reduce(torch.promote_types, adapters, x.dtype)
    bases = (None if p.base is None else p.base.to(x.dtype) for p in projections)
    pairs = zip(projections, bases, strict=True)
    tensors = [t for p, base in pairs for t in (base, p.weight, p.bias, p.a.to(dtype), p.b.to(dtype))]
    if torch.compiler.is_compiling():
        return _Save.definition(x, up, gating, scales, *tensors)[2:]
    if not are_saved_tensors_hooked() or not torch.is_grad_enabled():
        return LoraLinearFunction.apply(x, up, gating, scales, *tensors)[2:]
    u, hidden, *outs = _Save.apply(x, up, gating, scales, *tensors)
    hidden = x.detach() if hidden is None else hidden
    arguments = (t.detach() if torch.is_tensor(t) else t for t in tensors)
    return _Fill.apply(len(outs), *outs, hidden, u, scales, *arguments)


def lora_linear(
    x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, weight: Tensor | Dequantised | None = None,
    bias: Tensor | None = None, base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T + bias + scale * (x a^T) b^T``, or ``base`` in place of the base product; see ``lora_linears``.

    Args:
        x: ``[..., H]``.
        a: ``[r, H]``.
        b: ``[O, r]``.
        scale: multiplies the adapter's product.
        weight: ``[O, H]``, or None without a base product.
        bias: ``[O]``, or None.
        base: ``[..., O]``, to which the rest is added, or None. It is not written to.

    Returns:
        ``[..., O]`` in the dtype of the computation.

    Raises:
        TypeError, ValueError: as in ``lora_linears``.
    """
    return lora_linears(x, (Projection(a, b, scale, weight, bias, base),))[0]
