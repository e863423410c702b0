"""Post-training losses from hidden states: preference, policy-gradient and distillation losses without logits."""

from .distillation import DistillationStats, distillation_loss
from .dpo import dpo_loss
from .grpo import PolicyStats, grpo_loss
from .kto import KtoStats, kto_loss, kto_reference_point
from .pairs import PreferenceStats
from .reference_free import cpo_loss, orpo_loss, simpo_loss

__all__ = [
    "DistillationStats",
    "KtoStats",
    "PolicyStats",
    "PreferenceStats",
    "cpo_loss",
    "distillation_loss",
    "dpo_loss",
    "grpo_loss",
    "kto_loss",
    "kto_reference_point",
    "orpo_loss",
    "simpo_loss",
]
