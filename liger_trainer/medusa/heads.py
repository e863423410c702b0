"""The heads of ``MedusaModel``: their settings, their parameters and the weighted sum of their losses."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..head.sharded_weights import check_materialized
from .loss import (
    IGNORE_INDEX,
    HeadCall,
    HeadLoss,
    HiddenGradient,
    fused_head_loss,
    open_gate,
    residual_blocks,
    tie_empty,
)


@dataclass(frozen=True)
class MedusaConfig:
    """Shape and loss of the heads.

    Args:
        heads: Number K of heads, at least 1.
        layers: Number of residual blocks per head, at least 1.
        coefficient: Weight of the sum of the heads' losses, above 0.
        decay: Each head's loss weighs this times the previous one's; above 0 and at most 1.
        stage: 1 trains the heads on a frozen LM, 2 trains both.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    heads: int = 5
    layers: int = 1
    coefficient: float = 0.2
    decay: float = 0.8
    stage: int = 1

    def __post_init__(self) -> None:
        for name in ("heads", "layers", "stage"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name}: got {getattr(self, name)!r}; must be an int")
        for name in ("coefficient", "decay"):
            if type(getattr(self, name)) not in (int, float):
                raise TypeError(f"{name}: got {getattr(self, name)!r}; must be a float")
        for name in ("heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 1")
        if not 0 < self.coefficient < math.inf:
            raise ValueError(f"coefficient: got {self.coefficient}; must be above 0 and finite")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: got {self.decay}; must be above 0 and at most 1")
        if self.stage not in (1, 2):
            raise ValueError(f"stage: got {self.stage}; must be 1 (heads on a frozen LM) or 2 (both)")

    def weight(self, k: int) -> float:
        """The weight of head ``k``'s loss, ``coefficient * decay^k``, for ``k`` from 1."""
        return self.coefficient * self.decay**k


class MedusaHead(nn.Module):
    """One head. It holds its parameters itself, without submodules, so that sharded engines gather all of them for it.

    Args:
        embedding: The LM's output embedding ``[V, H]``; the head's projection starts as a copy of it.
        layers: Number of residual blocks.
    """

    def __init__(self, embedding: Tensor, layers: int):
        super().__init__()
        rows = layers * embedding.shape[1]
        self.residual_weight = nn.Parameter(embedding.new_zeros(rows, embedding.shape[1]))
        self.residual_bias = nn.Parameter(embedding.new_zeros(rows))
        self.weight = nn.Parameter(embedding.detach().clone())

    def forward(self, hidden: Tensor, gate: Tensor | None, call: HeadCall) -> Tensor:
        """Store this head's share of the loss in ``call.loss``.

        Activation checkpointing may run this again in backward. The loss of that run is dropped.

        Args:
            hidden: ``[B, T, H]``.
            gate: As in ``fused_head_loss``.
            call: The labels and options of this call.

        Returns:
            The empty tensor of ``tie_empty``.

        Raises:
            ValueError: Reentrant activation checkpointing is in use.
        """
        first = call.begin()
        parameters = [self.residual_weight, self.residual_bias, self.weight]
        if call.head_loss is None:
            for name, parameter in self.named_parameters():
                check_materialized(f"{type(self).__name__}.{name}", parameter)
            loss = fused_head_loss(hidden, gate, call, parameters, first)
        else:
            x = residual_blocks(hidden, *parameters[:2])
            loss = call.head_loss(x.flatten(0, -2), self.weight, call.labels.flatten(), **call.options)
            loss = loss / call.num_items
        loss, empty = tie_empty(loss, hidden.dtype)
        if first:
            call.loss = loss
        return empty


class MedusaHeads(nn.ModuleList):
    """The heads of an LM whose output embedding is ``embedding`` ``[V, H]``."""

    def __init__(self, embedding: Tensor, config: MedusaConfig):
        super().__init__(MedusaHead(embedding, config.layers) for _ in range(config.heads))
        self.config = config

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items: Tensor | float,
        head_loss: HeadLoss | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted sum of the heads' losses, and each head's loss.

        Args:
            hidden: ``[B, T, H]``, the backbone's last hidden states.
            labels: ``[B, T]``, not shifted, -100 where a token has no loss. Head ``k`` at position ``t`` predicts
                ``labels[:, t + 1 + k]``. A row too short for a head adds nothing to that head's loss.
            num_items: Divisor of each head's sum of cross-entropies.
            head_loss: As in ``HeadCall``.
            options: As in ``HeadCall``.

        Returns:
            Both in fp32: a 0-d tensor, and a detached ``[K]``.
        """
        gate = shared = None
        if head_loss is None and torch.is_grad_enabled() and hidden.requires_grad:
            shared = HiddenGradient(hidden)
            gate = open_gate(hidden, shared)
        hidden = hidden.detach() if head_loss is None else hidden
        terms, losses = [], []
        for k, head in enumerate(self, 1):
            weight = self.config.weight(k)
            call = HeadCall(shifted_labels(labels, k), num_items / weight, head_loss, options, shared)
            empty = head(hidden, gate, call)
            loss = call.pop_loss()
            terms.append(loss + empty.sum())
            losses.append(loss.detach() / weight)
        return functools.reduce(torch.add, terms), torch.stack(losses)


def shifted_labels(labels: Tensor, k: int) -> Tensor:
    """Align ``labels`` ``[B, T]`` with head ``k``: position t gets label ``t + 1 + k``, or -100 past the end."""
    kept = labels[:, 1 + k :]
    return F.pad(kept, (0, labels.shape[1] - kept.shape[1]), value=IGNORE_INDEX)
