"""What a user can ask for: one frozen dataclass, checked when it is made."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Any

LAYER_KINDS = ("rms_norm", "layer_norm", "rope", "glu", "attention")
KINDS = (*LAYER_KINDS, "padding_mask", "fused_loss")
BY_BATCH = ("padding_mask",)  # replaces nothing, and each batch decides: no promise that ``strict`` could hold us to


def nearest(name: str, valid) -> str:
    """`` (did you mean 'x'?)`` for the valid name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True)
class LigerConfig:
    """Which kernels to apply and how.

    Args:
        rms_norm, layer_norm, rope, glu: replace the model's RMS norms, layer norms, rotary embeddings and gated
            activations (SwiGLU, GeGLU) where a numeric probe shows that our op computes the same.
        attention: grouped-query attention under a mask hands SDPA keys and values as they are, where
            transformers repeats them for each query head; only where torch has a fused kernel for it, and not under
            torch.compile.
        padding_mask: training batches whose padding is on the right and has no labels are given to causal attention
            without their mask, which changes neither loss nor gradients; hidden states at padding are others. Not under
            torch.compile.
        fused_loss: compute the causal-LM loss inside ``lm_head``, with the logits of a chunk of tokens at a time.
        strict: anything asked for and not applied is an error instead of a line in the report; but for
            ``padding_mask``, which is up to each batch.
        logits_budget_mib: what the logits of a chunk may take in MiB. Larger is faster up to a point, smaller is
            leaner; it changes no result. While ``lm_head`` is trained in bf16, chunks need an fp32 sum of its gradient:
            if all tokens at once take no more memory than a chunk and that sum, they are taken at once, whatever this
            says.
        low_memory: the fused loss computes the logits twice, at most 64 MiB of them at a time, without an fp32 sum of
            ``lm_head``'s gradient: leaner by that sum and by most of a chunk, a head that is trained slower by 17 to
            56 % (H100, ``docs/paper.md``).
        recompute_glu: gated MLPs keep their gate and up projections for backward but not ``act(gate) * up``, which is
            made again along with their gradients: leaner by a third of the MLP's activations for one more write.
            Where the down projection is a bare ``nn.Linear``: one with an adapter or hooks keeps its input.

    Raises:
        TypeError: an option of the wrong type; names the option, its value and the type expected.
        ValueError: ``logits_budget_mib`` below 1.
    """

    rms_norm: bool = True
    layer_norm: bool = True
    rope: bool = True
    glu: bool = True
    attention: bool = True
    padding_mask: bool = True
    fused_loss: bool = True
    strict: bool = False
    logits_budget_mib: int = 512
    low_memory: bool = False
    recompute_glu: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise TypeError(f"liger_config: {field.name} must be {field.type.__name__}, got {value!r}")
        if self.logits_budget_mib < 1:
            raise ValueError(f"liger_config: logits_budget_mib must be at least 1 (MiB), got {self.logits_budget_mib}")

    @classmethod
    def parse(cls, value: "LigerConfig | dict[str, Any] | str | None") -> "LigerConfig":
        """A config from itself, a dict, JSON text (as a command line gives it), or ``None`` for the defaults.

        Raises:
            ValueError: text that is not a JSON object, or an unknown key (names it and the nearest valid one).
            TypeError: a value of another type.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"liger_config must be a JSON object, got {value!r}: {error}") from error
        if not isinstance(value, dict):
            raise TypeError(f"liger_config must be a LigerConfig, a dict, a JSON object or None, got {value!r}")
        valid = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in valid:
                hint = nearest(str(key), valid)
                raise ValueError(f"liger_config: unknown key {key!r}{hint}; valid keys: {', '.join(valid)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """The options as a plain dict, which ``parse`` reads back."""
        return dataclasses.asdict(self)

    def wants(self, kind: str) -> bool:
        """Whether ``kind``, one of ``KINDS``, was asked for."""
        return getattr(self, kind)
