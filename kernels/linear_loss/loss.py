"""What ``linear_cross_entropy`` computes, in forward and in backward, apart from how autograd is told of it.

Where every gradient is known in forward (a reduced loss), ``loss_forward`` computes the gradients as well: by chunks of
tokens, three GEMMs, or with ``low_memory`` by slabs of the vocabulary, four. Where it is not (reduction "none"),
``loss_recompute`` computes them later from logits computed again, four GEMMs.

The reduction's scale is part of dlogits, except in fp16, where dividing by the number of tokens would underflow:
there the sums stay fp32 at unit scale until backward multiplies and rounds them once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .options import LogitTransform
from .scale_gradients import fp16_peak, scale_gradients
from .slab_rows import loss_coefficients
from .softmax_rows import NUM_STATS, empty_rows, loss_grad_rows, loss_rows
from .token_chunks import GradientSums, LinearChunks, ValidRows, valid_rows
from .vocab_chunks import VocabSlabs, compute_ignored_too

LOW_MEMORY_MIB = 64  # the logits buffer of low_memory


@dataclass(frozen=True)
class LossOptions:
    """What is computed, besides tensors; ``wanted`` tells which of hidden, weight and bias get a gradient."""

    transform: LogitTransform
    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: str
    logits_budget_mib: float
    low_memory: bool
    dtype: torch.dtype  # of the GEMMs
    wanted: tuple[bool, bool, bool]
    return_stats: bool

    @property
    def kernel(self) -> dict:
        """The keywords of the row kernels."""
        return {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing, "z_loss": self.z_loss}

    @property
    def grad_now(self) -> bool:
        """Whether forward computes the gradients."""
        return any(self.wanted) and self.reduction != "none"

    @property
    def budget_mib(self) -> float:
        """Upper bound of the logits buffer."""
        return buffer_mib(self.logits_budget_mib, self.low_memory)


class LossResult(NamedTuple):
    """``loss`` 0-d, or ``[N]`` unreduced; ``stats`` log-prob, entropy and top-1, ``[N]``, or ``None``.

    ``grads`` of hidden, weight and bias (all ``None`` unless computed now) are still to be multiplied by ``late_scale``
    and divided by ``late_divisor``; ``lse`` is that of the valid ``rows``.
    """

    loss: Tensor
    stats: tuple[Tensor, Tensor, Tensor] | None
    grads: list[Tensor | None]
    late_scale: float
    late_divisor: Tensor | None
    lse: Tensor
    rows: ValidRows


def buffer_mib(logits_budget_mib: float, low_memory: bool) -> float:
    """Upper bound of the logits buffer."""
    return min(logits_budget_mib, LOW_MEMORY_MIB) if low_memory else logits_budget_mib


def sums_over_tokens(wanted: tuple[bool, bool, bool]) -> bool:
    """Whether a gradient is a sum over all tokens: with hidden's alone, chunks of tokens need no fp32 sum at all."""
    return wanted[1] or wanted[2]


def loss_scale(options: LossOptions, rows: ValidRows, num_items: Tensor | float | None) -> float:
    """The part of the reduction's factor that the host knows; a ``num_items`` tensor divides apart from it."""
    if options.reduction == "none" or torch.is_tensor(num_items):
        return 1.0
    if num_items is not None:
        return 1.0 / num_items
    return 1.0 / max(rows.count, 1) if options.reduction == "mean" else 1.0


def loss_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None,
    num_items: Tensor | float | None, options: LossOptions,
) -> LossResult:  # fmt: skip
    """Loss, statistics if asked for, and the gradients wherever they are known by now; ``hidden`` is ``[N, H]``."""
    rows = valid_rows(labels, weight.shape[0], options.ignore_index)
    scale = loss_scale(options, rows, num_items)
    divisor = num_items.reshape(()) if torch.is_tensor(num_items) and options.reduction != "none" else None
    late = options.dtype == torch.float16
    by_slabs = options.low_memory and (sums_over_tokens(options.wanted) or not options.wanted[0])
    compute = _by_slabs if by_slabs else _by_chunks
    with torch.autocast(hidden.device.type, enabled=False):
        token_loss, lse, stats, grads = compute(
            (hidden, weight, bias), labels, rows, token_weights, 1.0 if late else scale, None if late else divisor,
            options,
        )  # fmt: skip
    if options.reduction == "none":
        loss = rows.spread(token_loss)
    elif rows.count == 0:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    else:
        loss = token_loss.sum() * scale if divisor is None else token_loss.sum() / divisor
    if stats is not None:
        stats = (rows.spread(stats[0]), rows.spread(stats[1]), rows.spread(stats[2]).bool())
    return LossResult(loss, stats, grads, scale if late else 1.0, divisor if late else None, lse, rows)


def _by_chunks(params, labels, rows, token_weights, scale, divisor, options):
    """``(token loss, lse, statistics [5, n] or None, gradients)``, each row's logits computed once."""
    row_weights = None if token_weights is None else rows.select(token_weights)
    device = params[0].device
    token_loss, lse = empty_rows(rows.count, device), empty_rows(rows.count, device)
    stats = empty_rows(NUM_STATS * rows.count, device).view(NUM_STATS, -1) if options.return_stats else None
    wanted = options.wanted if options.grad_now else (False,) * 3
    chunks = LinearChunks(*params, rows, options.dtype, options.budget_mib, wanted)
    sums = GradientSums(chunks, *params)
    for span, x, logits in chunks:
        loss_rows(
            logits, rows.labels[span], token_loss[span], lse[span], options.transform, **options.kernel,
            token_weights=None if row_weights is None else row_weights[span],
            stats=None if stats is None else stats[:, span], write_grad=options.grad_now, grad_scale=scale,
            num_items=divisor,
        )  # fmt: skip
        if options.grad_now:
            sums.add(span, x, logits)
        del logits
    return token_loss, lse, stats, sums.finish()


def _by_slabs(params, labels, rows, token_weights, scale, divisor, options):
    """The same with each row's logits computed a slab of the vocabulary at a time, twice where there are gradients."""
    slab_rows = compute_ignored_too(rows, labels)
    slabs = VocabSlabs(*params, slab_rows, options.dtype, options.budget_mib)
    lse, fields = slabs.statistics(options.transform, all_stats=options.return_stats)
    token_loss = (
        options.z_loss * lse.square()
        - (1 - options.label_smoothing) * fields[0]
        + options.label_smoothing * (lse - fields[4])
    )
    row_weights = torch.ones_like(lse) if token_weights is None else slab_rows.select(token_weights).float()
    if slab_rows is not rows:
        row_weights = row_weights.masked_fill(slab_rows.labels == options.ignore_index, 0.0)
    token_loss *= row_weights
    grads = [None, None, None]
    if options.grad_now:
        row_grad = row_weights * scale if divisor is None else row_weights * scale / divisor
        vocab_size = params[1].shape[0]
        coefficients = loss_coefficients(row_grad, lse, options.label_smoothing, options.z_loss, vocab_size)
        grads = slabs.gradients(lse, coefficients, options.transform, options.wanted)
    if slab_rows is not rows:
        token_loss, lse, fields = (t.index_select(-1, rows.index) for t in (token_loss, lse, fields))
    return token_loss, lse, fields if options.return_stats else None, grads


def loss_recompute(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: ValidRows, token_weights: Tensor | None,
    lse: Tensor, options: LossOptions,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of hidden, weight and bias for upstream gradients ``grad`` ``[N]`` of the unreduced loss."""
    row_grad = rows.select(grad.float())
    if token_weights is not None:
        row_grad = row_grad * rows.select(token_weights)
    peak = fp16_peak(options.dtype, row_grad)
    row_grad = row_grad if peak is None else row_grad / peak
    with torch.autocast(hidden.device.type, enabled=False):
        if sums_over_tokens(options.wanted):
            slabs = VocabSlabs(hidden, weight, bias, rows, options.dtype, options.budget_mib)
            coefficients = loss_coefficients(row_grad, lse, options.label_smoothing, options.z_loss, weight.shape[0])
            grads = slabs.gradients(lse, coefficients, options.transform, options.wanted)
        else:
            chunks = LinearChunks(hidden, weight, bias, rows, options.dtype, options.budget_mib, options.wanted)
            sums = GradientSums(chunks, hidden, weight, bias)
            for span, x, logits in chunks:
                loss_grad_rows(
                    logits, logits, rows.labels[span], lse[span], row_grad[span], options.transform, **options.kernel
                )
                sums.add(span, x, logits)
            grads = sums.finish()
    if peak is None:
        return grads
    dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
    return scale_gradients(grads, dtypes, peak, keep=False)
