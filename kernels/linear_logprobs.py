"""Per-token log-probabilities and statistics of ``hidden @ weight.T + bias`` without materialised logits.

Both differentiable outputs may get any per-token upstream gradients g and h: with H the entropy,
    d/dz_v = g (1[v = label] - p_v) - h p_v (log p_v + H)
Forward saves hidden, weight, labels, lse and H; backward computes the logits again, four GEMMs in all, in vocabulary
chunks (linear_loss/vocab_chunks.py): as fast as token chunks, and without their fp32 sum of dweight.

Speculation: a mean or sum of log-probabilities, the loss of supervised fine-tuning, gives every token the same g and
h = 0. Forward then also computes the gradients of the mean negative log-probability while it has the logits, three
GEMMs in all, and backward looks at g and h (one wait for the device) and scales them. Where the guess was
wrong, backward computes the logits again, and the ``Speculation`` object stops further guesses of its owner.
"""

import math
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from . import reference
from .linear_loss.gradients import graph_is_kept, scale_gradients
from .linear_loss.options import (
    ALL_STATS,
    Gradients,
    HeadOptions,
    MemoryKeywords,
    check_linear_args,
    logit_transform,
    memory_options,
    sum_dtype,
    wanted_gradients,
)
from .linear_loss.passes import compiled_pass, gemms_of, per_token, recompute, spread_stats
from .linear_loss.token_chunks import ValidRows, valid_rows
from .reference import IGNORE_INDEX, TokenLogProbs
from .runtime.autograd import Function, differentiate
from .runtime.launch import is_plain


@dataclass
class Speculation:
    """Whether forward computes gradients ahead of backward; one per model, shared by its calls of ``linear_logprobs``.

    ``active`` becomes False, and stays so, when an upstream gradient was not the same for all tokens.
    """

    active: bool = True


NUM_INPUTS = 4  # hidden, weight, bias, labels


class LinearLogProbsFunction(Function):
    """The five fields of ``TokenLogProbs``, each ``[N]``, of ``hidden`` ``[N, H]``."""

    @staticmethod
    def definition(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: HeadOptions,
        speculation: Speculation | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The same in plain PyTorch."""
        with gemms_of(options, hidden, weight):
            return reference.linear_logprobs(
                hidden, weight, labels, bias, ignore_index=options.ignore_index, **options.transform.keywords
            )

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: HeadOptions,
        speculation: Speculation | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Statistics and, with an active speculation, gradients of the mean negative log-probability."""
        ctx.set_materialize_grads(False)
        params = (hidden, weight, bias)
        rows = valid_rows(labels, weight.shape[0], options.ignore_index)
        differentiable = any(options.wanted)
        guess = differentiable and speculation is not None and speculation.active and rows.count > 0
        # fp16 would lose gradients divided by the number of tokens
        scale = 1.0 if options.dtype == torch.float16 else 1.0 / max(rows.count, 1)
        out = per_token(params, labels, rows, options, scale if guess else None)
        # The guess is not among the saved tensors: a wrong one is dropped before backward allocates its own.
        ctx.guess = (out.grads, scale) if guess else None
        ctx.options, ctx.speculation, ctx.num_rows = options, speculation, rows.num_rows
        ctx.dtypes = [t.dtype if t is not None else None for t in params]
        assert out.stats is not None  # ALL_STATS
        if differentiable:
            ctx.save_for_backward(*params, labels, rows.labels, rows.index, out.lse, out.stats[1])
        stats = spread_stats(rows, out.stats, options)
        ctx.mark_non_differentiable(*stats[2:])
        return tuple(stats)

    @staticmethod
    def backward(
        ctx: Any, log_prob_grad: Tensor | None, entropy_grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients for any upstream gradients of log-probs and entropies."""
        if not torch.is_grad_enabled():
            return LinearLogProbsFunction.gradients(ctx, log_prob_grad, entropy_grad)
        args = (*ctx.saved_tensors[:NUM_INPUTS], ctx.options, None)
        return differentiate(LinearLogProbsFunction.definition, args, (log_prob_grad, entropy_grad))

    @staticmethod
    def gradients(ctx: Any, log_prob_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The guessed gradients, scaled, where they are the right ones; otherwise they are computed now."""
        *params, _, labels, index, lse, entropy = ctx.saved_tensors
        rows = ValidRows(labels, index, ctx.num_rows)
        log_prob_grad, entropy_grad = rows.gradient(log_prob_grad), rows.gradient(entropy_grad)
        if ctx.guess is not None:
            grads, guess_scale = ctx.guess
            common = _common_gradient(log_prob_grad, entropy_grad)
            keep = common is not None and graph_is_kept()
            if not keep:
                ctx.guess = None
            if common is not None:
                return *_scaled(grads, ctx.dtypes, -common / guess_scale, keep), None, None, None
            del grads
            ctx.speculation.active = False
        row_grad = None if log_prob_grad is None else -log_prob_grad
        return *recompute(tuple(params), rows, lse, ctx.options, row_grad, entropy_grad, entropy), None, None, None


def _common_gradient(log_prob_grad: Tensor | None, entropy_grad: Tensor | None) -> float | None:
    """The upstream gradient that all log-probabilities share, ``None`` if they do not or entropy has one too."""
    if log_prob_grad is None:
        return None
    bounds = [log_prob_grad.amin(), log_prob_grad.amax()]
    if entropy_grad is not None:
        bounds.append(entropy_grad.abs().amax())
    low, high, *entropy_peak = torch.stack(bounds).tolist()
    return low if low == high and not any(entropy_peak) else None


def _scaled(grads: Gradients, dtypes: list[torch.dtype | None], factor: float, keep: bool) -> Gradients:
    """The guessed gradients times ``factor``."""
    like = next(g for g in grads if g is not None)
    dtype = sum_dtype(like.dtype)
    # Upstream -1/n against our 1/n: the two roundings of 1/n are the only difference from 1, and not worth a pass.
    factor = 1.0 if math.isclose(factor, 1.0, rel_tol=2 * torch.finfo(dtype).eps) else factor
    return scale_gradients(grads, dtypes, torch.full((), factor, dtype=dtype, device=like.device), keep)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
    speculation: Speculation | None = None, **memory: Unpack[MemoryKeywords],
) -> TokenLogProbs:  # fmt: skip
    """Statistics of ``softmax(transform(hidden @ weight.T + bias) / temperature)`` at each position, in fp32 or fp64.

    The host waits for the device once in forward, and once in backward after a speculation. Under ``torch.compile`` the
    op is one node of the graph, and does not speculate.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``. ``hidden``, ``weight`` and ``bias`` have one dtype, or any under autocast.
        labels: ``[...]`` (int64 or int32), not shifted. Positions with ``ignore_index`` cost nothing.
        bias: ``[V]``.
        ignore_index, softcap, logit_scale: as in ``cross_entropy``.
        temperature: divides the transformed logits.
        speculation: if active, forward also computes the gradients of the mean log-probability, and backward uses them
            if they are the right ones.
        **memory: the fields of ``linear_loss.options.MemoryOptions``, such as ``low_memory``.

    Returns:
        Fields of the labels' shape, 0 where the label is ``ignore_index``; ``log_probs`` and ``entropy`` are
        differentiable.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    memory_of_op = memory_options("linear_logprobs", memory)
    dtype = check_linear_args(hidden, weight, labels, bias)
    transform = logit_transform(logit_scale, softcap, temperature)
    options = HeadOptions(
        transform, ignore_index, dtype, wanted_gradients(hidden, weight, bias), memory_of_op, ALL_STATS
    )
    if not is_plain(hidden, weight, bias, labels):
        return TokenLogProbs(*LinearLogProbsFunction.definition(hidden, weight, bias, labels, options, None))
    params = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    if torch.compiler.is_compiling():
        _, *fields = compiled_pass(params, labels.reshape(-1), None, None, options)
    else:
        fields = LinearLogProbsFunction.apply(*params, labels.reshape(-1), options, speculation)
    return TokenLogProbs(*(field.view(labels.shape) for field in fields))
