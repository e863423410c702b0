"""The two fields that every argument class of this package adds."""

import copyreg
import dataclasses
import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..callbacks import install_default_callback
from ..config import LigerConfig

PACKAGE = __name__.partition(".")[0]
_SEQ2SEQ = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)} - set(TrainingArguments.__dataclass_fields__)


class WrongTrainer(TypeError, AttributeError):
    """The arguments of another trainer were given to ``Seq2SeqTrainer``; ``hasattr`` still says ``False``."""


class _Call:
    """Pickled as a call: what is loaded is the result of ``function(*args)``."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


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

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if name in _SEQ2SEQ:
            raise WrongTrainer(f"args: got {kind} without {name}; must be LigerSeq2SeqTrainingArguments")
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle so that ``training_args.bin`` loads as the plain class where this package is not imported."""
        cls = type(self)
        if cls.__module__.partition(".")[0] != PACKAGE:
            return super().__reduce_ex__(protocol)
        plain = next(base for base in cls.__mro__ if base.__module__.partition(".")[0] != PACKAGE)
        modules = _Call(getattr, _Call(importlib.import_module, "sys"), "modules")
        module = _Call(operator.methodcaller("get", cls.__module__), modules)
        found = _Call(getattr, module, cls.__name__, plain)
        return copyreg._reconstructor, (found, object, None), self.__dict__  # type: ignore[attr-defined]
