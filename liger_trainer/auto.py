"""The transformers Auto class with the kernels applied."""

from transformers import AutoModelForCausalLM, PreTrainedModel

from .config import LigerConfig
from .patching import apply_liger


class AutoLigerModelForCausalLM:
    """``AutoModelForCausalLM`` followed by ``apply_liger``; both methods take a further ``liger_config``."""

    @classmethod
    def from_pretrained(cls, *args, liger_config: LigerConfig | dict | str | None = None, **kwargs) -> PreTrainedModel:
        """``AutoModelForCausalLM.from_pretrained(*args, **kwargs)``, patched."""
        return _patched(AutoModelForCausalLM.from_pretrained, args, kwargs, liger_config)

    @classmethod
    def from_config(cls, *args, liger_config: LigerConfig | dict | str | None = None, **kwargs) -> PreTrainedModel:
        """``AutoModelForCausalLM.from_config(*args, **kwargs)``, patched."""
        return _patched(AutoModelForCausalLM.from_config, args, kwargs, liger_config)


def _patched(make, args, kwargs, liger_config):
    config = LigerConfig.parse(liger_config)  # a bad option fails before the weights are loaded
    made = make(*args, **kwargs)
    apply_liger(made[0] if isinstance(made, tuple) else made, config)  # a tuple with output_loading_info=True
    return made
