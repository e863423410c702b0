"""``linear_cross_entropy`` as operators of torch, for ``torch.compile``: the chunk loop and the wait for the device
that counts the labels are opaque to the compiler, shapes and dtypes are not.

Eager calls do not come here: an ``autograd.Function`` costs the host less, and scales its saved gradients in place,
where an operator has to write new ones.
"""

import torch
from torch import Tensor

from ..runtime.operators import opaque_op, or_empty
from .loss import LossOptions, loss_forward, loss_recompute
from .options import LogitTransform
from .scale_gradients import scale_gradients
from .token_chunks import valid_rows

NUM_PARAMS = 3  # hidden, weight, bias
NUM_INPUTS = 12


def _unpack(ignore_index: int, numbers: list[float], flags: list[bool], reduction: str, dtype: torch.dtype):
    """The options, from what a schema can hold."""
    inner, outer, label_smoothing, z_loss, budget = numbers
    has_softcap, low_memory, return_stats, *wanted = flags
    return LossOptions(
        LogitTransform(inner, outer, has_softcap), ignore_index, label_smoothing, z_loss, reduction, budget, low_memory,
        dtype, tuple(wanted), return_stats,
    )  # fmt: skip


def _pack(options: LossOptions) -> tuple[int, list[float], list[bool], str, torch.dtype]:
    inner, outer, has_softcap = options.transform
    numbers = (inner, outer, options.label_smoothing, options.z_loss, options.logits_budget_mib)
    flags = [has_softcap, options.low_memory, options.return_stats, *options.wanted]
    return options.ignore_index, [float(n) for n in numbers], flags, options.reduction, options.dtype


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
    num_items: Tensor | None, num_items_number: float | None, ignore_index: int, numbers: list[float],
    flags: list[bool], reduction: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss; log-probs, entropy, top-1; gradients of hidden, weight and bias; their factor (fp32, 0-d); lse ``[N]``."""
    options = _unpack(ignore_index, numbers, flags, reduction, dtype)
    divisor = num_items_number if num_items is None else num_items
    result = loss_forward(hidden, weight, bias, labels, token_weights, divisor, options)
    factor = torch.full((), result.late_scale, dtype=torch.float32, device=hidden.device)
    factor = factor if result.late_divisor is None else factor / result.late_divisor
    stats = result.stats or (None, None, labels.new_empty(0, dtype=torch.bool))
    outputs = (or_empty(t, result.loss) for t in (*stats, *result.grads))
    return result.loss, *outputs, factor, result.rows.spread(result.lse)


def _fake_forward(
    hidden, weight, bias, labels, token_weights, num_items, num_items_number, ignore_index, numbers, flags, reduction,
    dtype,
):  # fmt: skip
    options = _unpack(ignore_index, numbers, flags, reduction, dtype)
    per_token = hidden.new_empty(labels.shape, dtype=torch.float32)
    scalar = hidden.new_empty((), dtype=torch.float32)
    loss = torch.empty_like(per_token) if reduction == "none" else scalar
    stats = [torch.empty_like(per_token) if options.return_stats else scalar.new_empty(0) for _ in range(2)]
    top1 = labels.new_empty(labels.shape if options.return_stats else 0, dtype=torch.bool)
    grads = [
        p.new_empty(p.shape, dtype=torch.float32 if dtype == torch.float16 else p.dtype)
        if want and options.grad_now
        else scalar.new_empty(0)
        for p, want in zip((hidden, weight, bias), options.wanted, strict=True)
    ]
    return loss, *stats, top1, *grads, torch.empty_like(scalar), per_token


def _scale(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * scale``, rounded once to ``dtype``."""
    return scale_gradients([grad], [dtype], scale, keep=True)[0]


def _fake_scale(grad, scale, dtype):
    return grad.new_empty(grad.shape, dtype=dtype)


def _recompute(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
    lse: Tensor, ignore_index: int, numbers: list[float], flags: list[bool], reduction: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias for per-token upstream gradients."""
    options = _unpack(ignore_index, numbers, flags, reduction, dtype)
    rows = valid_rows(labels, weight.shape[0], ignore_index)
    grads = loss_recompute(grad, hidden, weight, bias, rows, token_weights, rows.select(lse), options)
    return tuple(or_empty(g, lse) for g in grads)


def _fake_recompute(
    grad, hidden, weight, bias, labels, token_weights, lse, ignore_index, numbers, flags, reduction, dtype
):
    wanted = flags[-NUM_PARAMS:]
    params = zip((hidden, weight, bias), wanted, strict=True)
    return tuple(p.new_empty(p.shape) if want else lse.new_empty(0) for p, want in params)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, token_weights, _, _, *ctx.packed = inputs
    ctx.set_materialize_grads(False)
    ctx.wanted = ctx.packed[2][-NUM_PARAMS:]
    ctx.per_token = ctx.packed[3] == "none"
    ctx.dtypes = [None if p is None else p.dtype for p in (hidden, weight, bias)]
    _, *others = output
    ctx.mark_non_differentiable(*others)
    *_, hidden_grad, weight_grad, bias_grad, factor, lse = others
    if ctx.per_token:
        ctx.save_for_backward(hidden, weight, bias, labels, token_weights, lse)
    else:
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad, factor)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * NUM_INPUTS
    if ctx.per_token:
        grads = _recompute_op(grad, *ctx.saved_tensors, *ctx.packed)
    else:
        *saved, factor = ctx.saved_tensors
        scale = grad.float() * factor
        triples = zip(saved, ctx.dtypes, ctx.wanted, strict=True)
        grads = [_scale_op(g, scale, dtype) if want else None for g, dtype, want in triples]
    pairs = zip(grads, ctx.wanted, strict=True)
    return *(g if want else None for g, want in pairs), *(None,) * (NUM_INPUTS - NUM_PARAMS)


_scale_op = opaque_op("linear_cross_entropy_scale", _scale, _fake_scale)
_recompute_op = opaque_op("linear_cross_entropy_recompute", _recompute, _fake_recompute, waits=True)
_forward_op = opaque_op("linear_cross_entropy", _forward, _fake_forward, _backward, _setup_context, waits=True)


def compiled_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
    num_items: Tensor | float | None, options: LossOptions,
) -> list[Tensor | None]:  # fmt: skip
    """``[loss, log_probs, entropy, is_top1]`` as ``LinearCrossEntropyFunction`` gives them."""
    on_device = num_items.detach().to(hidden.device) if torch.is_tensor(num_items) else None
    number = float(num_items) if num_items is not None and on_device is None else None
    loss, *outputs = _forward_op(
        hidden, weight, bias, labels, token_weights, on_device, number, *_pack(options)
    )  # fmt: skip
    return [loss, *(outputs[:3] if options.return_stats else (None,) * 3)]
