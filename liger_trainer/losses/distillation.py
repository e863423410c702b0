"""Distillation: the divergence of the student's next-token distribution from the teacher's, and the labels' NLL.

Both models' logits exist for one chunk of tokens at a time. ``kernels/divergence.py`` has the formulas and their
sources, ``chunked.py`` the loop.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.linear_loss.options import check_linear_args, check_num_items
from ..kernels.linear_loss.token_chunks import valid_rows
from ..kernels.reference import IGNORE_INDEX, reduce_loss
from ..kernels.runtime.operators import uncompiled
from .chunked import DistillationFunction, DistillationOptions, TopTokens
from .divergences import DIVERGENCES
from .per_token import active_tokens, check_choice, check_positive, check_shape

LOGITS_BUDGET_MIB = 2048.0


class DistillationStats(NamedTuple):
    """Detached numbers for logging, fp32 and 0-d: the two terms before their weights; ``hard`` is 0 if not computed."""

    soft: Tensor
    hard: Tensor


def _top_tokens(log_probs: Tensor, token_ids: Tensor | None, labels: Tensor, vocab_size: int) -> TopTokens:
    """The teacher's most probable tokens, checked; ``[B, T, K]``."""
    if log_probs.dim() != 3 or log_probs.shape[:2] != labels.shape or log_probs.shape[2] == 0:
        expected = f"(*labels.shape, K) with K > 0, labels.shape = {tuple(labels.shape)}"
        raise ValueError(f"teacher_log_probs: got shape {tuple(log_probs.shape)}; must be {expected}")
    if token_ids is None:
        raise ValueError("teacher_token_ids: got None; must be given with teacher_log_probs")
    check_shape("teacher_token_ids", token_ids, tuple(log_probs.shape))
    if token_ids.is_floating_point() or bool((token_ids >= vocab_size).any()):
        raise ValueError(
            f"teacher_token_ids: got {token_ids.dtype} up to {token_ids.max()}; must be below V = {vocab_size}"
        )
    return TopTokens(log_probs.detach(), token_ids.long())


def _teacher_args(
    teacher_hidden: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None,
    teacher_log_probs: Tensor | None, teacher_token_ids: Tensor | None, labels: Tensor, vocab_size: int,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], bool, torch.dtype]:  # fmt: skip
    """``(the teacher's three tensors, whether they are those of a head, dtype of its GEMMs)``."""
    head = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    top = {"teacher_log_probs": teacher_log_probs, "teacher_token_ids": teacher_token_ids}
    given = [name for name, tensor in {**head, **top}.items() if tensor is not None]
    if teacher_log_probs is not None and not {*given} & {*head}:
        tokens = _top_tokens(teacher_log_probs, teacher_token_ids, labels, vocab_size)
        return (tokens.log_probs, tokens.token_ids, None), False, tokens.log_probs.dtype
    if teacher_hidden is None or teacher_weight is None or {*given} & {*top}:
        raise ValueError(
            f"teacher: got {', '.join(given) or 'nothing'}; must be teacher_hidden and teacher_weight, or "
            "teacher_log_probs and teacher_token_ids"
        )
    if teacher_weight.shape[0] != vocab_size:
        raise ValueError(
            f"teacher_weight: got a vocabulary of {teacher_weight.shape[0]}; must be the student's, {vocab_size} "
            "(slice off the rows that only pad one of the two)"
        )
    dtype = check_linear_args(teacher_hidden, teacher_weight, labels, teacher_bias)
    bias = None if teacher_bias is None else teacher_bias.detach()
    return (teacher_hidden.detach(), teacher_weight.detach(), bias), True, dtype


@uncompiled
def distillation_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *,
    teacher_hidden: Tensor | None = None, teacher_weight: Tensor | None = None, teacher_bias: Tensor | None = None,
    teacher_log_probs: Tensor | None = None, teacher_token_ids: Tensor | None = None, mask: Tensor | None = None,
    divergence: str = "forward_kl", beta: float = 0.5, soft_weight: float = 1.0, hard_weight: float = 0.0,
    temperature: float = 1.0, ignore_index: int = IGNORE_INDEX, logit_scale: float = 1.0, softcap: float | None = None,
    teacher_logit_scale: float = 1.0, teacher_softcap: float | None = None, num_items: Tensor | float | None = None,
    logits_budget_mib: float = LOGITS_BUDGET_MIB, return_stats: bool = False,
) -> Tensor | tuple[Tensor, DistillationStats]:  # fmt: skip
    """``soft_weight`` times the divergence from the teacher plus ``hard_weight`` times the labels' NLL; no logits.

    Averaged over tokens. The host waits for the device once. ``torch.compile`` breaks the graph here and runs the loss
    as it is.

    Args:
        hidden: ``[B, T, H]``, the student's last hidden states.
        weight: ``[V, H]`` of the student's head; dtypes as in ``linear_logprobs``.
        labels: ``[B, T]`` (int64 or int32), the token that each hidden state predicts (not shifted). Positions with
            ``ignore_index`` cost nothing. The labels' values matter for ``hard_weight`` only.
        bias: ``[V]``.
        teacher_hidden: ``[B, T, H']``, the teacher's last hidden states. Constants, like all that is the teacher's.
        teacher_weight, teacher_bias: ``[V, H']`` and ``[V]`` of the teacher's head.
        teacher_log_probs: instead of these, ``[B, T, K]``: log-probabilities of the teacher's K most probable tokens,
            computed at ``temperature``, for instance read from disk. All other tokens together are one more outcome of
            both distributions. Not for ``"cosine"``.
        teacher_token_ids: ``[B, T, K]`` integers, the tokens of ``teacher_log_probs``, each at most once; negative
            where a position has fewer than K.
        mask: ``[B, T]``, nonzero where a labelled token counts; by default all of them do.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"``, ``"tvd"`` or ``"cosine"`` (of the logits).
        beta: share of the teacher in the mixture of ``"jsd"``, in (0, 1). Near 0 the divergence is ``beta`` times the
            forward KL, near 1 it is ``1 - beta`` times the reverse KL.
        soft_weight, hard_weight: weights of the two terms.
        temperature: divides both models' logits in the divergence, not in the NLL. Gradients shrink with its square; to
            make up for that, multiply ``soft_weight`` by ``temperature ** 2``.
        ignore_index: label of positions that do not count.
        logit_scale, softcap: ``z = softcap * tanh(logit_scale * logits / softcap)``, or without cap for ``None``.
        teacher_logit_scale, teacher_softcap: the same of the teacher.
        num_items: divisor instead of the number of tokens that count: those of all micro-batches of a step.
        logits_budget_mib: memory, in MiB, of all that exists of one chunk's logits.
        return_stats: also return ``DistillationStats``.

    Returns:
        The loss, fp32 and 0-d, or ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported.
    """
    check_choice("divergence", divergence, DIVERGENCES)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta: got {beta}; must be in (0, 1); 'forward_kl' and 'reverse_kl' are the two ends")
    for name, value in (("temperature", temperature), ("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if value is not None:
            check_positive(name, value)
    check_positive("logits_budget_mib", logits_budget_mib)
    check_num_items(num_items)
    if hidden.dim() != 3:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}; must be [batch, tokens, hidden size]")
    dtype = check_linear_args(hidden, weight, labels, bias)
    vocab_size = weight.shape[0]
    teacher, has_teacher_head, teacher_dtype = _teacher_args(
        teacher_hidden, teacher_weight, teacher_bias, teacher_log_probs, teacher_token_ids, labels, vocab_size
    )
    if divergence == "cosine" and not has_teacher_head:
        raise ValueError("divergence: got 'cosine' with teacher_log_probs; must be one of distributions")
    options = DistillationOptions(
        divergence, beta, temperature, logit_scale, softcap, teacher_logit_scale, teacher_softcap, bool(hard_weight),
        dtype, teacher_dtype, logits_budget_mib,
    )  # fmt: skip
    active = active_tokens(labels, mask, ignore_index)
    rows = valid_rows(labels.masked_fill(~active, ignore_index).reshape(-1), vocab_size, ignore_index)

    def selected(per_token: Tensor) -> Tensor:
        flat = per_token.reshape(-1, per_token.shape[-1])
        return flat if rows.index is None else flat.index_select(0, rows.index)

    first, second, third = teacher
    teacher_rows = (selected(first), second if has_teacher_head else selected(second), third)
    soft, hard, _ = DistillationFunction.apply(
        selected(hidden), weight, bias, rows.labels, *teacher_rows, options, has_teacher_head
    )
    every = torch.ones_like(soft, dtype=torch.bool)
    soft_mean, hard_mean = (reduce_loss(term, every, "mean", num_items) for term in (soft, hard))
    loss = soft_weight * soft_mean + hard_weight * hard_mean
    return (loss, DistillationStats(soft_mean.detach(), hard_mean.detach())) if return_stats else loss
