"""Cross-entropy of ``hidden @ weight.T + bias`` without the logits of more than a chunk of tokens.

Per chunk: logits = X W^T (cuBLAS), one kernel that turns them in place to dlogits and gives loss and statistics,
then dX = dlogits W and dW += dlogits^T X. So gradients are computed in forward, three GEMMs in all, and backward
multiplies them by the upstream gradient. Saved: the gradients, and neither hidden states nor weight, which a sharded
engine may have freed by then. With reduction "none" the upstream gradient differs per token and is not known in
forward: hidden, weight and lse are saved, and backward computes the logits again, four GEMMs in all.

The reduction's scale is part of dlogits, except in fp16, where dividing by the number of tokens would underflow:
there the sums stay fp32 at unit scale until backward multiplies and rounds them once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .chunking import GradientSums, LinearChunks, ValidRows, valid_rows
from .launch import use_triton
from .loss_args import LogitTransform, check_linear_args, check_loss_args, logit_transform, on_host_or_device
from .reference import TokenStats
from .scale_gradients import fp16_peak, graph_is_kept, scale_gradients
from .softmax_rows import NUM_STATS, empty_rows, loss_grad_rows, loss_rows


@dataclass(frozen=True)
class LossOptions:
    """What the Function needs besides tensors; ``wanted`` tells which of hidden, weight and bias get a gradient."""

    transform: LogitTransform
    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: str
    logits_budget_mib: float
    dtype: torch.dtype  # of the GEMMs
    wanted: tuple[bool, bool, bool]
    return_stats: bool

    @property
    def kernel(self) -> dict:
        """The keywords of the row kernels."""
        return {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing, "z_loss": self.z_loss}


def loss_scale(options: LossOptions, rows: ValidRows, num_items: Tensor | float | None) -> float:
    """The part of the reduction's factor that the host knows; a ``num_items`` tensor divides apart from it."""
    if torch.is_tensor(num_items):
        return 1.0
    if num_items is not None:
        return 1.0 / num_items
    return 1.0 / max(rows.count, 1) if options.reduction == "mean" else 1.0


class LinearCrossEntropyFunction(torch.autograd.Function):
    """``(loss, log_probs, entropy, is_top1)`` of ``hidden`` ``[N, H]``; the last three ``None`` unless asked for."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, num_items, options):
        """Loss, statistics and, unless the reduction is "none", the gradients."""
        ctx.set_materialize_grads(False)
        device = hidden.device
        rows = valid_rows(labels, weight.shape[0], options.ignore_index)
        per_token = options.reduction == "none"
        grad_now = any(options.wanted) and not per_token
        scale = 1.0 if per_token else loss_scale(options, rows, num_items)
        divisor = num_items if torch.is_tensor(num_items) and not per_token else None
        late_scale = options.dtype == torch.float16
        row_weights = None if token_weights is None else rows.select(token_weights)

        token_loss, lse = empty_rows(rows.count, device), empty_rows(rows.count, device)
        stats = empty_rows(NUM_STATS * rows.count, device).view(NUM_STATS, -1) if options.return_stats else None
        with torch.autocast(device.type, enabled=False):
            chunks = LinearChunks(hidden, weight, bias, rows, options.dtype, options.logits_budget_mib)
            sums = GradientSums(chunks, hidden, weight, bias, options.wanted if grad_now else (False,) * 3)
            for span, x, logits in chunks:
                loss_rows(
                    logits, rows.labels[span], token_loss[span], lse[span], options.transform, **options.kernel,
                    token_weights=None if row_weights is None else row_weights[span],
                    stats=None if stats is None else stats[:, span], write_grad=grad_now,
                    grad_scale=1.0 if late_scale else scale, num_items=None if late_scale else divisor,
                )  # fmt: skip
                if grad_now:
                    sums.add(span, x, logits)
                del logits
            grads = sums.finish()

        ctx.options, ctx.rows_shape = options, rows.num_rows
        ctx.dtypes = [t.dtype if t is not None else None for t in (hidden, weight, bias)]
        if grad_now:
            ctx.late_scale = scale if late_scale else 1.0
            ctx.save_for_backward(*grads, divisor if late_scale else None)
        elif any(options.wanted):
            ctx.save_for_backward(hidden, weight, bias, rows.labels, rows.index, row_weights, lse)

        if per_token:
            loss = rows.spread(token_loss)
        elif rows.count == 0:
            loss = torch.zeros((), dtype=torch.float32, device=device)
        else:
            loss = token_loss.sum() * scale if divisor is None else token_loss.sum() / divisor
        if stats is None:
            return loss, None, None, None
        outputs = (rows.spread(stats[0]), rows.spread(stats[1]), rows.spread(stats[2]).bool())
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        """The gradients times the upstream one."""
        if grad is None:
            return (None,) * 7
        if ctx.options.reduction == "none":
            return *_recompute(ctx, grad), None, None, None, None
        *grads, divisor = ctx.saved_tensors
        scale = grad.float() * ctx.late_scale
        if divisor is not None:
            scale = scale / divisor
        return *scale_gradients(grads, ctx.dtypes, scale, keep=graph_is_kept()), None, None, None, None


def _recompute(ctx, grad: Tensor) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias for per-token upstream gradients ``grad`` ``[N]``."""
    hidden, weight, bias, labels, index, row_weights, lse = ctx.saved_tensors
    options, rows = ctx.options, ValidRows(labels, index, ctx.rows_shape)
    row_grad = rows.select(grad.float())
    if row_weights is not None:
        row_grad = row_grad * row_weights
    peak = fp16_peak(options.dtype, row_grad)
    row_grad = row_grad if peak is None else row_grad / peak
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = LinearChunks(hidden, weight, bias, rows, options.dtype, options.logits_budget_mib)
        sums = GradientSums(chunks, hidden, weight, bias, options.wanted)
        for span, x, logits in chunks:
            loss_grad_rows(logits, logits, labels[span], lse[span], row_grad[span], options.transform, **options.kernel)
            sums.add(span, x, logits)
        grads = sums.finish()
    return grads if peak is None else scale_gradients(grads, ctx.dtypes, peak, keep=False)


class _TieEmptyLogits(torch.autograd.Function):
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
    return_stats: bool = False, logits_budget_mib: float = 256,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """``cross_entropy(hidden @ weight.T + bias, labels)`` without materialised logits; the loss is fp32.

    ``hidden`` ``[..., H]``, ``weight`` ``[V, H]`` and ``bias`` ``[V]`` have one dtype, or any under autocast: GEMMs
    then run in autocast's dtype and gradients come back in the parameters' own, unrounded from the fp32 sums.
    ``labels`` ``[...]`` (int64 or int32) are not shifted. Positions with ``ignore_index`` cost nothing; none left gives
    a differentiable zero. The other options are those of ``cross_entropy``. ``logits_budget_mib`` bounds the
    transient buffer of logits: smaller chunks save memory and cost GEMM speed. ``return_stats`` adds detached
    per-token ``TokenStats``. The host waits for the device once, to count the labels that are not ignored.

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
        transform, ignore_index, label_smoothing, z_loss, reduction, logits_budget_mib, dtype, wanted, return_stats
    )
    loss, *stats = LinearCrossEntropyFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1),
        None if token_weights is None else token_weights.reshape(-1),
        on_host_or_device(num_items, hidden.device), options,
    )  # fmt: skip
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
    loss, empty = _TieEmptyLogits.apply(loss, (*labels.shape, 0), dtype)
    return loss, stats, empty
