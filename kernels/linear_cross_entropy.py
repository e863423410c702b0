"""Cross-entropy of ``hidden @ weight.T + bias`` with the logits of one chunk at a time.

Per token chunk: logits = X W^T (cuBLAS), one kernel that overwrites them with dlogits and gives loss and statistics,
then dX = dlogits W and dW += dlogits^T X. So gradients are computed in forward, three GEMMs in all, and backward
multiplies them by the upstream gradient. Saved: the gradients, and neither hidden states nor weight, which a sharded
engine may have freed by then. With reduction "none" the upstream gradient differs per token and is not known in
forward: hidden, weight and lse are saved, and backward computes the logits again, four GEMMs in all.
Without Triton, and in fp64, the same passes run with the row functions of linear_loss/plain_rows.py.
linear_loss/passes.py has the computation, gradients.py and vocab_chunks.py beside it what it costs in memory.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from . import reference
from .linear_logprobs import linear_logprobs
from .linear_loss.gradients import graph_is_kept, scale_gradients
from .linear_loss.options import (
    LABEL_STATS,
    NO_STATS,
    HeadOptions,
    MemoryKeywords,
    check_linear_args,
    check_loss_args,
    logit_transform,
    memory_options,
    on_host_or_device,
    wanted_gradients,
)
from .linear_loss.passes import compiled_pass, gemms_of, loss_forward, recompute, spread_predictions, spread_stats
from .linear_loss.plain_rows import runs_kernels
from .linear_loss.token_chunks import ValidRows
from .linear_loss.weighting import check_class_weights, reduced_z_loss, scaled_by_probability, weighted_by_class
from .reference import IGNORE_INDEX, TokenStats
from .runtime.autograd import Function, differentiate, once_differentiable
from .runtime.launch import is_plain

NUM_ARGUMENTS, NUM_INPUTS = 8, 5  # of the function below; the tensors among them, num_items apart

ONLY_ONCE = (
    "linear_cross_entropy: its gradients cannot be differentiated again, because kernels compute them in forward and "
    'keep neither hidden nor weight. Use reduction="none" and reduce the result, or, in a patched model, set '
    "fused_loss: false"
)


class LinearCrossEntropyFunction(Function):
    """``(loss, log_probs, entropy, is_top1, predictions, lse)`` of ``hidden`` ``[N, H]``; what is wanted of them."""

    @staticmethod
    def definition(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
        num_items: Tensor | float | None, options: HeadOptions, with_lse: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The same in plain PyTorch."""
        with gemms_of(options, hidden, weight):
            out = reference.linear_cross_entropy(
                hidden, weight, labels, bias, ignore_index=options.ignore_index,
                label_smoothing=options.label_smoothing, z_loss=options.z_loss, token_weights=token_weights,
                reduction=options.reduction, num_items=num_items, return_stats=options.stats != NO_STATS,
                **options.transform.keywords,
            )  # fmt: skip
            results = (out[0], *out[1]) if isinstance(out, tuple) else (out,)
            if not (with_lse or options.predictions):
                return results
            logits = reference.linear_logits(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
        z = reference.transform_logits(logits, **options.transform.keywords)
        predicted = z.argmax(-1).masked_fill(labels == options.ignore_index, options.ignore_index)
        return *results, *((predicted,) if options.predictions else ()), *((z.logsumexp(-1),) if with_lse else ())

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
        num_items: Tensor | float | None, options: HeadOptions, with_lse: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Loss, statistics, lse if asked for and, unless the reduction is "none", the gradients."""
        ctx.set_materialize_grads(False)
        result = loss_forward((hidden, weight, bias), labels, token_weights, num_items, options)
        ctx.options, ctx.num_rows, ctx.num_items = options, labels.shape[0], num_items
        ctx.dtypes = [t.dtype if t is not None else None for t in (hidden, weight, bias)]
        # Second derivatives need the inputs. Without kernels they are kept, as F.linear would keep them.
        keeps = not options.gradients_in_forward or not runs_kernels(hidden)
        ctx.is_twice_differentiable = any(options.wanted) and keeps
        inputs = (hidden, weight, bias, labels, token_weights) if ctx.is_twice_differentiable else (None,) * NUM_INPUTS
        if options.gradients_in_forward:
            ctx.late_scale = result.late_scale
            ctx.save_for_backward(*inputs, *result.grads, result.late_divisor)
        elif any(options.wanted):
            rows = result.rows
            given = (hidden, weight, bias, rows.labels, rows.index, token_weights, result.lse)
            ctx.save_for_backward(*inputs, *given)
        stats = spread_stats(result.rows, result.stats, options)
        predicted = spread_predictions(result, options)
        stats += [] if predicted is None else [predicted]
        if with_lse:
            stats.append(result.rows.spread(result.lse))
        ctx.mark_non_differentiable(*stats)
        return result.loss, *stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """The gradients times the upstream gradient."""
        if grad is None:
            return (None,) * NUM_ARGUMENTS
        if torch.is_grad_enabled() and ctx.is_twice_differentiable:
            args = (*ctx.saved_tensors[:NUM_INPUTS], ctx.num_items, ctx.options, False)
            return differentiate(LinearCrossEntropyFunction.definition, args, (grad,))
        return LinearCrossEntropyFunction.gradients(ctx, grad)

    @staticmethod
    @once_differentiable(ONLY_ONCE)
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``backward`` by the op's own passes."""
        saved = ctx.saved_tensors[NUM_INPUTS:]
        if not ctx.options.gradients_in_forward:
            *params, labels, index, token_weights, lse = saved
            rows = ValidRows(labels, index, ctx.num_rows)
            grads = recompute(tuple(params), rows, lse, ctx.options, rows.gradient(grad, token_weights))
            return *grads, *(None,) * (NUM_ARGUMENTS - len(grads))
        *grads, divisor = saved
        scale = grad * ctx.late_scale
        if divisor is not None:
            scale = scale / divisor
        scaled = scale_gradients(grads, ctx.dtypes, scale, keep=graph_is_kept())
        return *scaled, *(None,) * (NUM_ARGUMENTS - len(scaled))


class _TieEmptyLogits(Function):
    """``(loss, empty logits)`` from one node; the gradient of the empty logits carries nothing."""

    @staticmethod
    def definition(loss: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same from two nodes: no engine's hooks run in a transform."""
        return loss, torch.empty(shape, dtype=dtype, device=loss.device)

    @staticmethod
    def forward(ctx: Any, loss: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return loss.view_as(loss), torch.empty(shape, dtype=dtype, device=loss.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
        return grad, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0,
    token_weights: Tensor | None = None, reduction: str = "mean", num_items: Tensor | float | None = None,
    return_stats: bool = False, class_weights: Tensor | None = None, token_scaling: bool = False,
    return_z_loss: bool = False, return_predictions: bool = False, **memory: Unpack[MemoryKeywords],
) -> Tensor | tuple[Any, ...]:  # fmt: skip
    """``cross_entropy(hidden @ weight.T + bias, labels)`` with the logits of one chunk at a time.

    The host waits for the device once, to count the labels that are not ignored. Under ``torch.compile`` the op is one
    node of the graph.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``. ``hidden``, ``weight`` and ``bias`` have one dtype, or any under autocast: GEMMs then run in
            autocast's dtype, and gradients come back in the parameters' own dtypes, rounded once from fp32 sums.
        labels: ``[...]`` (int64 or int32), not shifted. Positions with ``ignore_index`` cost nothing; if all are
            ignored, the loss is a differentiable zero.
        bias: ``[V]``.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale, token_weights, reduction, num_items, class_weights:
            those of ``cross_entropy``.
        token_scaling: that of ``cross_entropy``. Costs another GEMM, and under ``torch.compile`` another node.
        return_stats: also return detached per-token ``TokenStats``. The mean of its ``is_top1`` over the labels that
            are not ignored is the token accuracy.
        return_z_loss: also return the z-loss that the loss contains, reduced like it and detached.
        return_predictions: also return the most probable tokens ``[...]``, int64, the first of several, and
            ``ignore_index`` where the label is.
        **memory: the fields of ``linear_loss.options.MemoryOptions``, such as ``low_memory``.

    Returns:
        The loss in fp32 (fp64 for fp64 GEMMs), or a tuple of it and what else is returned, in the order stats, z-loss,
        predictions.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    memory_of_op = memory_options("linear_cross_entropy", memory)
    dtype = check_linear_args(hidden, weight, labels, bias)
    check_loss_args(labels, label_smoothing, z_loss, reduction, num_items, token_weights)
    check_class_weights(class_weights, weight.shape[0], label_smoothing, hidden)
    if class_weights is not None:
        args = (class_weights, labels, token_weights, num_items, reduction, ignore_index)
        token_weights, num_items = weighted_by_class(*args)
    if token_scaling:
        with torch.no_grad():
            scores = linear_logprobs(
                hidden, weight, labels, bias, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
                **memory,
            )  # fmt: skip
        token_weights = scaled_by_probability(scores.log_probs, token_weights)
    transform = logit_transform(logit_scale, softcap)
    options = HeadOptions(
        transform, ignore_index, dtype, wanted_gradients(hidden, weight, bias), memory_of_op,
        LABEL_STATS if return_stats else NO_STATS, reduction, label_smoothing, z_loss, return_predictions,
    )  # fmt: skip
    plain = is_plain(hidden, weight, bias, labels, token_weights)
    params = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    flat_labels = labels.reshape(-1)
    token_weights = None if token_weights is None else token_weights.reshape(-1)
    if torch.compiler.is_compiling() and plain:
        loss, *stats = compiled_pass(params, flat_labels, token_weights, num_items, options, return_z_loss)
    else:
        num_items = on_host_or_device(num_items, hidden.device)
        args = (flat_labels, token_weights, num_items, options, return_z_loss)
        run = LinearCrossEntropyFunction.apply if plain else LinearCrossEntropyFunction.definition
        loss, *stats = run(*params, *args)
    shape = labels.shape if reduction == "none" else ()
    lse = stats.pop() if return_z_loss else None
    predicted = stats.pop() if return_predictions else None
    results = [loss.view(shape)]
    if return_stats:
        results.append(TokenStats(*(s.view(labels.shape) for s in stats)))
    if lse is not None:
        args = (flat_labels, z_loss, token_weights, reduction, num_items, ignore_index)
        results.append(reduced_z_loss(lse, *args).view(shape))
    if predicted is not None:
        results.append(predicted.view(labels.shape))
    return tuple(results) if len(results) > 1 else results[0]


def linear_cross_entropy_with_empty_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, return_stats: bool = False,
    **options: Any,
) -> tuple[Tensor, TokenStats | None, Tensor]:  # fmt: skip
    """``(loss, stats or None, logits)`` where ``logits`` is empty, ``[*labels.shape, 0]`` in the GEMMs' dtype.

    Loss and empty logits leave one autograd node. So a hook that a sharded engine hangs on a module's output logits
    runs before the gradients of this op, provided that the differentiated loss is ``loss + logits.sum()``. Arguments
    and errors are the same as in ``linear_cross_entropy``.
    """
    out = linear_cross_entropy(hidden, weight, labels, bias, return_stats=return_stats, **options)
    loss, stats = out if isinstance(out, tuple) else (out, None)
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    if torch.compiler.is_compiling():  # one node of the compiled graph in any case
        return loss, stats, loss.reshape(-1)[:0].to(dtype).view(*labels.shape, 0)
    loss, empty = _TieEmptyLogits.apply(loss, (*labels.shape, 0), dtype)
    return loss, stats, empty
