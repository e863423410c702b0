"""Forward and backward of the vocabulary losses, in eager mode and as operators for ``torch.compile``.

A reduced loss knows all its gradients in forward, up to one factor: ``loss_forward`` computes them there, with three
GEMMs in token chunks or four in vocabulary chunks. Where upstream gradients differ per token (reduction "none",
log-probs), ``recompute`` computes the gradients in backward, from logits that are computed again: four GEMMs.

The reduction's factor is part of dlogits, except in fp16, where dividing by the number of tokens would underflow: there
the sums stay fp32 at unit scale until backward multiplies and rounds them once.

The operators hide the chunk loops, and the wait for the device that counts the labels, from the compiler. Eager calls
use an ``autograd.Function`` instead: it costs the host less and scales its saved gradients in place.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.operators import opaque_op
from .gradients import fp16_peak, scale_gradients
from .options import (
    ALL_STATS,
    LABEL_STATS,
    NO_STATS,
    NUM_STATS,
    Gradients,
    HeadOptions,
    LogitTransform,
    MemoryOptions,
    Params,
)
from .rows import row_coefficients
from .token_chunks import PerToken, ValidRows, forward_by_tokens, gradients_by_tokens, valid_rows
from .vocab_chunks import VocabChunks, forward_by_vocabulary

STATS_FIELDS = {NO_STATS: 0, LABEL_STATS: 3, ALL_STATS: 5}  # how many of TokenLogProbs
IS_TOP1 = 2  # its place among them
PREDICTED = 6  # place of the most probable tokens among the operator's outputs
NUM_PARAMS = 3  # hidden, weight, bias
NUM_INPUTS = 11  # inputs of the forward operator


class LossResult(NamedTuple):
    """The results of ``loss_forward``.

    ``loss`` is 0-d, or ``[N]`` unreduced. ``stats`` is ``[5, n]`` or ``None``, ``lse`` and ``predicted`` (or ``None``)
    are ``[n]``, of the valid ``rows``. ``grads`` of hidden, weight and bias (``None`` unless computed now) must still
    be multiplied by ``late_scale`` and divided by ``late_divisor``.
    """

    loss: Tensor
    stats: Tensor | None
    grads: Gradients
    late_scale: float
    late_divisor: Tensor | None
    lse: Tensor
    rows: ValidRows
    predicted: Tensor | None


def gemms_of(options: HeadOptions, hidden: Tensor, weight: Tensor) -> torch.autocast:
    """A context in which ``F.linear`` of these runs in the dtype of the op's GEMMs."""
    cast = hidden.dtype != options.dtype or weight.dtype != options.dtype
    return torch.autocast(hidden.device.type, options.dtype, enabled=cast)


def _host_scale(options: HeadOptions, rows: ValidRows, num_items: Tensor | float | None) -> float:
    """The part of the reduction's factor that the host knows; a ``num_items`` tensor divides apart from it."""
    if options.reduction == "none" or isinstance(num_items, Tensor):
        return 1.0
    if num_items is not None:
        return 1.0 / num_items
    return 1.0 / max(rows.count, 1) if options.reduction == "mean" else 1.0


def per_token(
    params: Params, labels: Tensor, rows: ValidRows, options: HeadOptions, grad_scale: float | None = None,
    token_weights: Tensor | None = None, num_items: Tensor | None = None,
) -> PerToken:  # fmt: skip
    """Losses and statistics of the valid rows and, with ``grad_scale``, gradients of ``sum(loss) * grad_scale``."""
    with torch.autocast(labels.device.type, enabled=False):
        if options.by_vocabulary:
            return forward_by_vocabulary(params, labels, rows, options, grad_scale, token_weights, num_items)
        return forward_by_tokens(params, rows, options, grad_scale, token_weights, num_items)


def loss_forward(
    params: Params, labels: Tensor, token_weights: Tensor | None, num_items: Tensor | float | None, options: HeadOptions
) -> LossResult:
    """Loss, statistics if asked for, and the gradients where they are known by now; hidden is ``[N, H]``."""
    rows = valid_rows(labels, params[1].shape[0], options.ignore_index)
    scale = _host_scale(options, rows, num_items)
    divisor = None
    if isinstance(num_items, Tensor) and options.reduction != "none":
        divisor = num_items.reshape(())
    late = options.dtype == torch.float16
    grad_scale = (1.0 if late else scale) if options.gradients_in_forward else None
    out = per_token(params, labels, rows, options, grad_scale, token_weights, None if late else divisor)
    if options.reduction == "none":
        loss = rows.spread(out.loss)
    elif rows.count == 0:
        loss = torch.zeros((), dtype=options.sum_dtype, device=labels.device)
    else:
        loss = out.loss.sum() * scale if divisor is None else out.loss.sum() / divisor
    return LossResult(
        loss, out.stats, out.grads, scale if late else 1.0, divisor if late else None, out.lse, rows, out.predicted
    )


def _stats_dtypes(options: HeadOptions) -> list[torch.dtype]:
    """Dtypes of the fields of ``TokenLogProbs``."""
    return [torch.bool if i == IS_TOP1 else options.sum_dtype for i in range(NUM_STATS)]


def spread_stats(rows: ValidRows, stats: Tensor | None, options: HeadOptions) -> list[Tensor]:
    """The statistics that were asked for as ``[N]``, in the order of ``TokenLogProbs``."""
    if stats is None:
        return []
    log_probs, entropy, is_top1, *others = (rows.spread(s) for s in stats[: STATS_FIELDS[options.stats]])
    return [log_probs, entropy, is_top1.bool(), *others]


def spread_predictions(result: LossResult, options: HeadOptions) -> Tensor | None:
    """The most probable tokens as ``[N]``, ``ignore_index`` where the label is; ``None`` if not asked for."""
    if result.predicted is None:
        return None
    out = result.predicted.new_full((result.rows.num_rows,), options.ignore_index)
    return result.predicted if result.rows.index is None else out.index_copy_(0, result.rows.index, result.predicted)


def recompute(
    params: Params, rows: ValidRows, lse: Tensor, options: HeadOptions, row_grad: Tensor | None,
    entropy_grad: Tensor | None = None, entropy: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of hidden, weight and bias for upstream gradients of the valid rows' losses and entropies ``[n]``."""
    row_grad = torch.zeros_like(lse) if row_grad is None else row_grad
    peak = fp16_peak(options.dtype, row_grad, entropy_grad)
    if peak is not None:
        row_grad = row_grad / peak
        entropy_grad = None if entropy_grad is None else entropy_grad / peak
    with torch.autocast(lse.device.type, enabled=False):
        factors = (options.label_smoothing, options.z_loss)
        coefficients = row_coefficients(row_grad, lse, params[1].shape[0], *factors, entropy_grad, entropy)
        if options.sums_over_tokens:
            grads = VocabChunks(params, rows, options).gradients(lse, coefficients, options.wanted)
        else:
            grads = gradients_by_tokens(params, rows, lse, coefficients, options)
    if peak is None:
        return grads
    return scale_gradients(grads, [None if p is None else p.dtype for p in params], peak, keep=False)


def _pack(options: HeadOptions) -> tuple[int, str, torch.dtype, list[float]]:
    """The options in a form that an operator's schema can hold."""
    numbers = (
        *options.transform, *options.wanted, options.stats, options.label_smoothing, options.z_loss,
        options.predictions, *options.memory.as_numbers,
    )  # fmt: skip
    return options.ignore_index, options.reduction, options.dtype, [float(n) for n in numbers]


def _unpack(ignore_index: int, reduction: str, dtype: torch.dtype, numbers: list[float]) -> HeadOptions:
    inner, outer, has_softcap, hidden, weight, bias, stats, label_smoothing, z_loss, predictions, *memory = numbers
    return HeadOptions(
        LogitTransform(inner, outer, bool(has_softcap)), ignore_index, dtype, (bool(hidden), bool(weight), bool(bias)),
        MemoryOptions.from_numbers(*memory), int(stats), reduction, label_smoothing, z_loss, bool(predictions),
    )  # fmt: skip


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
    num_items: Tensor | None, num_items_number: float | None, ignore_index: int, reduction: str, dtype: torch.dtype,
    numbers: list[float],
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor,
    Tensor,
]:  # fmt: skip
    """Loss; five statistics; predictions ``[N]``; gradients of hidden, weight, bias; their factor; lse ``[N]``."""
    options = _unpack(ignore_index, reduction, dtype, numbers)
    divisor = num_items_number if num_items is None else num_items
    result = loss_forward((hidden, weight, bias), labels, token_weights, divisor, options)
    factor = torch.full((), result.late_scale, dtype=options.sum_dtype, device=hidden.device)
    factor = factor if result.late_divisor is None else factor / result.late_divisor
    stats = spread_stats(result.rows, result.stats, options)
    stats += [labels.new_empty(0, dtype=dtype) for dtype in _stats_dtypes(options)[len(stats) :]]
    log_probs, entropy, is_top1, log_sum_sq_probs, mean_logits = stats
    hidden_grad, weight_grad, bias_grad = result.grads
    lse = result.rows.spread(result.lse)
    return (
        result.loss, log_probs, entropy, is_top1, log_sum_sq_probs, mean_logits, spread_predictions(result, options),
        hidden_grad, weight_grad, bias_grad, factor, lse,
    )  # fmt: skip


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *others: Any
) -> tuple[Tensor | None, ...]:  # fmt: skip
    options = _unpack(*others[3:])
    given = STATS_FIELDS[options.stats]
    stats = [labels.new_empty(labels.shape if i < given else 0, dtype=t) for i, t in enumerate(_stats_dtypes(options))]
    half = options.dtype == torch.float16
    grads = [
        p.new_empty(p.shape, dtype=torch.float32 if half else p.dtype)
        if p is not None and want and options.gradients_in_forward
        else None
        for p, want in zip((hidden, weight, bias), options.wanted, strict=True)
    ]
    loss, factor, lse = (
        labels.new_empty(shape, dtype=options.sum_dtype)
        for shape in (labels.shape if options.reduction == "none" else (), (), labels.shape)
    )
    predicted = labels.new_empty(labels.shape, dtype=torch.int64) if options.predictions else None
    return loss, *stats, predicted, *grads, factor, lse


def _scale(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * scale``, rounded once to ``dtype``."""
    out = scale_gradients([grad], [dtype], scale, keep=True)[0]
    assert out is not None
    return out


def _fake_scale(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _recompute(
    row_grad: Tensor | None, entropy_grad: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, token_weights: Tensor | None, lse: Tensor, entropy: Tensor, ignore_index: int, reduction: str,
    dtype: torch.dtype, numbers: list[float],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden, weight and bias for upstream gradients of token losses and entropies, ``[N]``."""
    options = _unpack(ignore_index, reduction, dtype, numbers)
    rows = valid_rows(labels, weight.shape[0], ignore_index)
    grads = recompute(
        (hidden, weight, bias), rows, rows.select(lse), options, rows.gradient(row_grad, token_weights),
        rows.gradient(entropy_grad), None if entropy_grad is None else rows.select(entropy),
    )  # fmt: skip
    hidden_grad, weight_grad, bias_grad = grads
    return hidden_grad, weight_grad, bias_grad


def _fake_recompute(
    row_grad: Tensor | None, entropy_grad: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, token_weights: Tensor | None, lse: Tensor, entropy: Tensor, *packed: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    wanted = _unpack(*packed).wanted
    params = zip((hidden, weight, bias), wanted, strict=True)
    return tuple(p.new_empty(p.shape) if p is not None and want else None for p, want in params)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, labels, token_weights, _, _, *ctx.packed = inputs
    ctx.options = _unpack(*ctx.packed)
    ctx.dtypes = [None if p is None else p.dtype for p in (hidden, weight, bias)]
    ctx.set_materialize_grads(False)
    loss, log_probs, entropy, *_, hidden_grad, weight_grad, bias_grad, factor, lse = output
    constant = (loss,) if ctx.options.stats == ALL_STATS else (log_probs, entropy)
    ctx.mark_non_differentiable(*constant, *output[3:])
    if ctx.options.gradients_in_forward:
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad, factor)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, token_weights, lse, entropy)


def _differentiate(
    ctx: Any, loss_grad: Tensor | None, log_prob_grad: Tensor | None, entropy_grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if loss_grad is None and log_prob_grad is None and entropy_grad is None:
        return (None,) * NUM_INPUTS
    wanted = ctx.options.wanted
    if loss_grad is not None and ctx.options.gradients_in_forward:
        *saved, factor = ctx.saved_tensors
        scale = loss_grad * factor
        triples = zip(saved, ctx.dtypes, wanted, strict=True)
        grads = [_scale_op(g, scale, dtype) if want else None for g, dtype, want in triples]
    else:
        row_grad = loss_grad if log_prob_grad is None else -log_prob_grad
        grads = _recompute_op(row_grad, entropy_grad, *ctx.saved_tensors, *ctx.packed)
    pairs = zip(grads, wanted, strict=True)
    return *(g if want else None for g, want in pairs), *(None,) * (NUM_INPUTS - NUM_PARAMS)


_scale_op = opaque_op("linear_loss_scale", _scale, _fake_scale)
_recompute_op = opaque_op("linear_loss_recompute", _recompute, _fake_recompute, waits=True)
_forward_op = opaque_op("linear_loss", _forward, _fake_forward, _differentiate, _save, waits=True)


def compiled_pass(
    params: Params, labels: Tensor, token_weights: Tensor | None, num_items: Tensor | float | None,
    options: HeadOptions, with_lse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One node of a graph: loss, and as asked for statistics (of ``TokenLogProbs``), predictions and lse."""
    on_device = num_items.detach().to(labels.device) if isinstance(num_items, Tensor) else None
    number = None if num_items is None or on_device is not None else float(num_items)
    outputs = _forward_op(*params, labels, token_weights, on_device, number, *_pack(options))
    stats = outputs[: 1 + STATS_FIELDS[options.stats]]
    return *stats, *(outputs[PREDICTED : PREDICTED + options.predictions]), *(outputs[-1:] if with_lse else ())
