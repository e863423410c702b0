"""The heads of ``MedusaModel``: their settings, their parameters and the weighted sum of their losses."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..probing.sharding import check_materialized
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
        heads: number K of heads, at least 1.
        layers: residual blocks of a head, at least 1.
        coefficient: factor of all heads' losses, above 0.
        decay: factor from one head to the next, in (0, 1].
        stage: 1 trains the heads on a frozen LM, 2 both.

    Raises:
        TypeError, ValueError: an argument of another type or out of range; names it, its value and what is allowed.
    """

    heads: int = 5
    layers: int = 1
    coefficient: float = 0.2
    decay: float = 0.8
    stage: int = 1

    def __post_init__(self):
        for name in ("heads", "layers", "stage"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an int, got {getattr(self, name)!r}")
        for name in ("coefficient", "decay"):
            if type(getattr(self, name)) not in (int, float):
                raise TypeError(f"{name} must be a float, got {getattr(self, name)!r}")
        for name in ("heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.coefficient < math.inf:
            raise ValueError(f"coefficient must be above 0 and finite, got {self.coefficient}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 (heads on a frozen LM) or 2 (both), got {self.stage}")

    def weight(self, k: int) -> float:
        """The factor of head ``k``'s loss, ``k`` from 1: ``coefficient * decay^k``."""
        return self.coefficient * self.decay**k


class MedusaHead(nn.Module):
    """One head. Its parameters are its own, not those of submodules, so that sharded engines gather them at its call.

    Args:
        embedding: the LM's output embedding ``[V, H]``, which the head's projection starts as.
        layers: number of residual blocks.
    """

    def __init__(self, embedding: Tensor, layers: int):
        super().__init__()
        rows = layers * embedding.shape[1]
        self.residual_weight = nn.Parameter(embedding.new_zeros(rows, embedding.shape[1]))
        self.residual_bias = nn.Parameter(embedding.new_zeros(rows))
        self.weight = nn.Parameter(embedding.detach().clone())

    def forward(self, hidden: Tensor, gate: Tensor | None, call: HeadCall) -> Tensor:
        """Put this head's share of the loss in ``call.loss``; returns the empty tensor of ``tie_empty``.

        ``hidden`` is ``[B, T, H]``; ``gate`` that of ``fused_head_loss``. Activation checkpointing may run this again
        in backward: that run's loss is dropped.

        Raises:
            ValueError: under reentrant activation checkpointing.
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
    """The ``config.heads`` heads of an LM with the output embedding ``embedding`` ``[V, H]``."""

    def __init__(self, embedding: Tensor, config: MedusaConfig):
        super().__init__(MedusaHead(embedding, config.layers) for _ in range(config.heads))
        self.config = config

    def forward(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | float, head_loss: HeadLoss | None, options: dict
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the heads' losses, and each head's loss.

        Args:
            hidden: ``[B, T, H]``, the backbone's last hidden states.
            labels: ``[B, T]``, not shifted, -100 where a token bears no loss. Head ``k`` at ``t`` is compared with
                ``labels[:, t + 1 + k]``; a row too short for a head adds nothing to its loss.
            num_items: what each head's sum of cross-entropies is divided by.
            head_loss, options: as in ``HeadCall``.

        Returns:
            fp32, 0-d and detached ``[K]``.
        """
        gate = shared = None
        if head_loss is None and torch.is_grad_enabled() and hidden.requires_grad:
            shared = HiddenGradient(hidden)
            gate = open_gate(hidden, shared)
        hidden = hidden.detach() if head_loss is None else hidden
        total, losses = 0.0, []
        for k, head in enumerate(self, 1):
            weight = self.config.weight(k)
            call = HeadCall(shifted_labels(labels, k), num_items / weight, head_loss, options, shared)
            empty = head(hidden, gate, call)
            loss, call.loss = call.loss, None  # activation checkpointing keeps the call, and so would keep the graph
            total = total + loss + empty.sum()
            losses.append(loss.detach() / weight)
        return total, torch.stack(losses)


def shifted_labels(labels: Tensor, k: int) -> Tensor:
    """``labels`` ``[B, T]`` aligned with head ``k``: position t holds label ``t + 1 + k``, or -100 past the end."""
    kept = labels[:, 1 + k :]
    return F.pad(kept, (0, labels.shape[1] - kept.shape[1]), value=IGNORE_INDEX)
