"""Per-token log-probabilities and statistics of ``hidden @ weight.T + bias`` without materialised logits.

Both differentiable outputs may get any per-token upstream gradients g and h: with H the entropy,
    d/dz_v = g (1[v = label] - p_v) - h p_v (log p_v + H)
Forward saves hidden, weight, labels, lse and H; backward computes the logits again, four GEMMs in all, in slabs of the
vocabulary (slabs.py): as fast as chunks of tokens, and without their fp32 sum of dweight.

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
from .linear_loss.loss import buffer_mib, sums_over_tokens
from .linear_loss.options import LogitTransform, check_linear_args, logit_transform
from .linear_loss.scale_gradients import fp16_peak, graph_is_kept, scale_gradients
from .linear_loss.slab_rows import log_prob_coefficients
from .linear_loss.softmax_rows import NUM_STATS, empty_rows, log_prob_grad_rows, loss_rows
from .linear_loss.token_chunks import GradientSums, LinearChunks, ValidRows, valid_rows
from .linear_loss.vocab_chunks import VocabSlabs, compute_ignored_too
from .reference import TokenLogProbs
from .runtime.autograd import Function
from .runtime.launch import use_triton
from .runtime.operators import opaque_op, or_empty


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
    budget_mib: float
    low_memory: bool
    dtype: torch.dtype  # of the GEMMs
    wanted: tuple[bool, bool, bool]
    speculation: Speculation | None


class LinearLogProbsFunction(Function):
    """The five fields of ``TokenLogProbs``, each ``[N]``, of ``hidden`` ``[N, H]``."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options):
        """Statistics and, where the options speculate, gradients of the mean negative log-probability."""
        ctx.set_materialize_grads(False)
        rows = valid_rows(labels, weight.shape[0], options.ignore_index)
        differentiable = any(options.wanted)
        guess = differentiable and options.speculation is not None and options.speculation.active and rows.count > 0
        with torch.autocast(hidden.device.type, enabled=False):
            compute = _forward_by_slabs if options.low_memory else _forward_by_chunks
            stats, lse, ctx.guess = compute(hidden, weight, bias, labels, rows, guess, options)

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
        grads = _recompute(ctx.options, hidden, weight, bias, rows, lse, entropy, log_prob_grad, entropy_grad)
        return *grads, None, None


def _forward_by_chunks(hidden, weight, bias, labels, rows, guess, options):
    """``(statistics [5, n], lse [n], guess)``; the guess is gradients and their scale, or ``None``.

    The guess is not among the saved tensors: a wrong one is dropped before backward allocates its own.
    """
    token_loss, lse = empty_rows(rows.count, hidden.device), empty_rows(rows.count, hidden.device)
    stats = empty_rows(NUM_STATS * rows.count, hidden.device).view(NUM_STATS, -1)
    scale = _guess_scale(rows, options)
    wanted = options.wanted if guess else (False,) * 3
    chunks = LinearChunks(hidden, weight, bias, rows, options.dtype, options.budget_mib, wanted)
    sums = GradientSums(chunks, hidden, weight, bias)
    for span, x, logits in chunks:
        loss_rows(
            logits, rows.labels[span], token_loss[span], lse[span], options.transform,
            ignore_index=options.ignore_index, stats=stats[:, span], all_stats=True, write_grad=guess, grad_scale=scale,
        )  # fmt: skip
        if guess:
            sums.add(span, x, logits)
        del logits
    return stats, lse, (sums.finish(), scale) if guess else None


def _forward_by_slabs(hidden, weight, bias, labels, rows, guess, options):
    """The same with the logits of the guess computed a second time, a slab of the vocabulary at a time."""
    slab_rows = compute_ignored_too(rows, labels)
    slabs = VocabSlabs(hidden, weight, bias, slab_rows, options.dtype, options.budget_mib)
    lse, stats = slabs.statistics(options.transform, all_stats=True)
    guessed = None
    if guess:
        scale = _guess_scale(rows, options)
        log_prob_grad = torch.full_like(lse, -scale).masked_fill(slab_rows.labels == options.ignore_index, 0.0)
        coefficients = log_prob_coefficients(log_prob_grad, None, stats[1])
        guessed = (slabs.gradients(lse, coefficients, options.transform, options.wanted), scale)
    if slab_rows is not rows:
        lse, stats = lse.index_select(0, rows.index), stats.index_select(1, rows.index)
    return stats, lse, guessed


def _guess_scale(rows: ValidRows, options: LogProbOptions) -> float:
    # fp16 would lose gradients divided by the number of tokens
    return 1.0 if options.dtype == torch.float16 else 1.0 / max(rows.count, 1)


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


def _recompute(options, hidden, weight, bias, rows, lse, entropy, log_prob_grad, entropy_grad) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias for per-token upstream gradients of the valid rows."""
    peak = fp16_peak(options.dtype, log_prob_grad, entropy_grad)
    if peak is not None:
        log_prob_grad = log_prob_grad / peak
        entropy_grad = None if entropy_grad is None else entropy_grad / peak
    with torch.autocast(hidden.device.type, enabled=False):
        if sums_over_tokens(options.wanted):
            slabs = VocabSlabs(hidden, weight, bias, rows, options.dtype, options.budget_mib)
            coefficients = log_prob_coefficients(log_prob_grad, entropy_grad, entropy)
            grads = slabs.gradients(lse, coefficients, options.transform, options.wanted)
        else:
            chunks = LinearChunks(hidden, weight, bias, rows, options.dtype, options.budget_mib, options.wanted)
            sums = GradientSums(chunks, hidden, weight, bias)
            for span, x, logits in chunks:
                log_prob_grad_rows(
                    logits, rows.labels[span], lse[span], entropy[span], log_prob_grad[span],
                    None if entropy_grad is None else entropy_grad[span], options.transform,
                )  # fmt: skip
                sums.add(span, x, logits)
            grads = sums.finish()
    if peak is None:
        return grads
    dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
    return scale_gradients(grads, dtypes, peak, keep=False)


def _unpack(ignore_index: int, numbers: list[float], flags: list[bool], dtype: torch.dtype) -> LogProbOptions:
    """The options, from what an operator's schema can hold."""
    inner, outer, budget = numbers
    has_softcap, low_memory, *wanted = flags
    transform = LogitTransform(inner, outer, has_softcap)
    return LogProbOptions(transform, ignore_index, budget, low_memory, dtype, tuple(wanted), None)


def _opaque_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, numbers: list[float],
    flags: list[bool], dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The five fields and lse, each ``[N]``; under ``torch.compile`` nothing is speculated."""
    options = _unpack(ignore_index, numbers, flags, dtype)
    rows = valid_rows(labels, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        compute = _forward_by_slabs if options.low_memory else _forward_by_chunks
        stats, lse, _ = compute(hidden, weight, bias, labels, rows, False, options)
    log_probs, entropy, is_top1, *others = (rows.spread(s) for s in stats)
    return log_probs, entropy, is_top1.bool(), *others, rows.spread(lse)


def _fake_forward(hidden, weight, bias, labels, *_):
    return tuple(labels.new_empty(labels.shape, dtype=torch.bool if i == 2 else torch.float32) for i in range(6))


def _opaque_backward(
    log_prob_grad: Tensor | None, entropy_grad: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, lse: Tensor, entropy: Tensor, ignore_index: int, numbers: list[float], flags: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias."""
    rows = valid_rows(labels, weight.shape[0], ignore_index)
    lse, entropy = rows.select(lse), rows.select(entropy)
    log_prob_grad = torch.zeros_like(lse) if log_prob_grad is None else rows.select(log_prob_grad.float())
    entropy_grad = None if entropy_grad is None else rows.select(entropy_grad.float())
    options = _unpack(ignore_index, numbers, flags, dtype)
    grads = _recompute(options, hidden, weight, bias, rows, lse, entropy, log_prob_grad, entropy_grad)
    return tuple(or_empty(g, lse) for g in grads)


def _fake_backward(log_prob_grad, entropy_grad, hidden, weight, bias, labels, lse, entropy, index, numbers, flags, _):
    params = zip((hidden, weight, bias), flags[-3:], strict=True)
    return tuple(p.new_empty(p.shape) if want else lse.new_empty(0) for p, want in params)


def _save(ctx, inputs, output):
    hidden, weight, bias, labels, *ctx.packed = inputs
    _, entropy, *others, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others, lse)
    ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy)


def _differentiate(ctx, log_prob_grad, entropy_grad, *_):
    if log_prob_grad is None and entropy_grad is None:
        return (None,) * 8
    grads = _backward_op(log_prob_grad, entropy_grad, *ctx.saved_tensors, *ctx.packed)
    wanted = ctx.packed[2][-3:]
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * 5


_backward_op = opaque_op("linear_logprobs_backward", _opaque_backward, _fake_backward, waits=True)
_forward_op = opaque_op("linear_logprobs", _opaque_forward, _fake_forward, _differentiate, _save, waits=True)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0, logits_budget_mib: float = 512,
    low_memory: bool = False, speculation: Speculation | None = None,
) -> TokenLogProbs:  # fmt: skip
    """Statistics of ``softmax(transform(hidden @ weight.T + bias) / temperature)`` at each position, fp32.

    ``hidden`` ``[..., H]``, ``weight`` ``[V, H]`` and ``bias`` ``[V]`` have one dtype, or any under autocast;
    ``labels`` ``[...]`` (int64 or int32) are not shifted. The fields of the result have the labels' shape and
    are 0 where the label is ``ignore_index``; such positions cost nothing. ``log_probs`` and ``entropy`` are
    differentiable.
    ``logits_budget_mib`` and ``low_memory`` are those of ``linear_cross_entropy``. With an active ``speculation`` the
    gradients of the mean log-probability are computed in forward and used if they turn out to be the ones that backward
    wants.
    The host waits for the device once in forward, and once in backward after a speculation. Under ``torch.compile`` the
    op is one node of the graph, and does not speculate.

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
    budget = buffer_mib(logits_budget_mib, low_memory)
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1))
    if torch.compiler.is_compiling():
        numbers = [float(transform.inner), float(transform.outer), float(budget)]
        *fields, _ = _forward_op(*tensors, ignore_index, numbers, [transform.has_softcap, low_memory, *wanted], dtype)
    else:
        options = LogProbOptions(transform, ignore_index, budget, low_memory, dtype, wanted, speculation)
        fields = LinearLogProbsFunction.apply(*tensors, options)
    return TokenLogProbs(*(field.view(labels.shape) for field in fields))
