"""Argument classes: those of transformers and TRL with the ``use_liger`` flag."""

import importlib
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..callbacks import install_default_callback
from ..config import LigerConfig


@dataclass
class LigerArgumentsMixin:
    """The two fields added to a transformers or TRL argument class.

    Raises:
        ValueError: ``use_liger`` together with transformers' own ``use_liger_kernel``; an unknown key in
            ``liger_config``; ``liger_config`` without ``use_liger``.
        TypeError: a value of the wrong type in ``liger_config``.
    """

    use_liger: bool = field(
        default=False,
        metadata={"help": "Apply liger_trainer's kernels and fused loss to the model when the Trainer is made."},
    )
    liger_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of `LigerConfig` as a dict or JSON, e.g. '{\"rope\": false}'. None: the defaults."},
    )

    def __post_init__(self):
        if self.use_liger and self.use_liger_kernel:
            raise ValueError(
                "use_liger=True and use_liger_kernel=True would both patch the model: keep `use_liger` "
                "(liger_trainer) or `use_liger_kernel` (the liger-kernel package), not both"
            )
        if self.liger_config is not None:
            if not self.use_liger:
                raise ValueError("liger_config is given but use_liger is False: set use_liger=True or drop it")
            self.liger_config = LigerConfig.parse(self.liger_config).to_dict()
        super().__post_init__()
        if self.use_liger:
            install_default_callback()


@dataclass
class LigerTrainingArguments(LigerArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with ``use_liger`` and ``liger_config``."""


# TRL is imported when one of its classes is asked for: `import liger_trainer` stays light.
TRL_ARGUMENTS = {
    "LigerSFTConfig": "SFTConfig",
    "LigerDPOConfig": "DPOConfig",
    "LigerKTOConfig": "KTOConfig",
    "LigerGRPOConfig": "GRPOConfig",
    "LigerRLOOConfig": "RLOOConfig",
    "LigerRewardConfig": "RewardConfig",
}


def __getattr__(name: str):
    if name not in TRL_ARGUMENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module("trl"), TRL_ARGUMENTS[name])
    doc = f"``trl.{base.__name__}`` with ``use_liger`` and ``liger_config``."
    cls = dataclass(type(name, (LigerArgumentsMixin, base), {"__doc__": doc, "__module__": __name__}))
    globals()[name] = cls  # one class a name: pickling and isinstance depend on it
    return cls
