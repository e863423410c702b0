"""A recipe: one training run as YAML. Its keys are fields of dataclasses, and the command line overrides them."""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from trl.trainer.model_config import ModelConfig

from .. import arguments
from ..config import nearest
from ..medusa.model import MedusaConfig

TRAINERS = {"trainer": "LigerTrainingArguments", "sft": "LigerSFTConfig"}
EMBEDDED, SYNTHETIC = "embedded", "synthetic"  # datasets that are made here
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SYNTHETIC_LENGTHS = ("full", "ragged", "alpaca")


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

    trainer: str = _key("trainer", "transformers' Trainer (trainer) or TRL's SFT (sft).")
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
    dataset: str = _key(EMBEDDED, "Hub name, path of a .json, .jsonl or .parquet file, 'embedded', or 'synthetic'.")
    dataset_config: str | None = _key(None, "Configuration of a dataset on the hub.")
    dataset_split: str = _key("train", "Split or slice, such as 'train[:1000]'.")
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

    def __post_init__(self) -> None:
        config = self.model_config
        if isinstance(config, str):
            try:
                config = json.loads(config)
            except json.JSONDecodeError as error:
                raise RecipeError(f"model_config: got {config!r}; must be a JSON object: {error}") from error
        if config is not None:
            require(isinstance(config, dict), "model_config", config, "a JSON object")
            kind = config.get("model_type")
            allowed = f"a model type of transformers, such as llama{nearest(str(kind), list(CONFIG_MAPPING))}"
            require(kind in CONFIG_MAPPING, "model_config: model_type", kind, allowed)
        self.model_config = config
        if self.offline:
            require(config is not None, "model_config", None, "the shape of the model, as offline is true")
            if self.dataset != EMBEDDED and Path(self.dataset).suffix not in READERS:
                self.dataset = SYNTHETIC
        require_one_of(self.synthetic_lengths, "synthetic_lengths", SYNTHETIC_LENGTHS)
        for name, least in (("synthetic_examples", 1), ("eval_examples", 0), ("sample_tokens", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")


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


class Recipe(NamedTuple):
    """A parsed recipe. Exactly one of ``run.model_config`` and ``model.model_name_or_path`` is set.

    ``pad_to_multiple_of`` is for ``trainer: trainer``; TRL's trainers have it among their arguments. ``medusa`` is
    ``None`` for a model without Medusa heads.
    """

    run: RecipeArguments
    training: TrainingArguments
    model: ModelConfig
    max_length: int | None
    pad_to_multiple_of: int | None
    medusa: MedusaConfig | None

    @property
    def shape(self) -> dict[str, Any]:
        """``run.model_config`` of a model that is made from it."""
        assert isinstance(self.run.model_config, dict)
        return self.run.model_config

    @property
    def model_name(self) -> str:
        """``model.model_name_or_path`` of a model that is loaded."""
        assert self.model.model_name_or_path is not None
        return self.model.model_name_or_path


class _Parser(HfArgumentParser):
    """Raises where argparse would print two hundred options and exit.

    TRL's ``TrlParser`` is not used: it takes values from YAML as they are, so a string for a number, or a list for a
    single value, passes unchecked; and it can neither unset a key nor name the nearest one.
    """

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def parse_recipe(argv: list[str]) -> Recipe:
    """Read ``RECIPE.yaml [--key value ...]``.

    Args:
        argv: path of the recipe, then overrides. Keys are the fields of ``RecipeArguments``, of TRL's ``ModelConfig``,
            of ``LigerTrainingArguments`` with ``max_length``, or of ``LigerSFTConfig`` with ``trainer: sft``. They may
            be spelled with dashes. ``bf16: auto`` is true if the GPU supports it; without ``bf16``, accelerate's config
            decides. ``--key null`` unsets a key of the recipe.

    Raises:
        RecipeError: the file does not exist or is not a YAML mapping, a key is unknown (the nearest one is named), a
            value has the wrong type, or the combination cannot run.
    """
    content, overrides = _read(argv)
    given = {**content, **overrides}
    trainer = str(given.get("trainer") or "trainer")
    require_one_of(trainer, "trainer", TRAINERS)
    classes = [RecipeArguments, ModelConfig, getattr(arguments, TRAINERS[trainer]), MedusaArguments]
    if trainer == "trainer":
        classes.append(TokenArguments)
    parser = _Parser(classes, allow_abbrev=False, prog=f"liger-trainer train {argv[0]}")
    options = parser._option_string_actions
    options["--bf16"].type = _bool_or_auto
    if _launched_in_bf16():
        options["--bf16"].default = True
    for key in given:
        if f"--{key}" not in options:
            source = "command line" if key in overrides else argv[0]
            raise RecipeError(f"{source}: unknown key {key!r}{nearest(key, {a.dest for a in parser._actions})}")
    try:
        run, model, training, medusa, *tokens, rest = parser.parse_args_into_dataclasses(
            as_flags(given), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:  # raised by the dataclasses, transformers' included
        raise RecipeError(str(error)) from error
    if rest:
        raise RecipeError(f"{rest[0]!r} belongs to no key: overrides are written --key value, one value for most keys")
    lengths = tokens[0] if tokens else training
    recipe = Recipe(run, training, model, lengths.max_length, lengths.pad_to_multiple_of, medusa.config())
    _choose_model(recipe, "model_config" in overrides)
    _check(recipe)
    return recipe


def peek(argv: list[str], key: str) -> str | None:
    """The value of ``key`` in ``RECIPE.yaml [--key value ...]`` as text, unchecked; ``None`` if it is not set.

    Unlike ``parse_recipe``, this touches neither the GPU nor the process group.

    Raises:
        RecipeError: the file does not exist or is not a YAML mapping.
    """
    content, overrides = _read(argv)
    value = {**content, **overrides}.get(key)
    return None if value is None else "true" if value == [] else _text(value)


def as_flags(content: dict[str, Any]) -> list[str]:
    """A mapping of keys to values as a command line, without the keys whose value is ``None``."""
    words = []
    for key, value in content.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={_text(value)}")
    return words


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _read(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's content and the overrides, with underscores in their keys; an override of ``null`` is ``None``."""
    path, *words = argv
    content = read_mapping(path, "recipe")
    overrides: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            key = key.replace("-", "_")
            overrides[key] = [value] if equals else []
        elif key is None:
            raise RecipeError(f"{word!r} belongs to no key: overrides are written --key value")
        else:
            overrides[key].append(word)
    singles = {key: None if values == ["null"] else values[0] for key, values in overrides.items() if len(values) == 1}
    return {str(key).replace("-", "_"): value for key, value in content.items()}, {**overrides, **singles}


def read_mapping(path: str, name: str) -> dict[Any, Any]:
    """The content of a YAML file that holds a mapping; ``name`` says in errors what the file is.

    Raises:
        RecipeError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise RecipeError(f"{name}: no such file: {path!r}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: {path!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{name}: {path!r} must hold a YAML mapping of keys to values, got {type(content).__name__}")
    return content


def _choose_model(recipe: Recipe, overridden: bool) -> None:
    """Unset ``model_name_or_path`` if the run is offline, or else ``model_config`` if both are given."""
    run, model = recipe.run, recipe.model
    if run.offline:
        model.model_name_or_path = None
    elif run.model_config is not None and model.model_name_or_path is not None:
        if overridden:
            raise RecipeError(
                f"model_config: the model is {model.model_name_or_path!r}; for random weights, add --offline true "
                "(with synthetic rows) or --model_name_or_path null (with the recipe's data)"
            )
        run.model_config = None


def _check(recipe: Recipe) -> None:
    """Raise ``RecipeError`` for settings that are valid on their own but cannot run together or on this machine."""
    run, model = recipe.run, recipe.model
    if run.model_config is None and model.model_name_or_path is None:
        raise RecipeError("give model_name_or_path, or model_config for random weights; got neither")
    if run.dataset == SYNTHETIC:
        require(
            run.sample_prompt is None,
            "sample_prompt",
            run.sample_prompt,
            "null with synthetic rows, which have no tokenizer",
        )
    if model.load_in_4bit or model.load_in_8bit:
        if run.model_config is not None:
            raise RecipeError(
                "load_in_4bit and load_in_8bit quantise pretrained weights; model_config gives random ones"
            )
        if run.trainer == "trainer":
            raise RecipeError("load_in_4bit and load_in_8bit need trainer: sft, which prepares the quantised model")
    if recipe.medusa is not None:
        heads, smoothing = f"with medusa_heads {recipe.medusa.heads}", recipe.training.label_smoothing_factor
        require(run.trainer == "trainer", "trainer", run.trainer, f"trainer {heads}: others compute their own loss")
        require(not model.use_peft, "use_peft", True, f"false {heads}: whole weights are trained")
        require(smoothing == 0, "label_smoothing_factor", smoothing, f"0 {heads}: smoothing bypasses the heads")
        require(
            run.sample_prompt is None,
            "sample_prompt",
            run.sample_prompt,
            f"null {heads}: use MedusaModel and its lm to answer",
        )
    launched, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if launched != recipe.training.world_size:  # accelerate makes no process group by itself without GPUs
        raise RecipeError(
            f"launched as {launched} processes, which form a group of {recipe.training.world_size}: "
            "each would train alone; without GPUs, add --use_cpu true"
        )
    gpus = torch.cuda.device_count()
    if recipe.training.device.type == "cuda" and here > gpus:  # accelerate would let two of them share a GPU
        raise RecipeError(
            f"launched {here} processes on a machine with {gpus} GPUs: launch with --num_processes {gpus}"
        )


def _launched_in_bf16() -> bool:
    """Whether accelerate's config says ``mixed_precision: bf16``. DeepSpeed rejects arguments that differ from it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def _bool_or_auto(value: str | bool) -> bool:
    if value == "auto":
        supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return supported or _launched_in_bf16()
    return string_to_bool(value)
