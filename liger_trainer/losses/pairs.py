"""Batches of preference pairs: rows 0 to P - 1 are the chosen sequences, rows P to 2 P - 1 the rejected ones."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..kernels.linear_loss.options import check_num_items
from .per_token import Tokens, mean_where, sequence_sum


class PreferenceStats(NamedTuple):
    """Detached numbers for logging.

    ``chosen_rewards``, ``rejected_rewards``, ``chosen_log_probs`` and ``rejected_log_probs`` are fp32 ``[P]``: the
    implicit rewards, with the factor ``beta``, and the sequences' log-probabilities as the loss uses them (summed or
    averaged over tokens). ``entropy`` is 0-d: the mean over all tokens that count.
    """

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_log_probs: Tensor
    rejected_log_probs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Pair:
    """One number of each sequence, split into chosen and rejected, ``[P]`` each."""

    chosen: Tensor
    rejected: Tensor

    def __sub__(self, other: "Pair") -> "Pair":
        return Pair(self.chosen - other.chosen, self.rejected - other.rejected)

    def __truediv__(self, other: "Pair") -> "Pair":
        return Pair(self.chosen / other.chosen, self.rejected / other.rejected)

    @property
    def difference(self) -> Tensor:
        """Chosen minus rejected."""
        return self.chosen - self.rejected


def check_even(labels: Tensor) -> None:
    """Raise ``ValueError`` for a batch with an odd number of sequences."""
    if labels.shape[0] % 2:
        raise ValueError(f"labels: got {labels.shape[0]} sequences; must be an even number, chosen before rejected")


def split(per_sequence: Tensor) -> Pair:
    """Split ``[2 P]`` into chosen and rejected."""
    return Pair(*per_sequence.chunk(2))


def lengths(active: Tensor) -> Pair:
    """The numbers of tokens that count, at least 1."""
    return split(active.sum(1).clamp(min=1))


def valid_pairs(active: Tensor) -> Tensor:
    """Bool ``[P]``: both sequences have a token that counts. Other pairs state no preference and are left out."""
    pair = split(active.any(1))
    return pair.chosen & pair.rejected


def token_sums(log_probs: Tensor, active: Tensor, ld_alpha: float | None = None) -> Tensor:
    """``[2 P]``, the sequences' summed log-probabilities.

    With ``ld_alpha``, tokens beyond the length of the shorter sequence of a pair weigh ``ld_alpha`` (LD-DPO,
    arXiv 2409.06411).
    """
    if ld_alpha is not None:
        shared = split(active.sum(1))
        limit = shared.chosen.minimum(shared.rejected).repeat(2).unsqueeze(1)
        log_probs = log_probs.where(active.cumsum(1) <= limit, ld_alpha * log_probs)
    return sequence_sum(log_probs, active)


def chosen_nll(
    tokens: Tokens, nll_active: Tensor, num_items: Tensor | float | None, num_nll_items: Tensor | float | None,
    sequence_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mean negative log-probability of the chosen sequences' tokens, 0-d.

    Args:
        tokens: all tokens of the batch.
        nll_active: bool ``[2 P, T]``, the tokens to average over; the rejected half is not looked at.
        num_items: the divisor of the pairs' losses, which says whether a divisor is needed here too.
        num_nll_items: replaces the number of tokens.
        sequence_weights: ``[P]``, factors of the sequences.

    Raises:
        ValueError: only one of the two divisors is given.
    """
    if (num_items is None) != (num_nll_items is None):
        name, value = ("num_nll_items", num_nll_items) if num_nll_items is None else ("num_items", num_items)
        raise ValueError(f"{name}: got {value}; must be given with the other divisor (num_items, num_nll_items)")
    check_num_items(num_nll_items)
    nll = -split(tokens.log_probs).chosen
    if sequence_weights is not None:
        nll = nll * sequence_weights.unsqueeze(1)
    return mean_where(nll, split(nll_active).chosen, num_nll_items)


def preference_stats(rewards: Pair, log_probs: Pair, tokens: Tokens) -> PreferenceStats:
    """Gather what is logged."""
    entropy = mean_where(tokens.entropy, tokens.active, None)
    fields = (rewards.chosen, rewards.rejected, log_probs.chosen, log_probs.rejected, entropy)
    return PreferenceStats(*(field.detach() for field in fields))
