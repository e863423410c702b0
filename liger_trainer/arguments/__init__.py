"""Argument classes: those of transformers and TRL with ``use_liger`` and ``liger_config``, imported when first used."""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import LigerSeq2SeqTrainingArguments as LigerSeq2SeqTrainingArguments
    from .trainer import LigerTrainingArguments as LigerTrainingArguments
    from .trl import *  # noqa: F403
    from .trl_experimental import *  # noqa: F403
else:
    # The names come from the sources, because importing trl.py imports TRL, and the other one warns.
    _MODULES = {
        name: file
        for file in ("trainer", "trl", "trl_experimental")
        for name in re.findall(r"(?m)^class (\w+)", Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
    }
    __all__ = list(_MODULES)

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
