"""Preference losses without a reference model: ORPO, SimPO and CPO.

With p the log-probability of a sequence and m its mean over the sequence's tokens, w the chosen and l the rejected
sequence, NLL the mean negative log-probability of the chosen tokens, and e = ``label_smoothing``:

- ORPO, eqs. 6 and 7 of arXiv 2403.07691: ``NLL - beta log sigmoid(odds(m_w) - odds(m_l))``, with the log-odds
  ``odds(m) = m - log(1 - exp(m))``
- SimPO, eq. 6 of arXiv 2405.14734: the smoothed sigmoid loss of ``beta (m_w - m_l) - gamma``
- CPO, eq. 3 of arXiv 2401.08417: the smoothed sigmoid loss of ``h = beta (p_w - p_l)``, plus ``nll_weight NLL``;
  ``hinge`` (arXiv 2305.10425): ``max(0, 1 - h)``; ``ipo`` (arXiv 2310.12036): ``(m_w - m_l - 1 / (2 beta))^2``

The smoothed sigmoid loss of h is ``-(1 - e) log sigmoid(h) - e log sigmoid(-h)``.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import IGNORE_INDEX
from .pairs import Pair, PreferenceStats, check_even, chosen_nll, preference_stats, split, token_sums, valid_pairs
from .per_token import (
    HeadKeywords,
    Tokens,
    active_tokens,
    check_choice,
    check_positive,
    mean_where,
    sequence_mean,
    token_log_probs,
)

CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo")


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}; must be in [0, 0.5)")


def _check_weight(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}: got {value}; must be at least 0")


def _smoothed_sigmoid(h: Tensor, label_smoothing: float) -> Tensor:
    return (label_smoothing - 1) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def _log_odds(mean: Tensor, valid: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``mean = log p``, finite and with finite gradients where it is not ``valid`` too."""
    # 1 - exp(mean) is 0 in fp32 once a sequence is certain; the smallest probability below 1 stands for it then
    mean = mean.where(valid, -1.0).clamp(max=-torch.finfo(mean.dtype).eps / 2)
    near = torch.log(-torch.expm1(mean.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(mean.clamp(max=-math.log(2))))
    return mean - near.where(mean > -math.log(2), far)


def _tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, mask: Tensor | None,
    nll_mask: Tensor | None, head: HeadKeywords,
) -> tuple[Tokens, Tensor]:  # fmt: skip
    """All tokens, and those to average the chosen sequences' NLL over."""
    check_even(labels)
    if nll_mask is None:
        tokens = token_log_probs(hidden, weight, labels, bias, mask, **head)
        return tokens, tokens.active
    nll_active = active_tokens(labels, nll_mask, head.get("ignore_index", IGNORE_INDEX))
    nll_active[labels.shape[0] // 2 :] = False
    return token_log_probs(hidden, weight, labels, bias, mask, nll_active, **head), nll_active


def _result(
    loss: Tensor, beta: float, log_probs: Pair, tokens: Tokens, return_stats: bool
) -> Tensor | tuple[Tensor, PreferenceStats]:
    if not return_stats:
        return loss
    return loss, preference_stats(Pair(beta * log_probs.chosen, beta * log_probs.rejected), log_probs, tokens)


def orpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, mask: Tensor | None = None,
    nll_mask: Tensor | None = None, beta: float = 0.1, nll_weight: float = 1.0,
    num_items: Tensor | float | None = None, num_nll_items: Tensor | float | None = None, return_stats: bool = False,
    **head: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, PreferenceStats]:  # fmt: skip
    """Odds ratio preference optimisation (arXiv 2403.07691): NLL of the chosen plus ``beta`` times the odds-ratio loss.

    Args:
        hidden: ``[2 P, T, H]``, the last hidden states: P chosen sequences, then their P rejected ones.
        weight: ``[V, H]`` of the head; dtypes as in ``linear_logprobs``.
        labels: ``[2 P, T]`` (int64 or int32), the token that each hidden state predicts (not shifted), and
            ``ignore_index`` elsewhere.
        bias: ``[V]``.
        mask: ``[2 P, T]``, nonzero where a labelled token counts; by default all of them do.
        nll_mask: ``[2 P, T]``, nonzero where a labelled token of a chosen sequence counts in the NLL; by default as in
            ``mask``. TRL's trainer takes the NLL of prompt and completion, but the odds of the completion alone: give
            labels to both, and mask the prompt.
        beta: weight of the odds-ratio loss; lambda in the paper.
        nll_weight: weight of the NLL.
        num_items: divisor of the pairs' losses instead of their number: the pairs of all micro-batches of a step.
        num_nll_items: divisor of the NLL instead of its number of tokens; needed if there is a ``num_items``.
        return_stats: also return ``PreferenceStats``; its log-probabilities are means over tokens.
        **head: ``ignore_index``, ``temperature``, ``softcap``, ``logit_scale`` and the memory options of
            ``linear_logprobs``.

    Returns:
        The loss, fp32 and 0-d, or ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    check_positive("beta", beta)
    _check_weight("nll_weight", nll_weight)
    tokens, nll_active = _tokens(hidden, weight, labels, bias, mask, nll_mask, head)
    valid = valid_pairs(tokens.active)
    means = split(sequence_mean(tokens.log_probs, tokens.active))
    odds = Pair(_log_odds(means.chosen, valid), _log_odds(means.rejected, valid))
    loss = beta * mean_where(-F.logsigmoid(odds.difference), valid, num_items)
    loss = loss + nll_weight * chosen_nll(tokens, nll_active, num_items, num_nll_items)
    return _result(loss, beta, means, tokens, return_stats)


def simpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, mask: Tensor | None = None,
    beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0, num_items: Tensor | float | None = None,
    return_stats: bool = False, **head: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, PreferenceStats]:  # fmt: skip
    """Simple preference optimisation (arXiv 2405.14734): the mean log-probability is the reward, ``gamma`` the margin.

    Args:
        hidden, weight, labels, bias, mask, num_items: as in ``orpo_loss``.
        beta: factor of the rewards. The paper uses 2 to 10; TRL's default, 0.1, is far below that.
        gamma: target margin between the rewards, after the factor ``beta``: ``simpo_gamma`` in TRL.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in ``[0, 0.5)``.
        return_stats: also return ``PreferenceStats``; its log-probabilities are means over tokens.
        **head: as in ``orpo_loss``.

    Returns:
        The loss, fp32 and 0-d, or ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    check_positive("beta", beta)
    _check_smoothing(label_smoothing)
    tokens, _ = _tokens(hidden, weight, labels, bias, mask, None, head)
    means = split(sequence_mean(tokens.log_probs, tokens.active))
    losses = _smoothed_sigmoid(beta * means.difference - gamma, label_smoothing)
    loss = mean_where(losses, valid_pairs(tokens.active), num_items)
    return _result(loss, beta, means, tokens, return_stats)


def cpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, mask: Tensor | None = None,
    nll_mask: Tensor | None = None, loss_type: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0,
    nll_weight: float = 1.0, num_items: Tensor | float | None = None, num_nll_items: Tensor | float | None = None,
    return_stats: bool = False, **head: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, PreferenceStats]:  # fmt: skip
    """Contrastive preference optimisation (arXiv 2401.08417): DPO with a uniform reference, plus NLL of the chosen.

    Args:
        hidden, weight, labels, bias, mask, nll_mask, num_items, num_nll_items: as in ``orpo_loss``. Without an NLL term
            there is nothing for ``num_nll_items`` to divide, and it must be ``None``.
        loss_type: ``"sigmoid"``, ``"hinge"`` or ``"ipo"`` (of means over tokens).
        beta: temperature of the preference term; tau of IPO.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in ``[0, 0.5)``; ``"sigmoid"`` only.
        nll_weight: weight of the NLL; ``cpo_alpha`` in TRL.
        return_stats: also return ``PreferenceStats``.
        **head: as in ``orpo_loss``.

    Returns:
        The loss, fp32 and 0-d, or ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype, option or label out of range.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    check_choice("loss_type", loss_type, CPO_LOSS_TYPES)
    check_positive("beta", beta)
    _check_smoothing(label_smoothing)
    _check_weight("nll_weight", nll_weight)
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing: got {label_smoothing} with loss_type {loss_type!r}; must be 0")
    if not nll_weight and num_nll_items is not None:
        raise ValueError(f"num_nll_items: got {num_nll_items}; must be None, because nll_weight is 0")
    tokens, nll_active = _tokens(hidden, weight, labels, bias, mask, nll_mask if nll_weight else None, head)
    if loss_type == "ipo":
        scores = split(sequence_mean(tokens.log_probs, tokens.active))
        losses = (scores.difference - 0.5 / beta).square()
    else:
        scores = split(token_sums(tokens.log_probs, tokens.active))
        h = beta * scores.difference
        losses = F.relu(1 - h) if loss_type == "hinge" else _smoothed_sigmoid(h, label_smoothing)
    loss = mean_where(losses, valid_pairs(tokens.active), num_items)
    if nll_weight:
        loss = loss + nll_weight * chosen_nll(tokens, nll_active, num_items, num_nll_items)
    return _result(loss, beta, scores, tokens, return_stats)
