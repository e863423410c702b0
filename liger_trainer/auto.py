"""The transformers Auto class with the kernels applied."""

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from .config import LigerConfig
from .patching import apply_liger


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
