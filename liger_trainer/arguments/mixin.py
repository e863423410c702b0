"""The two fields that every argument class of this package adds."""

from dataclasses import dataclass, field
from typing import Any, cast

from transformers import TrainingArguments

from ..callbacks import install_default_callback
from ..config import LigerConfig


@dataclass
class LigerArgumentsMixin:
    """Adds ``use_liger`` and ``liger_config`` to the transformers or TRL argument class that follows it as a base.

    Raises:
        ValueError: ``use_liger`` is set together with transformers' own ``use_liger_kernel``, ``liger_config`` has an
            unknown key, or ``liger_config`` is given without ``use_liger``.
        TypeError: a value in ``liger_config`` has the wrong type.
    """

    use_liger: bool = field(
        default=False,
        metadata={"help": "Apply liger_trainer's kernels and fused loss to the model when the Trainer is made."},
    )
    liger_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of `LigerConfig` as a dict or JSON, e.g. '{\"rope\": false}'. None: the defaults."},
    )

    def __post_init__(self) -> None:
        if self.use_liger and cast(TrainingArguments, self).use_liger_kernel:
            raise ValueError(
                "use_liger: got use_liger=True and use_liger_kernel=True, which would both patch the model; must be "
                "one of them: `use_liger` (liger_trainer) or `use_liger_kernel` (the liger-kernel package)"
            )
        if self.liger_config is not None:
            if not self.use_liger:
                raise ValueError(
                    f"liger_config: got {self.liger_config!r} with use_liger=False; must be None unless use_liger=True"
                )
            self.liger_config = LigerConfig.parse(self.liger_config).to_dict()
        cast(TrainingArguments, super()).__post_init__()
        if self.use_liger:
            install_default_callback()
