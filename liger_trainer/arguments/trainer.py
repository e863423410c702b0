"""The argument classes for transformers' ``Trainer`` and ``Seq2SeqTrainer``."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .mixin import LigerArgumentsMixin


@dataclass
class LigerTrainingArguments(LigerArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with ``use_liger`` and ``liger_config``."""


@dataclass
class LigerSeq2SeqTrainingArguments(LigerArgumentsMixin, Seq2SeqTrainingArguments):
    """``transformers.Seq2SeqTrainingArguments`` with ``use_liger`` and ``liger_config``."""
