"""The transformers Auto class with the kernels applied."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .config import LigerConfig
from .patching import apply_liger
from .report import LigerReport


class AutoLigerModelForCausalLM:
    """``AutoModelForCausalLM`` followed by ``apply_liger``; both methods also take a ``liger_config``."""

    @classmethod
    def from_pretrained(
        cls, *args: Any, liger_config: LigerConfig | dict[str, Any] | str | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Return the patched ``AutoModelForCausalLM.from_pretrained(*args, **kwargs)``.

        With ``output_loading_info=True`` this is a tuple, as in transformers.
        """
        return _patched(AutoModelForCausalLM.from_pretrained, args, kwargs, liger_config)

    @classmethod
    def from_config(
        cls, *args: Any, liger_config: LigerConfig | dict[str, Any] | str | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Return the patched ``AutoModelForCausalLM.from_config(*args, **kwargs)``."""
        return _patched(AutoModelForCausalLM.from_config, args, kwargs, liger_config)


def _patched(
    make: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    liger_config: LigerConfig | dict[str, Any] | str | None,
) -> Any:
    config = LigerConfig.parse(liger_config)  # a bad option must fail before the weights are loaded
    made = make(*args, **kwargs)
    apply_liger(made[0] if isinstance(made, tuple) else made, config)
    return made


def report_of(name: str) -> LigerReport:
    """What ``apply_liger`` does to the model with this hub name or path, which is built without weights.

    Raises:
        OSError: There is no such model.
        ValueError: Its class is not in transformers.
    """
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = _model_class(name, config)._from_config(config)
    return apply_liger(model)


def _model_class(name: str, config: PreTrainedConfig) -> Any:
    """The class that ``config.architectures`` names, or else the first Auto class's for this kind of config."""
    if config.architectures:
        cls = getattr(transformers, config.architectures[0], None)
        if cls is None:
            raise ValueError(f"model: got {name!r} of class {config.architectures[0]}; must be one of transformers")
        return cls
    auto_classes = ("CausalLM", "ImageTextToText", "Seq2SeqLM", "MaskedLM")
    mappings = [getattr(transformers, f"AutoModelFor{task}")._model_mapping for task in auto_classes]
    mappings.append(transformers.AutoModel._model_mapping)
    return next(mapping[type(config)] for mapping in mappings if type(config) in mapping)
