"""``LigerConfig``: which kernels a user asks for, and with which options."""

import dataclasses
import difflib
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the valid name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _kind(default: bool | str = True) -> Any:
    """A field that turns one kind of rule on or off; ``liger_trainer/rules/`` has the rules of that name."""
    return dataclasses.field(default=default, metadata={"kind": True})


def _option_of(kind: str, default: Any) -> Any:
    """A field that belongs to ``kind``; ``options_of(kind)`` hands it to the op."""
    return dataclasses.field(default=default, metadata={"option_of": kind})


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether ``value`` is of a field's type: exactly a class, one of ``Literal``'s values, or either in a union."""
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_of(value, one) for one in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    return type(value) is annotation


def _described(annotation: Any) -> str:
    """A field's type for an error message: ``bool``, or ``int or 'auto'``."""
    if get_origin(annotation) in (Union, UnionType, Literal):
        return " or ".join(_described(one) for one in get_args(annotation))
    return getattr(annotation, "__name__", repr(annotation))


# Options of liger-kernel, and what does the same here.
_OTHER_NAMES = {
    "swiglu": "glu", "geglu": "glu", "cross_entropy": "fused_loss", "fused_linear_cross_entropy": "fused_loss",
}  # fmt: skip


@dataclass(frozen=True)
class LigerConfig:
    """Which kernels to apply and how.

    Args:
        rms_norm: Replace RMS norms where a numeric probe shows that our op computes the same.
        layer_norm: Replace layer norms, found in the same way.
        rope: Replace rotary embeddings, found in the same way.
        glu: Replace gated activations (SwiGLU, GeGLU), found in the same way.
        lora: Run PEFT's LoRA linear layers with one narrow GEMM for the input and none of its casts, where a numeric
            probe shows that our op computes the same.
        attention: Pass grouped keys and values to SDPA as they are. transformers repeats them for each query head when
            there is a mask. Applies where torch has a fused kernel for grouped heads, and not under torch.compile.
        fused_loss: Compute the causal-LM loss inside ``lm_head``, for one chunk of tokens at a time.
        unpad: Run padded batches through the decoder stack as one row of their real tokens, in training and where only
            the loss or per-token values at real tokens are read. Before the first step, a few short rows run both ways.
            Does not apply under torch.compile.
        padding_mask: Drop the mask of training batches that stay padded and that causal attention does not need: all
            padding is on the right and has no labels. Loss and gradients stay the same; hidden states at padding
            change. Does not apply under torch.compile. Deprecated as an option: ``unpad`` takes its place.
        strict: Raise an error if a requested kernel cannot be applied, instead of listing it in the report.
            ``unpad``, ``padding_mask`` and ``recompute`` are exempt because they are decided per batch.
        logits_budget_mib: Memory budget, in MiB, for one chunk of logits, or "auto": 512 MiB, and where a trained head
            runs on a CUDA device, up to half of the memory that is free at that time. A larger chunk is faster. Ignored
            when a single chunk needs no more memory than chunking plus its fp32 accumulator. Changes results by
            rounding only; runs are bit-reproducible with a number, and with "auto" under
            ``torch.use_deterministic_algorithms(True)``.
        low_memory: Compute the logits of the fused loss twice, 64 to 256 MiB at a time, without an fp32 accumulator
            for the gradient of ``lm_head``. Saves the accumulator and most of a chunk; made a trained head 17 to 56 %
            slower with chunks of 64 MiB (H100, ``docs/paper.md``).
        recompute: ``"auto"``: where activation checkpointing is asked for, recompute as many layers as memory requires
            and no more; where it is not, recompute layers instead of running out of memory. ``"all"``: as the
            arguments say. Acts on GPUs (``docs/memory.md``); not under torch.compile.
        memory_margin: Share of the GPU's memory that ``recompute="auto"`` leaves free.
        recompute_glu: Recompute ``act(gate) * up`` in backward instead of saving it. Saves a third of the activations
            of a gated MLP for one extra write. Applies if the down projection is a plain ``nn.Linear`` without hooks,
            or a LoRA layer over one or over a 4-bit one.

    Raises:
        TypeError: An option has the wrong type. The message names the option, its value and the expected type.
        ValueError: ``logits_budget_mib`` is below 1, or ``memory_margin`` is not from 0 to below 1.
    """

    rms_norm: bool = _kind()
    layer_norm: bool = _kind()
    rope: bool = _kind()
    glu: bool = _kind()
    lora: bool = _kind()
    attention: bool = _kind()
    fused_loss: bool = _kind()
    unpad: bool = _kind()
    padding_mask: bool = _kind()
    recompute: Literal["auto", "all"] = _kind("auto")
    strict: bool = False
    logits_budget_mib: int | Literal["auto"] = _option_of("fused_loss", "auto")
    low_memory: bool = _option_of("fused_loss", False)
    recompute_glu: bool = _option_of("glu", True)
    memory_margin: float = _option_of("recompute", 0.08)

    def __post_init__(self) -> None:
        if self.padding_mask is False:
            message = "liger_config.padding_mask is deprecated: unpad takes its place"
            warnings.warn(message, FutureWarning, stacklevel=3)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_of(value, field.type):
                raise TypeError(f"liger_config.{field.name}: got {value!r}; must be of type {_described(field.type)}")
        budget = self.logits_budget_mib
        if budget != "auto" and budget < 1:
            raise ValueError(f"liger_config.logits_budget_mib: got {budget}; must be at least 1 (MiB), or 'auto'")
        if not 0 <= self.memory_margin < 1:
            raise ValueError(f"liger_config.memory_margin: got {self.memory_margin}; must be from 0 to below 1")

    @classmethod
    def parse(cls, value: "LigerConfig | dict[str, Any] | str | None") -> "LigerConfig":
        """Make a config from a config, a dict, JSON text (from a command line), or ``None`` for the defaults.

        Raises:
            ValueError: The text is not a JSON object, or a key is unknown. The message names the nearest valid key.
            TypeError: The value has another type.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"liger_config: got {value!r}; must be a JSON object ({error})") from error
        if not isinstance(value, dict):
            raise TypeError(f"liger_config: got {value!r}; must be a LigerConfig, a dict, a JSON object or None")
        valid = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in valid:
                other = _OTHER_NAMES.get(str(key))
                hint = f" (here it is {other!r})" if other else nearest(str(key), valid)
                raise ValueError(f"liger_config: got unknown key {key!r}{hint}; must be one of {', '.join(valid)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """The options as a plain dict, which ``parse`` reads back."""
        return dataclasses.asdict(self)

    def wants(self, kind: str) -> bool:
        """Whether ``kind``, one of ``KINDS``, is requested."""
        return getattr(self, kind) not in (False, "all")

    def options_of(self, kind: str) -> dict[str, Any]:
        """The options that belong to ``kind``, one of ``KINDS``, as keyword arguments of its op."""
        return {name: getattr(self, name) for name in _OPTIONS[kind]}


# Names of the kinds, in the order of their fields; ``liger_trainer/rules/`` has the rules of each.
KINDS = tuple(field.name for field in dataclasses.fields(LigerConfig) if field.metadata.get("kind"))
_OPTIONS = {
    kind: tuple(field.name for field in dataclasses.fields(LigerConfig) if field.metadata.get("option_of") == kind)
    for kind in KINDS
}
