"""Triton kernels for LLM training as a Hugging Face Trainer plugin.

The public names are imported when first used, so ``import liger_trainer`` is quick and needs neither a GPU nor Triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .arguments.trainer import LigerSeq2SeqTrainingArguments as LigerSeq2SeqTrainingArguments
    from .arguments.trainer import LigerTrainingArguments as LigerTrainingArguments
    from .arguments.trl import *  # noqa: F403
    from .arguments.trl_experimental import *  # noqa: F403
    from .auto import AutoLigerModelForCausalLM as AutoLigerModelForCausalLM
    from .callbacks import LigerCallback as LigerCallback
    from .config import LigerConfig as LigerConfig
    from .medusa import MedusaConfig as MedusaConfig
    from .medusa import MedusaModel as MedusaModel
    from .patching import apply_liger as apply_liger
    from .patching import revert_liger as revert_liger
    from .report import LigerReport as LigerReport
    from .training.throughput import ThroughputCallback as ThroughputCallback
else:
    from . import arguments

    _MODULES = {
        "LigerConfig": "config",
        "LigerReport": "report",
        "apply_liger": "patching",
        "revert_liger": "patching",
        "LigerCallback": "callbacks",
        "ThroughputCallback": "training.throughput",
        "AutoLigerModelForCausalLM": "auto",
        "MedusaConfig": "medusa",
        "MedusaModel": "medusa",
    } | dict.fromkeys(arguments.__all__, "arguments")
    __all__ = [*_MODULES, "__version__"]

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)

    def __dir__() -> list[str]:
        return sorted(__all__)
