"""Cross-entropy of ``hidden @ weight.T + bias`` with the logits of one chunk of tokens at a time.

Per chunk: logits = X W^T (cuBLAS), one kernel that turns them in place to dlogits and gives loss and statistics,
then dX = dlogits W and dW += dlogits^T X. So gradients are computed in forward, three GEMMs in all, and backward
multiplies them by the upstream gradient. Saved: the gradients, and neither hidden states nor weight, which a sharded
engine may have freed by then. With reduction "none" the upstream gradient differs per token and is not known in
forward: hidden, weight and lse are saved, and backward computes the logits again, four GEMMs in all.
linear_loss.py has the computation, weight_sum.py and slabs.py what it costs in memory.
"""

import torch
from torch import Tensor

from . import reference
from .linear_loss.loss import LossOptions, loss_forward, loss_recompute
from .linear_loss.operator import compiled_loss
from .linear_loss.options import check_linear_args, check_loss_args, logit_transform, on_host_or_device
from .linear_loss.scale_gradients import graph_is_kept, scale_gradients
from .linear_loss.token_chunks import ValidRows
from .reference import TokenStats
from .runtime.autograd import Function
from .runtime.launch import use_triton


class LinearCrossEntropyFunction(Function):
    """``(loss, log_probs, entropy, is_top1)`` of ``hidden`` ``[N, H]``; the last three ``None`` unless asked for."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, num_items, options):
        """Loss, statistics and, unless the reduction is "none", the gradients."""
        ctx.set_materialize_grads(False)
        result = loss_forward(hidden, weight, bias, labels, token_weights, num_items, options)
        ctx.options, ctx.num_rows = options, labels.shape[0]
        ctx.dtypes = [t.dtype if t is not None else None for t in (hidden, weight, bias)]
        if options.grad_now:
            ctx.late_scale = result.late_scale
            ctx.save_for_backward(*result.grads, result.late_divisor)
        elif any(options.wanted):
            rows = result.rows
            ctx.save_for_backward(hidden, weight, bias, rows.labels, rows.index, token_weights, result.lse)
        if result.stats is None:
            return result.loss, None, None, None
        ctx.mark_non_differentiable(*result.stats)
        return result.loss, *result.stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        """The gradients times the upstream one."""
        if grad is None:
            return (None,) * 7
        if ctx.options.reduction == "none":
            hidden, weight, bias, labels, index, token_weights, lse = ctx.saved_tensors
            rows = ValidRows(labels, index, ctx.num_rows)
            grads = loss_recompute(grad, hidden, weight, bias, rows, token_weights, lse, ctx.options)
            return *grads, None, None, None, None
        *grads, divisor = ctx.saved_tensors
        scale = grad.float() * ctx.late_scale
        if divisor is not None:
            scale = scale / divisor
        return *scale_gradients(grads, ctx.dtypes, scale, keep=graph_is_kept()), None, None, None, None


class _TieEmptyLogits(Function):
    """``(loss, empty logits)`` from one node; the gradient of the empty logits carries nothing."""

    @staticmethod
    def forward(ctx, loss, shape, dtype):
        ctx.set_materialize_grads(False)
        return loss.view_as(loss), torch.empty(shape, dtype=dtype, device=loss.device)

    @staticmethod
    def backward(ctx, grad, _):
        return grad, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0,
    token_weights: Tensor | None = None, reduction: str = "mean", num_items: Tensor | float | None = None,
    return_stats: bool = False, logits_budget_mib: float = 512, low_memory: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """``cross_entropy(hidden @ weight.T + bias, labels)`` with the logits of a chunk at a time; the loss is fp32.

    ``hidden`` ``[..., H]``, ``weight`` ``[V, H]`` and ``bias`` ``[V]`` have one dtype, or any under autocast: GEMMs
    then run in autocast's dtype and gradients come back in the parameters' own, unrounded from the fp32 sums.
    ``labels`` ``[...]`` (int64 or int32) are not shifted. Positions with ``ignore_index`` cost nothing; none left gives
    a differentiable zero. The other options are those of ``cross_entropy``. ``return_stats`` adds detached
    per-token ``TokenStats``. The host waits for the device once, to count the labels that are not ignored.

    ``logits_budget_mib`` is what the transient buffer of logits may take: fewer, larger chunks are faster. Beside it
    stands a sum of the weight's gradient in fp32, which takes the memory of the gradient once more if that is bf16. One
    chunk needs no sum: if all tokens take no more than a chunk and the sum, they are one, whatever the budget.
    ``low_memory`` does without: it computes the logits twice, in slabs of the vocabulary that take at most 64 MiB, and
    beside these needs only the gradient of ``hidden`` in fp32. Both ways are equally precise.
    Under ``torch.compile`` the op is one node of the graph.

    Raises ``ValueError`` or ``TypeError`` for shapes, dtypes, options and labels out of range.
    """
    dtype = check_linear_args(hidden, weight, labels, bias, logits_budget_mib)
    check_loss_args(labels, label_smoothing, z_loss, reduction, num_items, token_weights)
    transform = logit_transform(logit_scale, softcap)
    if not use_triton(hidden) or dtype == torch.float64:
        return reference.linear_cross_entropy(
            hidden, weight, labels, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, logit_scale=logit_scale, token_weights=token_weights, reduction=reduction,
            num_items=num_items, return_stats=return_stats,
        )  # fmt: skip
    # the Function computes gradients in forward, where autograd has already switched gradients off
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    options = LossOptions(
        transform, ignore_index, label_smoothing, z_loss, reduction, logits_budget_mib, low_memory, dtype, wanted,
        return_stats,
    )  # fmt: skip
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1),
        None if token_weights is None else token_weights.reshape(-1),
    )  # fmt: skip
    if torch.compiler.is_compiling():
        loss, *stats = compiled_loss(*tensors, num_items, options)
    else:
        num_items = on_host_or_device(num_items, hidden.device)
        loss, *stats = LinearCrossEntropyFunction.apply(*tensors, num_items, options)
    if reduction == "none":
        loss = loss.view(labels.shape)
    return (loss, TokenStats(*(s.view(labels.shape) for s in stats))) if return_stats else loss


def linear_cross_entropy_with_empty_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, return_stats: bool = False, **options
) -> tuple[Tensor, TokenStats | None, Tensor]:
    """``(loss, stats or None, logits)`` where ``logits`` is empty, ``[*labels.shape, 0]`` in the GEMMs' dtype.

    Loss and empty logits leave one autograd node, so a hook that a sharded engine hangs on a module's output
    logits runs before the gradients of this op, provided the loss that is differentiated is ``loss + logits.sum()``.
    Arguments and errors are those of ``linear_cross_entropy``.
    """
    out = linear_cross_entropy(hidden, weight, labels, bias, return_stats=return_stats, **options)
    loss, stats = out if return_stats else (out, None)
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    if torch.compiler.is_compiling():  # one node of the compiled graph in any case
        return loss, stats, loss.reshape(-1)[:0].to(dtype).view(*labels.shape, 0)
    loss, empty = _TieEmptyLogits.apply(loss, (*labels.shape, 0), dtype)
    return loss, stats, empty
