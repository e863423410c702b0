"""A recipe: one training run as YAML. Its keys are the fields of dataclasses, and the command line overrides them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from trl import ModelConfig

from .. import arguments
from ..config import nearest
from ..medusa.model import MedusaConfig
from . import synthetic
from .data import EMBEDDED, READERS
from .errors import RecipeError

TRAINERS = {"trainer": "LigerTrainingArguments", "sft": "LigerSFTConfig"}


@dataclass
class RecipeArguments:
    """What a recipe says beyond the Trainer's arguments and TRL's ``ModelConfig``.

    Raises:
        ValueError: ``model_config`` that is not a JSON object with a ``model_type``; ``synthetic_lengths`` that there
            are not; ``sample_tokens``, ``eval_examples`` or ``synthetic_examples`` out of range.
    """

    trainer: str = field(default="trainer", metadata={"help": "transformers' Trainer (trainer) or TRL's SFT (sft)."})
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Config of a model with random weights, such as {model_type: llama, hidden_size: 256}. Beside "
            "model_name_or_path: the shape of that model, for offline."
        },
    )
    offline: bool = field(
        default=False,
        metadata={
            "help": "Random weights of model_config's shape and synthetic rows in place of the hub's model and data: "
            "neither changes speed or memory."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub name or path. Default: the model's; with model_config, one trained on the dataset."},
    )
    dataset: str = field(
        default=EMBEDDED,
        metadata={"help": "Hub name, path of a .json, .jsonl or .parquet file, 'embedded', or 'synthetic'."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split or slice, such as 'train[:1000]'."})
    text_column: str | None = field(default=None, metadata={"help": "Column to train on as a whole."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of prompts, which bear no loss."})
    completion_column: str | None = field(default=None, metadata={"help": "Column of answers, which bear the loss."})
    response_marker: str | None = field(
        default=None,
        metadata={"help": "Text that ends the prompt within a text column, such as '### Response:'; no loss up to it."},
    )
    synthetic_lengths: str = field(
        default="full",
        metadata={
            "help": "Synthetic rows: all of max_length (full), every second one a token shorter (ragged), or of the "
            "lengths of Alpaca's (alpaca)."
        },
    )
    synthetic_examples: int = field(default=4096, metadata={"help": "Number of synthetic rows."})
    auto_batch_size: bool = field(
        default=False,
        metadata={
            "help": "In one process: train with the largest per_device_train_batch_size that fits and as much less "
            "accumulation, so that a step has as many rows as the recipe says. Several processes: liger-trainer fit."
        },
    )
    eval_examples: int = field(default=0, metadata={"help": "Examples held out for evaluation."})
    sample_prompt: str | None = field(default=None, metadata={"help": "Question to answer after training."})
    sample_tokens: int = field(default=64, metadata={"help": "Length of that answer in tokens."})

    def __post_init__(self):
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except json.JSONDecodeError as error:
                raise ValueError(f"model_config must be a JSON object, got {self.model_config!r}: {error}") from error
        if self.model_config is not None and not isinstance(self.model_config, dict):
            raise ValueError(f"model_config must be a JSON object, got {self.model_config!r}")
        if self.model_config is not None and self.model_config.get("model_type") not in CONFIG_MAPPING:
            kind = self.model_config.get("model_type")
            raise ValueError(
                f"model_config needs a model_type that transformers has, such as llama; got {kind!r}"
                f"{nearest(str(kind), list(CONFIG_MAPPING))}"
            )
        if self.offline and self.model_config is None:
            raise ValueError("offline needs model_config, the shape of the model that gets random weights; got none")
        if self.offline and self.dataset != EMBEDDED and Path(self.dataset).suffix not in READERS:
            self.dataset = synthetic.SYNTHETIC
        if self.synthetic_lengths not in synthetic.LENGTHS:
            raise ValueError(
                f"synthetic_lengths must be one of {', '.join(synthetic.LENGTHS)}, got {self.synthetic_lengths!r}"
                f"{nearest(self.synthetic_lengths, synthetic.LENGTHS)}"
            )
        if self.synthetic_examples < 1:
            raise ValueError(f"synthetic_examples must be at least 1, got {self.synthetic_examples}")
        if self.eval_examples < 0:
            raise ValueError(f"eval_examples must be at least 0, got {self.eval_examples}")
        if self.sample_tokens < 1:
            raise ValueError(f"sample_tokens must be at least 1, got {self.sample_tokens}")


@dataclass
class TokenArguments:
    """What TRL's ``SFTConfig`` has and ``TrainingArguments`` lacks."""

    max_length: int = field(default=1024, metadata={"help": "Tokens of an example; the rest is cut off."})
    pad_to_multiple_of: int = field(
        default=8,
        metadata={
            "help": "Batches are padded to a multiple of this length. A larger one means fewer lengths, for each of "
            "which cuDNN's attention plans anew: some 0.1 s on an H200."
        },
    )

    def __post_init__(self):
        for name in ("max_length", "pad_to_multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class MedusaArguments:
    """Medusa heads, for ``trainer: trainer``; ``MedusaConfig`` says more."""

    medusa_heads: int = field(default=0, metadata={"help": "Medusa heads to train with the model; 0: none."})
    medusa_layers: int = field(default=1, metadata={"help": "Residual blocks of a head."})
    medusa_stage: int = field(default=1, metadata={"help": "1: the heads on the frozen model. 2: both."})
    medusa_coefficient: float = field(default=0.2, metadata={"help": "Factor of all heads' losses."})
    medusa_decay: float = field(default=0.8, metadata={"help": "Factor from one head's loss to the next one's."})

    def config(self) -> MedusaConfig | None:
        """What to make, if anything."""
        if self.medusa_heads == 0:
            return None
        try:
            return MedusaConfig(
                self.medusa_heads, self.medusa_layers, self.medusa_coefficient, self.medusa_decay, self.medusa_stage
            )
        except ValueError as error:  # its message begins with the argument's name
            raise RecipeError(f"medusa_{error}") from error


class Recipe(NamedTuple):
    """A parsed recipe. Of ``run.model_config`` and ``model.model_name_or_path``, one says the model, the other is None.

    ``pad_to_multiple_of`` is for ``trainer: trainer``; TRL's trainers have it among their arguments. ``medusa`` is
    ``None`` for a model without Medusa heads.
    """

    run: RecipeArguments
    training: TrainingArguments
    model: ModelConfig
    max_length: int | None
    pad_to_multiple_of: int | None
    medusa: MedusaConfig | None


class _Parser(HfArgumentParser):
    """Raises where argparse would print two hundred options and exit."""

    def error(self, message):
        raise RecipeError(message)


def parse_recipe(argv: list[str]) -> Recipe:
    """Read ``RECIPE.yaml [--key value ...]``.

    Args:
        argv: path of the recipe, then overrides. Keys are the fields of ``RecipeArguments``, of TRL's ``ModelConfig``,
            of ``LigerTrainingArguments`` with ``max_length``, or of ``LigerSFTConfig`` with ``trainer: sft``.
            ``bf16: auto`` means wherever the GPU has it, and without ``bf16`` what accelerate's config says counts;
            ``--key null`` unsets what the recipe says.

    Raises:
        RecipeError: an unknown key (names the nearest), a value of the wrong type, a combination that cannot run, a
            recipe that does not exist or is no YAML mapping.
    """
    path = argv[0]
    content, overrides = _read(argv)
    # As flags before those of the command line, YAML values meet the same checks and lose against the latter.
    flags = [*as_flags(content), *overrides]

    first = _Parser(allow_abbrev=False, add_help=False)
    first.add_argument("--trainer", default="trainer")
    trainer = first.parse_known_args(flags)[0].trainer
    if trainer not in TRAINERS:
        raise RecipeError(f"trainer must be one of {', '.join(TRAINERS)}, got {trainer!r}{nearest(trainer, TRAINERS)}")
    classes = [RecipeArguments, ModelConfig, getattr(arguments, TRAINERS[trainer]), MedusaArguments]
    if trainer == "trainer":
        classes.append(TokenArguments)
    parser = _Parser(classes, allow_abbrev=False, prog=f"liger-trainer train {path}")
    options = parser._option_string_actions
    options["--bf16"].type = _bool_or_auto
    if _launched_in_bf16():
        options["--bf16"].default = True
    valid = {action.dest for action in parser._actions}
    for key in [*content, *(flag.removeprefix("--").split("=")[0] for flag in overrides if flag.startswith("--"))]:
        if f"--{key}" not in options:
            source = path if key in content else "command line"
            raise RecipeError(f"{source}: unknown key {key!r}{nearest(str(key), valid)}")
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:  # how the dataclasses, transformers' as well, refuse what they are given
        raise RecipeError(str(error)) from error
    if rest:
        raise RecipeError(f"{rest[0]!r} belongs to no key: overrides are written --key value, one value to most keys")
    run, model, training, medusa = parsed[:4]
    tokens = parsed[4] if trainer == "trainer" else training
    recipe = Recipe(run, training, model, tokens.max_length, tokens.pad_to_multiple_of, medusa.config())
    _choose_model(recipe, overrides)
    _check(recipe)
    return recipe


def peek(argv: list[str], key: str) -> str | None:
    """What ``RECIPE.yaml [--key value ...]`` says for ``key``, unchecked; ``None`` if it says nothing.

    ``parse_recipe`` may start the GPU and form the group of processes, this does not.

    Raises:
        RecipeError: a recipe that does not exist or is no YAML mapping.
    """
    content, overrides = _read(argv)
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument(f"--{key}", nargs="?", const="true")
    return getattr(parser.parse_known_args([*as_flags(content), *overrides])[0], key)


def _read(argv: list[str]) -> tuple[dict, list[str]]:
    """The recipe's content and the overrides, less what these set to ``null``; keys as the fields are spelled.

    Hugging Face's parser takes ``--use-liger`` as well as ``--use_liger``.
    """
    path, *overrides = argv
    if not Path(path).is_file():
        raise RecipeError(f"recipe: no such file: {path!r}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe: {path!r} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe: {path!r} must hold a YAML mapping of keys to values, got {type(content).__name__}")
    content = {str(key).replace("-", "_"): value for key, value in content.items()}
    return _unset(content, [_underscored(word) for word in overrides])


def _underscored(word: str) -> str:
    """``word``, and if it is a flag, with its name as the field is spelled."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _choose_model(recipe: Recipe, overrides: list[str]):
    """Unset ``model_name_or_path`` if the run is offline, else ``model_config`` where both are given."""
    run, model = recipe.run, recipe.model
    if run.offline:
        model.model_name_or_path = None
    elif run.model_config is not None and model.model_name_or_path is not None:
        if any(word.split("=")[0] == "--model_config" for word in overrides):
            raise RecipeError(
                f"model_config: the model is {model.model_name_or_path!r}; for random weights, add --offline true "
                "(synthetic rows in place of the hub's data) or --model_name_or_path null (the recipe's data)"
            )
        run.model_config = None


def _check(recipe: Recipe):
    run, model = recipe.run, recipe.model
    if run.model_config is None and model.model_name_or_path is None:
        raise RecipeError("give model_name_or_path, or model_config for random weights; got neither")
    if run.dataset == synthetic.SYNTHETIC and run.sample_prompt is not None:
        raise RecipeError(
            f"sample_prompt needs a tokenizer, and synthetic rows have none: add --sample_prompt null, or give a "
            f"dataset; got {run.sample_prompt!r}"
        )
    if run.model_config is not None and (model.load_in_4bit or model.load_in_8bit):
        raise RecipeError("load_in_4bit and load_in_8bit quantise pretrained weights, those of model_config are random")
    if run.trainer == "trainer" and (model.load_in_4bit or model.load_in_8bit):
        raise RecipeError("load_in_4bit and load_in_8bit need trainer: sft, which prepares the quantised model")
    if recipe.medusa is not None:
        _check_medusa(recipe)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != recipe.training.world_size:  # accelerate forms no group of processes without GPUs by itself
        raise RecipeError(
            f"launched as {launched} processes, which form a group of {recipe.training.world_size}: "
            "each would train alone; without GPUs, add --use_cpu true"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if recipe.training.device.type == "cuda" and here > gpus:  # accelerate would let two of them share a GPU
        raise RecipeError(
            f"launched {here} processes on a machine with {gpus} GPUs: launch with --num_processes {gpus}"
        )


def _check_medusa(recipe: Recipe):
    run, training = recipe.run, recipe.training
    heads = f"medusa_heads={recipe.medusa.heads}"
    if run.trainer != "trainer":
        raise RecipeError(f"{heads} needs trainer: trainer, got trainer: {run.trainer}, which computes its own loss")
    if recipe.model.use_peft:
        raise RecipeError(f"{heads} trains whole weights, so it needs use_peft: false, got true")
    if training.label_smoothing_factor > 0:
        raise RecipeError(
            f"{heads} needs label_smoothing_factor: 0, got {training.label_smoothing_factor}: the Trainer would "
            "compute the smoothed loss from the model's logits, without the heads"
        )
    if run.sample_prompt is not None:
        raise RecipeError(
            f"{heads} needs sample_prompt: null, got {run.sample_prompt!r}: a model with heads is loaded by "
            "MedusaModel.from_pretrained, and its `lm` generates"
        )


def _launched_in_bf16() -> bool:
    """Whether accelerate's config says ``mixed_precision: bf16``; DeepSpeed's refuses arguments that differ."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def _bool_or_auto(value: str | bool) -> bool:
    if value == "auto":
        has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return has_it or _launched_in_bf16()
    return string_to_bool(value)


def _unset(content: dict, overrides: list[str]) -> tuple[dict, list[str]]:
    """The recipe without the keys that the command line sets to ``null``, and the command line without those."""
    content, rest = dict(content), []
    for word in overrides:
        key, _, value = word.partition("=")
        if word == "null" and rest and rest[-1].removeprefix("--") in content:
            key, value = rest.pop(), word
        if value == "null" and key.removeprefix("--") in content:
            content[key.removeprefix("--")] = None
        else:
            rest.append(word)
    return content, rest


def as_flags(content: dict) -> list[str]:
    """A mapping of keys to values as a command line; ``None`` leaves a key alone."""
    words = []
    for key, value in content.items():
        if value is None:  # `key:` with nothing after it leaves the default
            continue
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return words
