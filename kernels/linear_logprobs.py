"""Per-token log-probabilities and statistics of ``hidden @ weight.T + bias`` without materialised logits.

Both differentiable outputs may get any per-token upstream gradients g and h: with H the entropy,
    d/dz_v = g (1[v = label] - p_v) - h p_v (log p_v + H)
Forward saves hidden, weight, labels, lse and H; backward computes the logits again, four GEMMs in all.

Speculation: a mean or sum of log-probabilities, the loss of supervised fine-tuning, gives every token the same g and
h = 0. Forward then also computes the gradients of the mean negative log-probability while it has the logits, three
GEMMs in all, and backward looks at g and h (one wait for the device) and scales them. Where the guess was
wrong, backward computes the logits again, and the ``Speculation`` object stops further guesses of its owner.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .chunking import GradientSums, LinearChunks, ValidRows, valid_rows
from .launch import use_triton
from .loss_args import LogitTransform, check_linear_args, logit_transform
from .reference import TokenLogProbs
from .scale_gradients import fp16_peak, graph_is_kept, scale_gradients
from .softmax_rows import NUM_STATS, empty_rows, log_prob_grad_rows, loss_rows


@dataclass
class Speculation:
    """Whether forward computes gradients ahead of backward; one a model, shared by its calls of ``linear_logprobs``.

    ``active`` turns False for good when an upstream gradient was not the same for all tokens.
    """

    active: bool = True


@dataclass(frozen=True)
class LogProbOptions:
    """What the Function needs besides tensors; ``wanted`` tells which of hidden, weight and bias get a gradient."""

    transform: LogitTransform
    ignore_index: int
    logits_budget_mib: float
    dtype: torch.dtype  # of the GEMMs
    wanted: tuple[bool, bool, bool]
    speculation: Speculation | None


class LinearLogProbsFunction(torch.autograd.Function):
    """The five fields of ``TokenLogProbs``, each ``[N]``, of ``hidden`` ``[N, H]``."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options):
        """Statistics and, where the options speculate, gradients of the mean negative log-probability."""
        ctx.set_materialize_grads(False)
        rows = valid_rows(labels, weight.shape[0], options.ignore_index)
        differentiable = any(options.wanted)
        guess = differentiable and options.speculation is not None and options.speculation.active and rows.count > 0
        token_loss, lse = empty_rows(rows.count, hidden.device), empty_rows(rows.count, hidden.device)
        stats = empty_rows(NUM_STATS * rows.count, hidden.device).view(NUM_STATS, -1)
        # fp16 would lose gradients divided by the number of tokens
        guess_scale = 1.0 if options.dtype == torch.float16 else 1.0 / max(rows.count, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = LinearChunks(hidden, weight, bias, rows, options.dtype, options.logits_budget_mib)
            sums = GradientSums(chunks, hidden, weight, bias, options.wanted if guess else (False,) * 3)
            for span, x, logits in chunks:
                loss_rows(
                    logits, rows.labels[span], token_loss[span], lse[span], options.transform,
                    ignore_index=options.ignore_index, stats=stats[:, span], all_stats=True, write_grad=guess,
                    grad_scale=guess_scale,
                )  # fmt: skip
                if guess:
                    sums.add(span, x, logits)
            # not among the saved tensors: a wrong guess is dropped before backward allocates its own
            ctx.guess = (sums.finish(), guess_scale) if guess else None

        ctx.options, ctx.num_rows = options, rows.num_rows
        ctx.dtypes = [t.dtype if t is not None else None for t in (hidden, weight, bias)]
        if differentiable:
            ctx.save_for_backward(hidden, weight, bias, rows.labels, rows.index, lse, stats[1])
        log_probs, entropy, is_top1, log_sum_sq_probs, mean_logits = (rows.spread(s) for s in stats)
        is_top1 = is_top1.bool()
        ctx.mark_non_differentiable(is_top1, log_sum_sq_probs, mean_logits)
        return log_probs, entropy, is_top1, log_sum_sq_probs, mean_logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, log_prob_grad, entropy_grad, *_):
        """The speculated gradients scaled where they are the right ones, recomputed otherwise."""
        hidden, weight, bias, labels, index, lse, entropy = ctx.saved_tensors
        rows = ValidRows(labels, index, ctx.num_rows)
        log_prob_grad = None if log_prob_grad is None else rows.select(log_prob_grad.float())
        entropy_grad = None if entropy_grad is None else rows.select(entropy_grad.float())
        if ctx.guess is not None:
            grads, guess_scale = ctx.guess
            common = _common_gradient(log_prob_grad, entropy_grad)
            keep = common is not None and graph_is_kept()
            if not keep:
                ctx.guess = None
            if common is not None:
                return *_scaled(grads, ctx.dtypes, -common / guess_scale, keep), None, None
            del grads
            ctx.options.speculation.active = False
        if log_prob_grad is None:
            log_prob_grad = torch.zeros_like(lse)
        grads = _recompute(ctx, hidden, weight, bias, rows, lse, entropy, log_prob_grad, entropy_grad)
        return *grads, None, None


def _common_gradient(log_prob_grad: Tensor | None, entropy_grad: Tensor | None) -> float | None:
    """The upstream gradient that all log-probabilities share, ``None`` if they do not or entropy has one too."""
    if log_prob_grad is None:
        return None
    bounds = [log_prob_grad.amin(), log_prob_grad.amax()]
    if entropy_grad is not None:
        bounds.append(entropy_grad.abs().amax())
    low, high, *entropy_peak = torch.stack(bounds).tolist()
    return low if low == high and not any(entropy_peak) else None


def _scaled(grads: list[Tensor | None], dtypes: list, factor: float, keep: bool) -> list[Tensor | None]:
    """The guessed gradients times ``factor``."""
    # Upstream -1/n against our 1/n: the two roundings of 1/n are the only difference from 1, and not worth a pass.
    factor = 1.0 if math.isclose(factor, 1.0, rel_tol=2**-22) else factor
    device = next(g.device for g in grads if g is not None)
    return scale_gradients(grads, dtypes, torch.full((1,), factor, dtype=torch.float32, device=device), keep)


def _recompute(ctx, hidden, weight, bias, rows, lse, entropy, log_prob_grad, entropy_grad) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias for per-token upstream gradients of the valid rows."""
    options = ctx.options
    peak = fp16_peak(options.dtype, log_prob_grad, entropy_grad)
    if peak is not None:
        log_prob_grad = log_prob_grad / peak
        entropy_grad = None if entropy_grad is None else entropy_grad / peak
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = LinearChunks(hidden, weight, bias, rows, options.dtype, options.logits_budget_mib)
        sums = GradientSums(chunks, hidden, weight, bias, options.wanted)
        for span, x, logits in chunks:
            log_prob_grad_rows(
                logits, rows.labels[span], lse[span], entropy[span], log_prob_grad[span],
                None if entropy_grad is None else entropy_grad[span], options.transform,
            )  # fmt: skip
            sums.add(span, x, logits)
        grads = sums.finish()
    return grads if peak is None else scale_gradients(grads, ctx.dtypes, peak, keep=False)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0, logits_budget_mib: float = 256,
    speculation: Speculation | None = None,
) -> TokenLogProbs:  # fmt: skip
    """Statistics of ``softmax(transform(hidden @ weight.T + bias) / temperature)`` at each position, fp32.

    ``hidden`` ``[..., H]``, ``weight`` ``[V, H]`` and ``bias`` ``[V]`` have one dtype, or any under autocast;
    ``labels`` ``[...]`` (int64 or int32) are not shifted. The fields of the result have the labels' shape and
    are 0 where the label is ``ignore_index``; such positions cost nothing. ``log_probs`` and ``entropy`` are
    differentiable.
    ``logits_budget_mib`` bounds the transient buffer of logits. With an active ``speculation`` the gradients of
    the mean log-probability are computed in forward and used if they turn out to be the ones that backward wants.
    The host waits for the device once in forward, and once in backward after a speculation.

    Raises ``ValueError`` or ``TypeError`` for shapes, dtypes, options and labels out of range.
    """
    dtype = check_linear_args(hidden, weight, labels, bias, logits_budget_mib)
    transform = logit_transform(logit_scale, softcap, temperature)
    if not use_triton(hidden) or dtype == torch.float64:
        return reference.linear_logprobs(
            hidden, weight, labels, bias, ignore_index=ignore_index, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale,
        )  # fmt: skip
    # the Function computes gradients in forward, where autograd has already switched gradients off
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    options = LogProbOptions(transform, ignore_index, logits_budget_mib, dtype, wanted, speculation)
    fields = LinearLogProbsFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), options
    )  # fmt: skip
    return TokenLogProbs(*(field.view(labels.shape) for field in fields))
