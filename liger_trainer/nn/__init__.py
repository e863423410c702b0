"""``torch.nn.Module`` forms of the ops, for models that you write: norms, gated MLPs and losses."""

from .losses import LigerCrossEntropyLoss, LigerLinearCrossEntropyLoss
from .mlps import LigerGEGLUMLP, LigerSwiGLUMLP
from .norms import LigerLayerNorm, LigerRMSNorm

__all__ = [
    "LigerCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerLinearCrossEntropyLoss",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
]
