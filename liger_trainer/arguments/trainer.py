"""The argument class for transformers' ``Trainer``."""

from dataclasses import dataclass

from transformers import TrainingArguments

from .mixin import LigerArgumentsMixin


@dataclass
class LigerTrainingArguments(LigerArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with ``use_liger`` and ``liger_config``."""
