"""KTO: a loss of sequences that are each marked as desirable or undesirable, without pairs.

With r = log pi(y) - log pi_ref(y), summed over tokens, z the reference point (a KL divergence, a constant):

- ``kto``, eq. 7 of arXiv 2402.01306: ``1 - sigmoid(beta (r - z))``, for undesirable ones ``1 - sigmoid(beta (z - r))``
- ``apo_zero_unpaired``, from eq. 7 of arXiv 2408.06266: the same without z
"""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .per_token import (
    HeadKeywords,
    check_choice,
    check_positive,
    check_shape,
    mean_where,
    reference_log_probs,
    sequence_sum,
    token_log_probs,
)

LOSS_TYPES = ("kto", "apo_zero_unpaired")


class KtoStats(NamedTuple):
    """Detached numbers for logging: ``rewards`` (``beta r``) and ``log_probs`` are fp32 ``[B]``, ``entropy`` is 0-d."""

    rewards: Tensor
    log_probs: Tensor
    entropy: Tensor


def kto_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, desirable: Tensor,
    ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    ref_log_probs: Tensor | None = None, kl: Tensor | float | None = None, mask: Tensor | None = None,
    loss_type: str = "kto", beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
    num_items: Tensor | float | None = None, return_stats: bool = False, **head: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, KtoStats]:  # fmt: skip
    """Kahneman-Tversky optimisation (arXiv 2402.01306), averaged over sequences that have a token that counts.

    Args:
        hidden: ``[B, T, H]``, the policy's last hidden states.
        weight: ``[V, H]`` of the policy's head; dtypes as in ``linear_logprobs``.
        labels: ``[B, T]`` (int64 or int32), the token that each hidden state predicts (not shifted), and
            ``ignore_index`` elsewhere.
        bias: ``[V]``.
        desirable: ``[B]``, bool, or nonzero where the sequence is desirable.
        ref_hidden, ref_weight, ref_bias: the same of the reference model, of any hidden size. No gradients.
        ref_log_probs: instead of these, the reference's log-probabilities: ``[B, T]``, or ``[B]`` already summed.
        kl: the reference point z, a number or a tensor of one element, as ``kto_reference_point`` computes it; for
            ``"kto"``, which needs one, only.
        mask: ``[B, T]``, nonzero where a labelled token counts; by default all of them do.
        loss_type: ``"kto"`` or ``"apo_zero_unpaired"``.
        beta: strength of the tie to the reference.
        desirable_weight, undesirable_weight: factors of the two kinds of sequences.
        num_items: divisor instead of the number of sequences: those of all micro-batches of a step.
        return_stats: also return ``KtoStats``.
        **head: ``ignore_index``, ``temperature``, ``softcap``, ``logit_scale`` and the memory options of
            ``linear_logprobs``; for policy and reference alike.

    Returns:
        The loss, fp32 and 0-d, or ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_positive("beta", beta)
    check_shape("desirable", desirable, tuple(labels.shape[:1]))
    if (kl is None) == (loss_type == "kto"):
        needed = "a number or a tensor of one element" if kl is None else "None"
        raise ValueError(f"kl: got {kl} with loss_type {loss_type!r}; must be {needed}")
    if isinstance(kl, Tensor) and kl.numel() != 1:
        raise ValueError(f"kl: got a tensor of shape {tuple(kl.shape)}; must hold one element")
    tokens = token_log_probs(hidden, weight, labels, bias, mask, **head)
    ref = reference_log_probs(ref_hidden, ref_weight, ref_bias, ref_log_probs, labels, tokens.active, **head)
    check_shape("ref_log_probs", ref, tuple(labels.shape), tuple(labels.shape[:1]))
    log_probs = sequence_sum(tokens.log_probs, tokens.active)
    ratio = log_probs - (ref if ref.dim() == 1 else sequence_sum(ref, tokens.active))
    origin = kl.detach().to(ratio.device).reshape(()) if isinstance(kl, Tensor) else kl or 0.0
    desirable = desirable != 0
    gain = (beta * (ratio - origin)).where(desirable, beta * (origin - ratio))
    factor = torch.full_like(ratio, undesirable_weight).masked_fill(desirable, desirable_weight)
    loss = mean_where(factor * (-gain).sigmoid(), tokens.active.any(1), num_items)
    if not return_stats:
        return loss
    entropy = mean_where(tokens.entropy, tokens.active, None)
    return loss, KtoStats((beta * ratio).detach(), log_probs.detach(), entropy.detach())


@torch.no_grad()
def kto_reference_point(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, ref_log_probs: Tensor | None = None,
    mask: Tensor | None = None, **head: Unpack[HeadKeywords],
) -> Tensor:  # fmt: skip
    """The reference point z of KTO: ``max(0, mean r)`` over sequences of prompts with *other* prompts' completions.

    Average it over the processes before ``kto_loss`` uses it.

    Args:
        hidden, weight, labels, bias, mask: as in ``kto_loss``, of the mismatched sequences.
        ref_hidden, ref_weight, ref_bias, ref_log_probs: as in ``kto_loss``, of the mismatched sequences.
        **head: as in ``kto_loss``.

    Returns:
        fp32, 0-d, without gradients.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    tokens = token_log_probs(hidden, weight, labels, bias, mask, **head)
    ref = reference_log_probs(ref_hidden, ref_weight, ref_bias, ref_log_probs, labels, tokens.active, **head)
    check_shape("ref_log_probs", ref, tuple(labels.shape), tuple(labels.shape[:1]))
    ratio = sequence_sum(tokens.log_probs, tokens.active) - (
        ref if ref.dim() == 1 else sequence_sum(ref, tokens.active)
    )
    return mean_where(ratio, tokens.active.any(1), None).clamp(min=0)
