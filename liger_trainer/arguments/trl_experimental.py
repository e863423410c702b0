"""The argument classes for trainers of ``trl.experimental``, apart from trl.py because importing them warns of that."""

from dataclasses import dataclass

from trl.experimental.cpo import CPOConfig
from trl.experimental.gkd import GKDConfig
from trl.experimental.gold import GOLDConfig
from trl.experimental.online_dpo import OnlineDPOConfig
from trl.experimental.orpo import ORPOConfig
from trl.experimental.tpo import TPOConfig

from .mixin import LigerArgumentsMixin


@dataclass
class LigerORPOConfig(LigerArgumentsMixin, ORPOConfig):
    """``trl.experimental.orpo.ORPOConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerCPOConfig(LigerArgumentsMixin, CPOConfig):
    """``trl.experimental.cpo.CPOConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerTPOConfig(LigerArgumentsMixin, TPOConfig):
    """``trl.experimental.tpo.TPOConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerGKDConfig(LigerArgumentsMixin, GKDConfig):
    """``trl.experimental.gkd.GKDConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerGOLDConfig(LigerArgumentsMixin, GOLDConfig):
    """``trl.experimental.gold.GOLDConfig`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerOnlineDPOConfig(LigerArgumentsMixin, OnlineDPOConfig):
    """``trl.experimental.online_dpo.OnlineDPOConfig`` with ``use_liger`` and ``liger_config``."""
