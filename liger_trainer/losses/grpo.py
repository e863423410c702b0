"""GRPO and its variants: the policy-gradient losses of sampled completions and their advantages.

With w = exp(log pi - log pi_old) of a token (or, with ``importance_sampling_level="sequence"``, of a sequence: the
exponential of the token mean, GSPO, arXiv 2507.18071), A the advantage, and the sums over the tokens that count:

| ``loss_type`` | loss of a token | reduction | source |
|---|---|---|---|
| grpo | -min(w A, clip(w, 1 - epsilon_low, 1 + epsilon_high) A) | mean over tokens, mean over sequences | 2402.03300 |
| bnpo | the same | mean over the batch's tokens | TRL |
| dapo | the same | sum / ``num_items`` tokens | eq. 8 of 2503.14476 |
| dr_grpo | the same | sum / (sequences x ``max_completion_length``) | 2503.20783 |
| luspo | the same | sum over tokens, mean over sequences | 2602.05261 |
| cispo | -stop_grad(min(w, epsilon_high)) A log pi | sum / ``num_items`` tokens | 2506.13585 |
| sapo | -(4 / t) sigmoid(t (w - 1)) A, t by the sign of A | as grpo | 2511.20347 |
| vespo | -stop_grad(W^k exp(l (1 - W))) A log pi, W = exp(sum of log w) | sum / ``num_items`` tokens | 2602.10693 |

Sources are arXiv numbers. ``delta`` caps the unclipped w (INTELLECT-2, arXiv 2505.07291). With d = log pi_ref - log pi,
``beta`` adds the KL estimate ``k1`` (-d), ``k2`` (d^2 / 2) or ``k3`` (exp(d) - d - 1, as in GRPO) of each token
(http://joschu.net/blog/kl-approx.html), times w with ``use_bias_correction_kl`` (DeepSeek-V3.2, arXiv 2512.02556).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from .per_token import (
    HeadKeywords,
    Tokens,
    check_choice,
    check_positive,
    check_shape,
    mean_where,
    reference_log_probs,
    sequence_mean,
    sequence_sum,
    token_log_probs,
)

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
OVER_TOKENS = ("bnpo", "dapo", "cispo", "vespo")  # reduced over tokens; the others over sequences
KL_TYPES = ("k1", "k2", "k3")
# Bounds of VESPO's log-ratios, beyond which its weight is 0 in any case.
TOKEN_LOG_RATIO, LOWEST_LOG_RATIO = 20.0, math.log(1e-8)


class PolicyStats(NamedTuple):
    """Detached numbers for logging, fp32.

    ``log_probs`` is ``[B, T]``, 0 where no token counts: the ``old_log_probs`` of further steps on these completions.
    ``kl`` (0 without ``beta``), ``entropy`` and ``clip_ratio``, the share of tokens whose gradient clipping removes,
    are 0-d: means over the tokens that count.
    """

    log_probs: Tensor
    kl: Tensor
    entropy: Tensor
    clip_ratio: Tensor


@dataclass(frozen=True)
class PolicyOptions:
    """The options of ``grpo_loss``, checked."""

    loss_type: str
    importance_sampling_level: str
    epsilon_low: float
    epsilon_high: float | None
    delta: float | None
    beta: float
    kl_type: str
    use_bias_correction_kl: bool
    entropy_coef: float
    max_completion_length: int | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def __post_init__(self) -> None:
        loss_type = self.loss_type
        check_choice("loss_type", loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        check_choice("kl_type", self.kl_type, KL_TYPES)
        if loss_type == "vespo" and self.importance_sampling_level != "token":
            raise ValueError("importance_sampling_level: got 'sequence' with loss_type 'vespo'; must be 'token'")
        if not 0.0 <= self.epsilon_low <= 1.0:
            raise ValueError(f"epsilon_low: got {self.epsilon_low}; must be in [0, 1]")
        if self.epsilon_high is not None and not self.epsilon_high >= 0:
            raise ValueError(f"epsilon_high: got {self.epsilon_high}; must be at least 0")
        if loss_type == "cispo" and not self.epsilon_high:
            raise ValueError(
                f"epsilon_high: got {self.epsilon_high}; must be the largest weight for cispo, such as 5.0"
            )
        if self.delta is not None and (loss_type not in CLIPPED or self.delta <= 1 + self.high):
            expected = f"greater than 1 + epsilon_high = {1 + self.high}, and None unless loss_type is one of {CLIPPED}"
            raise ValueError(f"delta: got {self.delta} with loss_type {loss_type!r}; must be {expected}")
        if (self.max_completion_length is None) == (loss_type == "dr_grpo"):
            expected = "a number of tokens" if loss_type == "dr_grpo" else "None"
            raise ValueError(
                f"max_completion_length: got {self.max_completion_length}; must be {expected} for {loss_type!r}"
            )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
            check_positive(name, getattr(self, name))
        if self.max_completion_length is not None:
            check_positive("max_completion_length", self.max_completion_length)
        if not self.beta >= 0:
            raise ValueError(f"beta: got {self.beta}; must be at least 0")

    @property
    def high(self) -> float:
        """``epsilon_high``, by default ``epsilon_low``."""
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high


def _log_weights(log_ratio: Tensor, active: Tensor, options: PolicyOptions) -> Tensor:
    """Logarithms of the importance weights, ``[B, T]``, or ``[B, 1]`` of sequences."""
    if options.importance_sampling_level == "token":
        return log_ratio
    return sequence_mean(log_ratio, active).unsqueeze(1)


@torch.no_grad()
def _vespo_weights(
    log_ratio: Tensor, active: Tensor, advantages: Tensor, sampling_ratio: Tensor | None, options: PolicyOptions
) -> Tensor:
    """``W^k exp(lambda (1 - W))``, ``[B, 1]``, with k and lambda by the sign of the advantage."""
    log_w = sequence_sum(log_ratio.clamp(-TOKEN_LOG_RATIO, TOKEN_LOG_RATIO), active).unsqueeze(1)
    if sampling_ratio is not None:
        log_sampling = sampling_ratio.log().clamp(LOWEST_LOG_RATIO, TOKEN_LOG_RATIO)
        per_token = log_sampling.shape == active.shape and active.shape[1] != 1
        log_w = log_w + (sequence_sum(log_sampling, active).unsqueeze(1) if per_token else log_sampling)
    log_w = log_w.clamp(LOWEST_LOG_RATIO, TOKEN_LOG_RATIO)
    positive = advantages >= 0
    k = torch.full_like(advantages, options.vespo_k_neg).masked_fill(positive, options.vespo_k_pos)
    rate = torch.full_like(advantages, options.vespo_lambda_neg).masked_fill(positive, options.vespo_lambda_pos)
    return torch.exp(k * log_w + rate * (1 - log_w.exp()))


def _policy_terms(
    log_probs: Tensor, log_ratio: Tensor, weights: Tensor, active: Tensor, advantages: Tensor,
    sampling_ratio: Tensor | None, options: PolicyOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(losses of the tokens, whether clipping removes their gradients)``, broadcastable to ``[B, T]``."""
    low, high = 1 - options.epsilon_low, 1 + options.high
    match options.loss_type:
        case "cispo":
            loss = -weights.clamp(max=options.high).detach() * advantages * log_probs
            return loss, torch.zeros_like(active)  # every token keeps a gradient
        case "sapo":
            temperature = torch.full_like(advantages, options.sapo_temperature_neg)
            temperature = temperature.masked_fill(advantages > 0, options.sapo_temperature_pos)
            gate = torch.sigmoid(temperature * (weights - 1)) * 4 / temperature
            return -gate * advantages, torch.zeros_like(active)
        case "vespo":
            phi = _vespo_weights(log_ratio, active, advantages, sampling_ratio, options)
            return -phi * advantages * log_probs, torch.zeros_like(active)
        case _:
            delta = math.inf if options.delta is None else options.delta
            loss = -torch.minimum(weights.clamp(max=delta) * advantages, weights.clamp(low, high) * advantages)
            negative = (advantages < 0) & ((weights < low) | (weights > delta))  # delta > high
            return loss, negative | ((advantages > 0) & (weights > high))


def _kl(ref: Tensor, log_probs: Tensor, active: Tensor, kl_type: str) -> Tensor:
    """The estimate of KL(pi, pi_ref) at each token."""
    difference = (ref - log_probs).where(active, 0.0)
    if kl_type == "k1":
        return -difference
    return difference.square() / 2 if kl_type == "k2" else torch.expm1(difference) - difference


def _reduce(losses: Tensor, active: Tensor, num_items: Tensor | float | None, options: PolicyOptions) -> Tensor:
    """The reduction of the loss type."""
    if options.loss_type in OVER_TOKENS:
        return mean_where(losses, active, num_items)
    if options.loss_type in ("grpo", "sapo"):
        by_sequence = sequence_mean(losses, active)
    else:
        by_sequence = sequence_sum(losses, active)
        if options.max_completion_length is not None:
            by_sequence = by_sequence / options.max_completion_length
    return mean_where(by_sequence, torch.ones_like(by_sequence, dtype=torch.bool), num_items)


def grpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, advantages: Tensor,
    old_log_probs: Tensor | None = None, ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None, ref_log_probs: Tensor | None = None, sampling_ratio: Tensor | None = None,
    mask: Tensor | None = None, loss_type: str = "dapo", importance_sampling_level: str = "token",
    epsilon_low: float = 0.2, epsilon_high: float | None = None, delta: float | None = None, beta: float = 0.0,
    kl_type: str = "k3", use_bias_correction_kl: bool = True, entropy_coef: float = 0.0,
    max_completion_length: int | None = None, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0, vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    num_items: Tensor | float | None = None, return_stats: bool = False, **head: Unpack[HeadKeywords],
) -> Tensor | tuple[Tensor, PolicyStats]:  # fmt: skip
    """Group relative policy optimisation (arXiv 2402.03300) in its many forms; no logits.

    The module's docstring has the formulas and their sources.

    Args:
        hidden: ``[B, T, H]``, the policy's last hidden states.
        weight: ``[V, H]`` of the policy's head; dtypes as in ``linear_logprobs``.
        labels: ``[B, T]`` (int64 or int32), the sampled token that each hidden state predicts (not shifted), and
            ``ignore_index`` elsewhere: prompt and padding.
        bias: ``[V]``.
        advantages: ``[B]``, or ``[B, T]`` per token. Constants.
        old_log_probs: ``[B, T]``, log-probabilities under the policy that was sampled from; by default the present
            ones, which is right for the first step on new completions.
        ref_hidden, ref_weight, ref_bias: the reference model's, of any hidden size; with ``beta`` only. No gradients.
        ref_log_probs: ``[B, T]``, instead of these.
        sampling_ratio: ``[B, T]`` or ``[B, 1]``, factors that correct for an inference engine whose probabilities
            differ from the policy's; they multiply the losses (before the KL term), and W in ``vespo``.
        mask: ``[B, T]``, nonzero where a labelled token counts, such as one that no tool wrote; by default all do.
        loss_type: see the table in the module's docstring.
        importance_sampling_level: ``"token"``, or ``"sequence"`` (GSPO); ``luspo`` is meant for the latter.
        epsilon_low, epsilon_high: clip range; ``epsilon_high`` is ``epsilon_low`` by default. For ``cispo``,
            ``epsilon_high`` is the largest importance weight itself and must be given.
        delta: upper bound of unclipped weights.
        beta: weight of the KL term.
        kl_type: ``"k1"``, ``"k2"`` or ``"k3"``.
        use_bias_correction_kl: multiply the KL estimate by the importance weight. Gradients of ``k1`` and ``k3`` are
            on average those of the KL only if this is set; without it, the one of ``k1`` is 0 on average.
        entropy_coef: weight of the entropy bonus: minus the mean entropy of the tokens that count. With ``num_items``
            in sequences, the mean of each micro-batch counts with its number of sequences.
        max_completion_length: the constant of ``dr_grpo``, for which only it is given.
        sapo_temperature_pos, sapo_temperature_neg: t of ``sapo`` for positive and other advantages.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and lambda of ``vespo``.
        num_items: of all micro-batches of a step, the number of tokens (``dapo``, ``cispo``, ``vespo``) or sequences
            (``grpo``, ``dr_grpo``, ``luspo``, ``sapo``); by default those of this batch. Not for ``bnpo``.
        return_stats: also return ``PolicyStats``.
        **head: ``ignore_index``, ``temperature`` (the one of sampling), ``softcap``, ``logit_scale`` and the memory
            options of ``linear_logprobs``; for policy and reference alike.

    Returns:
        The loss, fp32 and 0-d, or ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype, option or label out of range, or options that do not go together.
        TypeError: a dtype that is not supported, or an unknown option.
    """
    options = PolicyOptions(
        loss_type, importance_sampling_level, epsilon_low, epsilon_high, delta, beta, kl_type, use_bias_correction_kl,
        entropy_coef, max_completion_length, sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos,
        vespo_k_neg, vespo_lambda_neg,
    )  # fmt: skip
    if loss_type == "bnpo" and num_items is not None:
        raise ValueError("num_items: got a divisor with loss_type 'bnpo'; must be None, or loss_type 'dapo'")
    batch, length = labels.shape
    check_shape("advantages", advantages, (batch,), (batch, length))
    if sampling_ratio is not None:
        check_shape("sampling_ratio", sampling_ratio, (batch, length), (batch, 1))
    if old_log_probs is not None:
        check_shape("old_log_probs", old_log_probs, (batch, length))
    tokens = token_log_probs(hidden, weight, labels, bias, mask, **head)
    ref = None
    if beta:
        ref = reference_log_probs(ref_hidden, ref_weight, ref_bias, ref_log_probs, labels, tokens.active, **head)
        check_shape("ref_log_probs", ref, (batch, length))
    elif ref_hidden is not None or ref_log_probs is not None:
        raise ValueError(f"beta: got {beta} with a reference model; must be greater than 0, or no reference given")
    advantages = advantages.detach().to(tokens.log_probs.dtype).reshape(batch, -1)
    return grpo_loss_of_tokens(tokens, advantages, old_log_probs, ref, sampling_ratio, options, num_items, return_stats)


def grpo_loss_of_tokens(
    tokens: Tokens, advantages: Tensor, old_log_probs: Tensor | None, ref: Tensor | None, sampling_ratio: Tensor | None,
    options: PolicyOptions, num_items: Tensor | float | None, return_stats: bool,
) -> Tensor | tuple[Tensor, PolicyStats]:  # fmt: skip
    """``grpo_loss`` of the policy's tokens; ``advantages`` is ``[B, 1]`` or ``[B, T]``."""
    active, log_probs = tokens.active, tokens.log_probs
    old = log_probs.detach() if old_log_probs is None else old_log_probs.detach()
    log_ratio = (log_probs - old).where(active, 0.0)
    weights = _log_weights(log_ratio, active, options).exp()
    losses, clipped = _policy_terms(log_probs, log_ratio, weights, active, advantages, sampling_ratio, options)
    if sampling_ratio is not None and options.loss_type != "vespo":
        losses = losses * sampling_ratio.detach()
    kl = torch.zeros_like(log_probs)
    if ref is not None:
        kl = _kl(ref, log_probs, active, options.kl_type)
        kl = kl * weights if options.use_bias_correction_kl else kl
        losses = losses + options.beta * kl
    loss = _reduce(losses.expand_as(active), active, num_items, options)
    if options.entropy_coef:
        loss = loss - options.entropy_coef * _entropy(tokens, num_items, options)
    if not return_stats:
        return loss
    means = (mean_where(x.expand_as(active).float(), active, None) for x in (kl, tokens.entropy, clipped))
    return loss, PolicyStats(log_probs.detach(), *(mean.detach() for mean in means))


def _entropy(tokens: Tokens, num_items: Tensor | float | None, options: PolicyOptions) -> Tensor:
    """The mean entropy of the tokens that count, or this batch's share of that of all micro-batches."""
    over_tokens = num_items is None or options.loss_type in OVER_TOKENS
    if over_tokens:
        return mean_where(tokens.entropy, tokens.active, num_items)
    mean = mean_where(tokens.entropy, tokens.active, None)
    every = torch.ones(tokens.active.shape[0], dtype=torch.bool, device=mean.device)
    return mean_where(mean.expand(every.shape), every, num_items)
