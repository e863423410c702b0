"""Triton kernels for LLM training as a Hugging Face Trainer plugin.

The names below are imported when first used, so ``import liger_trainer`` is quick and needs neither a GPU nor Triton.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "LigerConfig": "config",
    "LigerReport": "report",
    "apply_liger": "patching",
    "revert_liger": "patching",
    "LigerCallback": "callbacks",
    "ThroughputCallback": "training.throughput",
    "AutoLigerModelForCausalLM": "auto",
    "MedusaConfig": "medusa",
    "MedusaModel": "medusa",
    "LigerTrainingArguments": "arguments",
    "LigerSFTConfig": "arguments",
    "LigerDPOConfig": "arguments",
    "LigerKTOConfig": "arguments",
    "LigerGRPOConfig": "arguments",
    "LigerRLOOConfig": "arguments",
    "LigerRewardConfig": "arguments",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
