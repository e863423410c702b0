"""The keys of a recipe that this package adds, as dataclasses, and the error for a key that is wrong."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..config import nearest
from ..medusa.model import MedusaConfig

EMBEDDED, SYNTHETIC = "embedded", "synthetic"  # datasets that are made here
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SYNTHETIC_LENGTHS = ("full", "ragged", "alpaca")
# Fields that count although a config may have no attribute of that name: transformers converts them, or models look
# whether they are there.
OTHER_FIELDS = (
    "model_type", "torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor", "attn_implementation",
    "head_dim", "quantization_config", "auto_map",
)  # fmt: skip


class RecipeError(ValueError):
    """A recipe, override or launch that cannot run. The message names the key, its value and what is allowed.

    It ends a run with that message alone (``failures``). Any other ``ValueError`` keeps its traceback.
    """


def require(met: bool, name: str, value: object, allowed: str) -> None:
    """Raise ``RecipeError`` unless ``met``: ``name`` got ``value``, but must be ``allowed``."""
    if not met:
        raise RecipeError(f"{name}: got {value!r}; must be {allowed}")


def require_one_of(value: str, name: str, allowed: Collection[str]) -> None:
    """Raise ``RecipeError`` unless ``value`` is one of ``allowed``; it names the nearest one."""
    require(value in allowed, name, value, f"one of {', '.join(allowed)}{nearest(value, allowed)}")


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RecipeArguments:
    """The keys of a recipe beyond the Trainer's arguments and TRL's ``ModelConfig``.

    Raises:
        RecipeError: ``model_config`` is not a JSON object with a known ``model_type``, ``synthetic_lengths`` is
            unknown, or a number is out of range.
    """

    trainer: str = _key(
        "trainer", "transformers' Trainer (trainer), TRL's sft, dpo, grpo or gkd, or sparse retrieval (splade)."
    )
    reward: str | None = _key(None, "Reward of a completion for grpo: module:function or file.py:function.")
    flops_weight: float = _key(1e-3, "Weight of the regulariser of splade, which keeps representations sparse.")
    score_scale: float = _key(1.0, "Factor of splade's scores; below 1 for random weights, whose scores are large.")
    model_config: dict[str, Any] | str | None = _key(  # noqa: RUF009  it makes a field
        None,
        "Config of a model with random weights, such as {model_type: llama, hidden_size: 256}. If "
        "model_name_or_path is given as well, this is the shape of that model, used with offline: true.",
    )
    offline: bool = _key(
        False,
        "Train random weights of model_config's shape on synthetic rows instead of the hub's model and data. Speed "
        "and memory stay the same.",
    )
    tokenizer: str | None = _key(
        None,
        "Hub name or path. Default: the model's own tokenizer; with model_config, one that is trained on the dataset.",
    )
    dataset: str = _key(
        EMBEDDED, "Hub name; .json, .jsonl, .csv or .parquet file or folder; 'embedded'; or 'synthetic'."
    )
    dataset_config: str | None = _key(None, "Configuration of a dataset on the hub.")
    dataset_split: str = _key("train", "Split or slice, such as 'train[:1000]'.")
    streaming: bool = _key(
        False,
        "Read a dataset of the hub or a file row by row while training, instead of first. Needs max_steps. Rows are "
        "shuffled among the next 1,000.",
    )
    text_column: str | None = _key(None, "Column of texts; every token has loss.")
    prompt_column: str | None = _key(None, "Column of prompts, which have no loss.")
    completion_column: str | None = _key(None, "Column of answers, which have loss.")
    response_marker: str | None = _key(
        None,
        "Text that ends the prompt within a text column, such as '### Response:'. Everything up to it has no loss.",
    )
    synthetic_lengths: str = _key(
        "full",
        "Lengths of synthetic rows: max_length (full), alternately max_length and one token less (ragged), or "
        "distributed like Alpaca's (alpaca).",
    )
    synthetic_examples: int = _key(4096, "Number of synthetic rows.")
    auto_batch_size: bool = _key(
        False,
        "Find the largest per_device_train_batch_size that fits, and reduce gradient accumulation so that a step "
        "keeps its number of rows. For one process; for several, use liger-trainer fit.",
    )
    eval_examples: int = _key(0, "Number of examples held out for evaluation.")
    sample_prompt: str | None = _key(None, "Question to answer after training.")
    sample_tokens: int = _key(64, "Maximum length of that answer in tokens.")

    @property
    def streams(self) -> bool:
        """Whether rows are read while training; those that are made here never are."""
        return self.streaming and self.dataset not in (EMBEDDED, SYNTHETIC)

    def __post_init__(self) -> None:
        config = self.model_config
        if isinstance(config, str):
            try:
                config = json.loads(config)
            except json.JSONDecodeError as error:
                raise RecipeError(f"model_config: got {config!r}; must be a JSON object: {error}") from error
        if config is not None:
            require(isinstance(config, dict), "model_config", config, "a JSON object")
            kind = str(config.get("model_type"))
            allowed = f"a model type of transformers, such as llama{nearest(kind, list(CONFIG_MAPPING))}"
            require(kind in CONFIG_MAPPING, "model_config: model_type", kind, allowed)
            _check_fields("model_config", config, AutoConfig.for_model(kind))
        self.model_config = config
        if self.offline:
            require(config is not None, "model_config", None, "the shape of the model, as offline is true")
            if self.dataset != EMBEDDED and Path(self.dataset).suffix not in READERS:
                self.dataset = SYNTHETIC
        require_one_of(self.synthetic_lengths, "synthetic_lengths", SYNTHETIC_LENGTHS)
        for name, least in (("synthetic_examples", 1), ("eval_examples", 0), ("sample_tokens", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")


def _check_fields(name: str, fields: dict[str, Any], default: PreTrainedConfig) -> None:
    """Raise ``RecipeError`` for a field that configs like ``default`` lack: transformers would ignore it."""
    for key, value in fields.items():
        if not hasattr(default, key) and key not in OTHER_FIELDS:
            raise RecipeError(f"{name}: unknown key {key!r}{nearest(key, default.to_dict())}")
        inner = getattr(default, key, None)
        if isinstance(value, dict) and isinstance(inner, PreTrainedConfig):
            kind = value.get("model_type", inner.model_type)
            _check_fields(f"{name}: {key}", value, AutoConfig.for_model(kind) if kind in CONFIG_MAPPING else inner)


@dataclass
class TokenArguments:
    """Keys that TRL's ``SFTConfig`` has and ``TrainingArguments`` lacks."""

    max_length: int = _key(1024, "Maximum tokens of an example; the rest is cut off.")
    pad_to_multiple_of: int = _key(
        8,
        "Pad batches to a multiple of this length. A larger multiple gives fewer distinct lengths. cuDNN's "
        "attention takes some 0.1 s on an H200 to plan for each new length.",
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value >= 1, name, value, "at least 1")


@dataclass
class MedusaArguments:
    """Medusa heads, for ``trainer: trainer``: the fields of ``MedusaConfig`` with a prefix."""

    medusa_heads: int = _key(0, "Number of Medusa heads to train; 0 for none.")
    medusa_layers: int = _key(1, "Number of residual blocks per head.")
    medusa_stage: int = _key(1, "1: train the heads on the frozen model. 2: train both.")
    medusa_coefficient: float = _key(0.2, "Weight of the sum of the heads' losses.")
    medusa_decay: float = _key(0.8, "Each head's loss weighs this times the previous one's.")

    def config(self) -> MedusaConfig | None:
        """The heads to make, if any."""
        if self.medusa_heads == 0:
            return None
        try:
            return MedusaConfig(**{name.removeprefix("medusa_"): value for name, value in vars(self).items()})
        except ValueError as error:  # its message begins with the field's name
            raise RecipeError(f"medusa_{error}") from error
