"""Linear layers with low-rank adapters (LoRA, arXiv 2106.09685) that share their input.

``y_i = x W_i^T + bias_i + scale_i * (x A_i^T) B_i^T``; ``W_i`` is ``[O_i, H]``, ``A_i`` ``[r_i, H]``, ``B_i``
``[O_i, r_i]``.

Forward: one narrow GEMM gives ``u = x A^T`` for all A stacked. The ``u_i B_i^T`` are added to the base products.
Saved: x once, u, and the weights. Backward: ``du_i = scale_i * dy_i B_i`` and ``dB_i = scale_i * dy_i^T u_i``;
then ``dA = du^T x`` and ``dx = sum_i dy_i W_i + du A`` for all projections together, dx in one buffer. Nothing of the
size of x or y is written besides y and dx. All of it runs in x's dtype, to which A and B are cast; products accumulate
in fp32.

Memory traffic beyond the base GEMMs: x and y read, y written; dy read twice, x read, dx read and written.

Under activation checkpointing the op is two nodes, as in ``gated_linear``: the second forward stops before the GEMMs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .runtime.autograd import Function, are_saved_tensors_hooked, differentiate
from .runtime.checks import as_rows, check_device, check_floating
from .shared.low_rank import narrow, tall, update

FIELDS = 5  # tensors of a projection: base, weight, bias, a, b


class Projection(NamedTuple):
    """A linear layer with an adapter.

    Args:
        a: ``[r, H]``.
        b: ``[O, r]``.
        scale: multiplies the adapter's product.
        weight: ``[O, H]``, or None without a base product.
        bias: ``[O]``, or None.
        base: ``[..., O]`` in x's dtype, to which the rest is added, or None.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    base: Tensor | None = None


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in ``a``'s dtype: with ``out=``, autocast has no effect even if it is on in backward."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _stacked(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """All A, one below the other, in x's dtype if there are several."""
    return tensors[0] if len(tensors) == 1 else torch.cat([a.to(x.dtype) for a in tensors])


def _fields(tensors: Sequence[Any]) -> list[tuple]:
    return [tuple(tensors[i : i + FIELDS]) for i in range(0, len(tensors), FIELDS)]


def _compute(outs: Sequence[Tensor], x: Tensor, u: Tensor, scales: Sequence[float], tensors: Sequence[Any]) -> None:
    """Fill ``outs``, contiguous."""
    rows, start = as_rows(x), 0
    for out, scale, (base, weight, bias, a, b) in zip(outs, scales, _fields(tensors), strict=True):
        out = out.view(-1, out.shape[-1])
        own = u[:, start : start + len(a)]
        start += len(a)
        source = out
        if weight is not None:
            weight = weight.to(x.dtype).t()
            torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias.to(x.dtype), rows, weight, out=out)
        elif base is not None:
            source = as_rows(base)
        else:
            out.zero_()
        update(source, own, b.t(), scale, out)
        if weight is None and bias is not None:
            out.add_(bias.to(x.dtype))


class _Save(Function):
    """The node that saves: it returns u and uninitialised memory for the results, and runs the backward of the op."""

    @staticmethod
    def definition(x: Tensor, scales: Sequence[float], *tensors: Any) -> tuple[Tensor, ...]:
        """The whole op in plain PyTorch; an unused tensor takes the place of u."""
        with torch.autocast(x.device.type, enabled=False):
            outs = [
                reference.lora_linear(x, a, b, s, weight, bias, base)
                for s, (base, weight, bias, a, b) in zip(scales, _fields(tensors), strict=True)
            ]
        return x.new_empty(0), *outs

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Sequence[float], *tensors: Any) -> tuple[Tensor, ...]:
        """Save what backward needs; of the products, compute u alone."""
        fields = _fields(tensors)
        u = narrow(as_rows(x), _stacked(x, [a for *_, a, _ in fields]))
        ctx.scales = scales
        ctx.has_base = [base is not None for base, *_ in fields]
        ctx.save_for_backward(x, u, *(t for _, weight, _, a, b in fields for t in (weight, a, b)))
        ctx.mark_non_differentiable(u)
        return u, *(x.new_empty(*x.shape[:-1], len(b)) for *_, b in fields)

    @staticmethod
    def backward(ctx: Any, _: Tensor, *douts: Tensor) -> tuple[Tensor | None, ...]:
        """Compute only the gradients that are needed."""
        x, u, *saved = ctx.saved_tensors
        weights = [saved[i : i + 3] for i in range(0, len(saved), 3)]
        needs_x, _, *needs = ctx.needs_input_grad
        needed = _fields(needs)
        if torch.is_grad_enabled():
            # Any base and bias will do: the gradients do not depend on their values.
            tensors: list[Tensor | None] = []
            for dout, (weight, a, b), need, has_base in zip(douts, weights, needed, ctx.has_base, strict=True):
                base = torch.zeros_like(dout, requires_grad=need[0]) if has_base else None
                bias = b.new_zeros(len(b), requires_grad=True) if need[2] else None
                tensors += [base, weight, bias, a, b]
            return differentiate(_Save.definition, (x, ctx.scales, *tensors), (None, *douts))
        return _backward(x, u, ctx.scales, weights, douts, needs_x, needed)


def _backward(
    x: Tensor, u: Tensor, scales: Sequence[float], weights: Sequence[Sequence[Any]], douts: Sequence[Tensor],
    needs_x: bool, needed: Sequence[tuple],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of ``_Save``'s arguments."""
    rows = as_rows(x)
    ranks = [len(a) for _, a, _ in weights]
    du = torch.empty_like(u) if needs_x or any(need[3] for need in needed) else None
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs_x else None
    is_filled, start = False, 0
    gradients: list[list[Tensor | None]] = []
    for dout, scale, (weight, a, b), need in zip(douts, scales, weights, needed, strict=True):
        dy, span = as_rows(dout), slice(start, start + len(a))
        start += len(a)
        if du is not None:
            narrow(dy, b.t(), scale, du[:, span])
        if dx is not None and weight is not None:
            weight = weight.to(x.dtype)
            torch.addmm(dx, dy, weight, out=dx) if is_filled else torch.mm(dy, weight, out=dx)
            is_filled = True
        dbias = dy.sum(0, dtype=torch.float32 if x.dtype.itemsize < 4 else None) if need[2] else None
        dweight = _mm(dy.t(), rows) if need[1] else None
        db = tall(u[:, span], dy, scale, b.dtype, transposed=True) if need[4] else None
        gradients.append([dout if need[0] else None, dweight, dbias, None, db])
    if dx is not None and du is not None:
        dx = dx if is_filled else dx.zero_()
        update(dx, du, _stacked(x, [a for _, a, _ in weights]), 1.0, dx)
    if du is not None and any(need[3] for need in needed):
        das = tall(du, rows, 1.0, weights[0][1].dtype).split(ranks)
        for found, da, need in zip(gradients, das, needed, strict=True):
            found[3] = da if need[3] else None
    return None if dx is None else dx.view(x.shape), None, *(g for found in gradients for g in found)


class LoraLinearFunction(_Save):
    """``lora_linears``; all arguments are positional."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Sequence[float], *tensors: Any) -> tuple[Tensor, ...]:
        """Save and compute."""
        u, *outs = _Save.forward(ctx, x, scales, *tensors)
        _compute(outs, x, u, scales, tensors)
        return u, *outs


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
        return outs

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients as those of the results."""
        return None, *douts, *(None,) * (len(ctx.needs_input_grad) - 1 - len(douts))


def _check(x: Tensor, projections: Sequence[Projection], is_cast: bool) -> None:
    check_floating("x", x)
    if not projections:
        raise ValueError("projections: got none; must be at least one")
    for a, b, _, weight, bias, base in projections:
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != x.shape[-1] or a.shape[0] != b.shape[1]:
            expected = f"[r, {x.shape[-1]}] and [O, r]"
            raise ValueError(f"a, b: got shapes {tuple(a.shape)}, {tuple(b.shape)}; must be {expected}")
        shapes = {"weight": (weight, (len(b), x.shape[-1])), "bias": (bias, (len(b),))}
        shapes |= {"base": (base, (*x.shape[:-1], len(b)))}
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; must be {shape}")
        if weight is not None and base is not None:
            raise ValueError("weight, base: got both; must be one of them, or neither")
        if weight is not None and not is_cast and weight.dtype != x.dtype:
            raise ValueError(f"weight: got dtype {weight.dtype}; must be {x.dtype}, x's dtype, without autocast")
        for name, tensor in (("a", a), ("b", b), ("weight", weight), ("bias", bias), ("base", base)):
            if tensor is not None:
                check_device(name, tensor, x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer of ``x`` computes: autocast's, if that is on and ``x`` is not fp64."""
    device = x.device.type
    autocast = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Linear layers with an adapter each, which share the input ``x``.

    Args:
        x: ``[..., H]``, fp16, bf16, fp32 or fp64. Under autocast it is cast to autocast's dtype.
        projections: at least one. ``weight`` has x's dtype, or any under autocast; ``a``, ``b`` and ``bias`` have any
            floating dtype and are cast to that of the computation.

    Returns:
        ``[..., O]`` for each projection, in the dtype of the computation.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: shapes, dtypes or devices do not fit together, or a projection has both a weight and a base.
    """
    dtype = compute_dtype(x)
    _check(x, projections, is_cast=torch.is_autocast_enabled(x.device.type))
    x = x.to(dtype)
    scales = tuple(float(p.scale) for p in projections)
    tensors = [t for p in projections for t in (p.base, p.weight, p.bias, p.a, p.b)]
    if torch.compiler.is_compiling():
        return _Save.definition(x, scales, *tensors)[1:]
    if not are_saved_tensors_hooked() or not torch.is_grad_enabled():
        return LoraLinearFunction.apply(x, scales, *tensors)[1:]
    u, *outs = _Save.apply(x, scales, *tensors)
    arguments = (None if t is None else t.detach() for t in tensors)
    return _Fill.apply(len(outs), *outs, x.detach(), u, scales, *arguments)


def lora_linear(
    x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, weight: Tensor | None = None, bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T + bias + scale * (x a^T) b^T``, or ``base`` in place of the base product; see ``lora_linears``.

    Args:
        x: ``[..., H]``.
        a: ``[r, H]``.
        b: ``[O, r]``.
        scale: multiplies the adapter's product.
        weight: ``[O, H]``, or None without a base product.
        bias: ``[O]``, or None.
        base: ``[..., O]`` in x's dtype, to which the rest is added, or None. It is not written to.

    Returns:
        ``[..., O]`` in the dtype of the computation.

    Raises:
        TypeError, ValueError: as in ``lora_linears``.
    """
    return lora_linears(x, (Projection(a, b, scale, weight, bias, base),))[0]
