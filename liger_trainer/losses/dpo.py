"""DPO and the losses that followed it: a loss of the log-ratios of policy and reference on preference pairs.

With r = log pi(y) - log pi_ref(y), summed over the tokens of a sequence, w the chosen and l the rejected sequence, s
the score of an f-divergence (s = r for the reverse KL), h = beta (s_w - s_l), and e = ``label_smoothing``:

| ``loss_type`` | loss of a pair | source |
|---|---|---|
| sigmoid | -log sigmoid(h) | eq. 7 of arXiv 2305.18290 |
| hinge | max(0, 1 - h) | SLiC, arXiv 2305.10425 |
| ipo | (s_w / len_w - s_l / len_l - 1 / (2 beta))^2 | eq. 17 of arXiv 2310.12036, averaged over tokens |
| robust | (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e) | arXiv 2403.00409 |
| exo_pair | KL((sigmoid(h), sigmoid(-h)) to (1 - e, e)) | eq. 16 of arXiv 2402.00856 |
| nca_pair | -log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2 | arXiv 2402.05369 |
| bco_pair | -log sigmoid(beta r_w) - log sigmoid(-beta r_l) | arXiv 2404.04656, without its running mean |
| sppo_hard | (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2 | arXiv 2405.00675, win rates 1 and 0 |
| apo_zero | 1 - sigmoid(beta r_w) + sigmoid(beta r_l) | eq. 7 of arXiv 2408.06266 |
| apo_down | sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)) | eq. 8 of arXiv 2408.06266 |
| discopop | (1 - m) (-log sigmoid(h)) + m exp(-h), m = sigmoid(h / tau) | eq. 5 of arXiv 2406.08414 |
| aot | smoothed sigmoid loss of beta (sorted(log pi_w - log pi_l) - sorted(same of pi_ref)) | arXiv 2406.05882 |
| aot_unpaired | smoothed sigmoid loss of beta (sorted(r_w) - sorted(r_l)) | arXiv 2406.05882 |
| sft | -log pi(y_w), mean over tokens | as a term of RPO, arXiv 2404.19733 |
| sigmoid_norm | -log sigmoid(beta (s_w / len_w - s_l / len_l)) | Tulu 3, arXiv 2411.15124 |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import (
    Pair,
    PreferenceStats,
    check_even,
    chosen_nll,
    lengths,
    preference_stats,
    split,
    token_sums,
    valid_pairs,
)
from .per_token import (
    HeadKeywords,
    Tokens,
    check_choice,
    check_positive,
    check_shape,
    mean_where,
    reference_log_probs,
    sequence_mean,
    token_log_probs,
)

OF_DIFFERENCE = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")
OF_AVERAGES = ("ipo", "sigmoid_norm")
OF_RATIOS = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
OF_SORTED = ("aot", "aot_unpaired")
LOSS_TYPES = (*OF_DIFFERENCE, *OF_AVERAGES, *OF_RATIOS, *OF_SORTED, "sft")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
SMOOTHED = ("robust", "exo_pair", *OF_SORTED)
MAX_EXPONENT = 80.0  # exp(88.8) overflows fp32


@dataclass(frozen=True)
class DpoOptions:
    """The options of ``dpo_loss``, checked."""

    loss_types: tuple[str, ...]
    loss_weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    ld_alpha: float | None
    use_weighting: bool
    discopop_tau: float

    def __post_init__(self) -> None:
        types = self.loss_types
        for loss_type in types or ("",):
            check_choice("loss_type", loss_type, LOSS_TYPES)
        if len(self.loss_weights) != len(types):
            raise ValueError(f"loss_weights: got {len(self.loss_weights)} numbers; must be {len(types)}")
        check_positive("beta", self.beta)
        check_positive("discopop_tau", self.discopop_tau)
        check_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        if self.f_divergence_type != "reverse_kl" and set(types) & {*OF_RATIOS, *OF_SORTED}:
            raise ValueError(
                f"f_divergence_type: got {self.f_divergence_type!r} with loss_type {types}; must be 'reverse_kl', "
                f"because only {(*OF_DIFFERENCE, *OF_AVERAGES)} have a form for other divergences"
            )
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha: got {self.ld_alpha}; must be in [0, 1], or None")
        if self.use_weighting and set(types) & set(OF_SORTED):
            raise ValueError(
                f"use_weighting: got True with loss_type {types}; must be False, because sorting separates a loss "
                "from its pair"
            )
        self._check_smoothing()

    def _check_smoothing(self) -> None:
        smoothing, types = self.label_smoothing, self.loss_types
        if not 0.0 <= smoothing < 0.5:
            raise ValueError(f"label_smoothing: got {smoothing}; must be in [0, 0.5)")
        if smoothing and not set(types) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing: got {smoothing} with loss_type {types}; must be 0: only {SMOOTHED} use it"
            )
        if not smoothing and "exo_pair" in types:
            raise ValueError("label_smoothing: got 0 with loss_type 'exo_pair'; must be greater than 0, such as 1e-3")


def _score(log_ratio: Tensor, options: DpoOptions) -> Tensor:
    """``f'(u)`` of ``log u``, up to a constant: f-DPO, arXiv 2309.16240."""
    match options.f_divergence_type:
        case "forward_kl":
            power = -1.0
        case "alpha_divergence":
            power = options.f_alpha_divergence_coef - 1.0
        case "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        case _:
            power = 0.0
    if abs(power) < 1e-6:  # the limit of what follows
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=MAX_EXPONENT)) / power


def _loss_of_difference(loss_type: str, h: Tensor, options: DpoOptions) -> Tensor:
    smoothing = options.label_smoothing
    match loss_type:
        case "sigmoid":
            return -F.logsigmoid(h)
        case "hinge":
            return F.relu(1 - h)
        case "robust":
            return ((smoothing - 1) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1 - 2 * smoothing)
        case "exo_pair":
            chosen = h.sigmoid() * (F.logsigmoid(h) - math.log1p(-smoothing))
            return chosen + (-h).sigmoid() * (F.logsigmoid(-h) - math.log(smoothing))
        case _:
            mix = (h / options.discopop_tau).sigmoid()
            return (mix - 1) * F.logsigmoid(h) + mix * (-h).clamp(max=MAX_EXPONENT).exp()


def _loss_of_ratios(loss_type: str, ratio: Pair, beta: float) -> Tensor:
    chosen, rejected = beta * ratio.chosen, beta * ratio.rejected
    match loss_type:
        case "nca_pair":
            return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2
        case "bco_pair":
            return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
        case "sppo_hard":
            return (ratio.chosen - 0.5 / beta).square() + (ratio.rejected + 0.5 / beta).square()
        case "apo_zero":
            return (-chosen).sigmoid() + rejected.sigmoid()
        case _:
            return chosen.sigmoid() + (rejected - chosen).sigmoid()


def _sorted(values: Tensor, valid: Tensor) -> Tensor:
    """The valid values in ascending order, followed by a constant for each of the others."""
    return values.masked_fill(~valid, torch.finfo(values.dtype).max).sort().values


def _loss_of_sorted(loss_type: str, log_probs: Pair, ref: Pair, valid: Tensor, options: DpoOptions) -> Tensor:
    """The loss at each rank; the ranks that hold no valid pair come last and give a constant."""
    high, low = log_probs.difference, ref.difference
    if loss_type == "aot_unpaired":
        ratio = log_probs - ref
        high, low = ratio.chosen, ratio.rejected
    h = options.beta * (_sorted(high, valid) - _sorted(low, valid))
    return (options.label_smoothing - 1) * F.logsigmoid(h) - options.label_smoothing * F.logsigmoid(-h)


def pair_losses(
    loss_type: str, log_probs: Pair, ref: Pair, active: Tensor, valid: Tensor, options: DpoOptions
) -> tuple[Tensor, Tensor]:
    """``(losses, which of them count)``, ``[P]`` each, of any type but ``sft``."""
    ratio = log_probs - ref
    if loss_type in OF_SORTED:
        count = valid.sort(descending=True).values
        return _loss_of_sorted(loss_type, log_probs, ref, valid, options), count
    if loss_type in OF_RATIOS:
        return _loss_of_ratios(loss_type, ratio, options.beta), valid
    score = Pair(_score(ratio.chosen, options), _score(ratio.rejected, options))
    if loss_type in OF_DIFFERENCE:
        return _loss_of_difference(loss_type, options.beta * score.difference, options), valid
    difference = (score / lengths(active)).difference
    if loss_type == "ipo":
        return (difference - 0.5 / options.beta).square(), valid
    return -F.logsigmoid(options.beta * difference), valid


def _pair_weights(tokens: Tokens) -> Pair:
    """The weights of WPO, arXiv 2406.11827: the policy's probability of a sequence relative to its own samples'."""
    aligned = tokens.log_probs - tokens.log_sum_sq_probs
    return split(sequence_mean(aligned.detach(), tokens.active).exp())


def dpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, ref_log_probs: Tensor | None = None,
    mask: Tensor | None = None, loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None, beta: float = 0.1, label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5, ld_alpha: float | None = None,
    use_weighting: bool = False, discopop_tau: float = 0.05, num_items: Tensor | float | None = None,
    num_nll_items: Tensor | float | None = None, return_stats: bool = False, **head: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, PreferenceStats]:  # fmt: skip
    """Direct preference optimisation (arXiv 2305.18290) in its many forms, averaged over pairs; no logits.

    The module's docstring has the formulas and their sources. A pair counts if both its sequences have a token that
    counts.

    Args:
        hidden: ``[2 P, T, H]``, the policy's last hidden states: P chosen sequences, then their P rejected ones.
        weight: ``[V, H]`` of the policy's head; dtypes as in ``linear_logprobs``.
        labels: ``[2 P, T]`` (int64 or int32), the token that each hidden state predicts (not shifted), and
            ``ignore_index`` elsewhere: prompt and padding.
        bias: ``[V]``.
        ref_hidden, ref_weight, ref_bias: the same of the reference model, of any hidden size. No gradients.
        ref_log_probs: instead of these, the reference's log-probabilities: ``[2 P, T]``, or ``[2 P]`` already summed.
        mask: ``[2 P, T]``, nonzero where a labelled token counts; by default all of them do.
        loss_type: a type, or several whose losses are added.
        loss_weights: factors of several types; 1 by default.
        beta: strength of the tie to the reference; tau of IPO.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in ``[0, 0.5)``; for ``robust``,
            ``exo_pair`` (greater than 0) and the ``aot`` types only.
        f_divergence_type: ``"reverse_kl"``, ``"forward_kl"``, ``"js_divergence"`` or ``"alpha_divergence"``, for the
            types that depend on h, s_w and s_l only.
        f_alpha_divergence_coef: a in the score ``(u^(a - 1) - 1) / (a - 1)`` of the alpha-divergence, u = pi / pi_ref.
        ld_alpha: weight, in ``[0, 1]``, of tokens beyond the length of the pair's shorter sequence (LD-DPO).
        use_weighting: weight the pairs as WPO does. ``sft`` weights each chosen sequence.
        discopop_tau: temperature of ``discopop``.
        num_items: divisor of the pairs' losses instead of their number: the pairs of all micro-batches of a step.
        num_nll_items: divisor of ``sft`` instead of its number of tokens; needed if there is a ``num_items``.
        return_stats: also return ``PreferenceStats``.
        **head: ``ignore_index``, ``temperature``, ``softcap``, ``logit_scale`` and the memory options of
            ``linear_logprobs``; for policy and reference alike.

    Returns:
        The loss, fp32 and 0-d, or ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype, option or label out of range, or options that do not go together.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    options = DpoOptions(
        types, (1.0,) * len(types) if loss_weights is None else tuple(loss_weights), beta, label_smoothing,
        f_divergence_type, f_alpha_divergence_coef, ld_alpha, use_weighting, discopop_tau,
    )  # fmt: skip
    if "sft" not in types and num_nll_items is not None:
        raise ValueError(f"num_nll_items: got {num_nll_items}; must be None, because no loss_type is 'sft'")
    check_even(labels)
    tokens = token_log_probs(hidden, weight, labels, bias, mask, **head)
    ref = reference_log_probs(ref_hidden, ref_weight, ref_bias, ref_log_probs, labels, tokens.active, **head)
    check_shape("ref_log_probs", ref, tuple(labels.shape), tuple(labels.shape[:1]))
    return dpo_loss_of_tokens(tokens, ref, options, num_items, num_nll_items, return_stats)


def dpo_loss_of_tokens(
    tokens: Tokens, ref: Tensor, options: DpoOptions, num_items: Tensor | float | None,
    num_nll_items: Tensor | float | None, return_stats: bool,
) -> Tensor | tuple[Tensor, PreferenceStats]:  # fmt: skip
    """``dpo_loss`` of the policy's tokens and the reference's log-probabilities, ``[2 P, T]`` or ``[2 P]``."""
    active, valid = tokens.active, valid_pairs(tokens.active)
    policy = split(token_sums(tokens.log_probs, active, options.ld_alpha))
    reference = split(ref if ref.dim() == 1 else token_sums(ref, active, options.ld_alpha))
    weights = _pair_weights(tokens) if options.use_weighting else None
    loss = tokens.log_probs.new_zeros(())
    for loss_type, factor in zip(options.loss_types, options.loss_weights, strict=True):
        if loss_type == "sft":
            by_sequence = None if weights is None else weights.chosen * weights.rejected
            term = chosen_nll(tokens, active, num_items, num_nll_items, by_sequence)
        else:
            losses, count = pair_losses(loss_type, policy, reference, active, valid, options)
            losses = losses if weights is None else losses * weights.chosen * weights.rejected
            term = mean_where(losses, count, num_items)
        loss = loss + factor * term
    if not return_stats:
        return loss
    ratio = policy - reference
    rewards = Pair(options.beta * ratio.chosen, options.beta * ratio.rejected)
    return loss, preference_stats(rewards, policy, tokens)
