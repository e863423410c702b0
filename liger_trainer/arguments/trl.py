"""The argument classes for TRL's trainers: one class per trainer, which is all that a new trainer needs here."""

from dataclasses import dataclass

from trl import DistillationConfig, DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

from .mixin import LigerArgumentsMixin


@dataclass
class LigerSFTConfig(LigerArgumentsMixin, SFTConfig):
    """``trl.SFTConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerDPOConfig(LigerArgumentsMixin, DPOConfig):
    """``trl.DPOConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerKTOConfig(LigerArgumentsMixin, KTOConfig):
    """``trl.KTOConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerGRPOConfig(LigerArgumentsMixin, GRPOConfig):
    """``trl.GRPOConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerRLOOConfig(LigerArgumentsMixin, RLOOConfig):
    """``trl.RLOOConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerRewardConfig(LigerArgumentsMixin, RewardConfig):
    """``trl.RewardConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerDistillationConfig(LigerArgumentsMixin, DistillationConfig):
    """``trl.DistillationConfig`` with ``use_liger`` and ``liger_config``."""
