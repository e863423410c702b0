"""Per-token log-probabilities of a batch of sequences: what every loss of this package starts from.

They come from ``linear_logprobs``, so no loss here ever holds the logits ``[B, T, V]``, and the gradients of hidden
states, weight and bias come from the op's backward.
"""

from collections.abc import Collection
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ..kernels.linear_logprobs import linear_logprobs
from ..kernels.linear_loss.options import MemoryKeywords, check_num_items
from ..kernels.reference import IGNORE_INDEX, reduce_loss


class HeadKeywords(MemoryKeywords, total=False):
    """Keyword arguments of every loss that go to ``linear_logprobs`` as they are."""

    ignore_index: int
    temperature: float
    softcap: float | None
    logit_scale: float


class Tokens(NamedTuple):
    """A batch's tokens, each field ``[B, T]``.

    ``log_probs``, ``entropy`` and ``log_sum_sq_probs`` are those of ``TokenLogProbs``, 0 where no label was computed.
    ``active`` (bool) says which tokens count.
    """

    log_probs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    active: Tensor


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; must be one of {', '.join(map(repr, choices))}")


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is greater than 0."""
    if not value > 0:
        raise ValueError(f"{name}: got {value}; must be greater than 0")


def check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has one of ``shapes``."""
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; must be {' or '.join(map(str, shapes))}")


def active_tokens(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Which tokens have a label and, if there is a mask, a nonzero entry in it; bool ``[B, T]``."""
    active = labels != ignore_index
    if mask is None:
        return active
    check_shape("mask", mask, tuple(labels.shape))
    return active & (mask != 0)


def token_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, mask: Tensor | None,
    also: Tensor | None = None, **head: Unpack[HeadKeywords],
) -> Tokens:  # fmt: skip
    """The tokens of ``hidden`` ``[B, T, H]``; those that neither count nor are in ``also`` cost nothing.

    Args:
        hidden: ``[B, T, H]``.
        weight: ``[V, H]``.
        labels: ``[B, T]``, the token that each hidden state predicts.
        bias: ``[V]`` or ``None``.
        mask: ``[B, T]`` or ``None``; nonzero where a labelled token counts.
        also: bool ``[B, T]``; further labelled tokens whose log-probabilities are needed.
        **head: keyword arguments of ``linear_logprobs``.
    """
    if hidden.dim() != 3:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}; must be [batch, tokens, hidden size]")
    ignore_index = head.get("ignore_index", IGNORE_INDEX)
    check_shape("labels", labels, tuple(hidden.shape[:2]))
    active = active_tokens(labels, mask, ignore_index)
    computed = active if also is None else active | also
    out = linear_logprobs(hidden, weight, labels.masked_fill(~computed, ignore_index), bias, **head)
    return Tokens(out.log_probs, out.entropy, out.log_sum_sq_probs, active)


def reference_log_probs(
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, ref_log_probs: Tensor | None,
    labels: Tensor, active: Tensor, **head: Unpack[HeadKeywords],
) -> Tensor:  # fmt: skip
    """The reference model's log-probabilities without gradients: those given, or from its hidden states.

    Raises:
        ValueError: both forms are given, or neither.
    """
    parts = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias, "ref_log_probs": ref_log_probs}
    given = [name for name, tensor in parts.items() if tensor is not None]
    if ref_log_probs is not None and given == ["ref_log_probs"]:
        return ref_log_probs.detach()
    if ref_hidden is None or ref_weight is None or ref_log_probs is not None:
        raise ValueError(
            f"reference: got {', '.join(given) or 'nothing'}; must be ref_log_probs, or ref_hidden and ref_weight"
        )
    with torch.no_grad():
        return token_log_probs(ref_hidden, ref_weight, labels, ref_bias, active, **head).log_probs


def mean_where(values: Tensor, valid: Tensor, num_items: Tensor | float | None) -> Tensor:
    """The sum of ``values`` where ``valid``, over ``num_items`` or the number of valid ones; 0 if none is valid."""
    check_num_items(num_items)
    return reduce_loss(values.where(valid, 0.0), valid, "mean", num_items)


def sequence_sum(values: Tensor, active: Tensor) -> Tensor:
    """``[B]``, the sum of ``values`` ``[B, T]`` over the tokens that count."""
    return values.where(active, 0.0).sum(1)


def sequence_mean(values: Tensor, active: Tensor) -> Tensor:
    """``[B]``, the mean of ``values`` ``[B, T]`` over the tokens that count; 0 where none does."""
    return sequence_sum(values, active) / active.sum(1).clamp(min=1)
