"""A recipe: one training run as YAML. Its keys are the fields of dataclasses, and the command line overrides them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from trl import ModelConfig

from . import arguments
from .config import nearest

TRAINERS = {"trainer": "LigerTrainingArguments", "sft": "LigerSFTConfig"}


@dataclass
class RecipeArguments:
    """What a recipe says beyond the Trainer's arguments and TRL's ``ModelConfig``.

    Raises:
        ValueError: ``model_config`` that is not a JSON object with a ``model_type``; ``sample_tokens`` or
            ``eval_examples`` out of range.
    """

    trainer: str = field(default="trainer", metadata={"help": "transformers' Trainer (trainer) or TRL's SFT (sft)."})
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Config of a model with random weights, such as {model_type: llama, hidden_size: 256}."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub name or path. Default: the model's; with model_config, one trained on the dataset."},
    )
    dataset: str = field(
        default="embedded", metadata={"help": "Hub name, path of a .json, .jsonl or .parquet file, or 'embedded'."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split or slice, such as 'train[:1000]'."})
    text_column: str | None = field(default=None, metadata={"help": "Column to train on as a whole."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of prompts, which bear no loss."})
    completion_column: str | None = field(default=None, metadata={"help": "Column of answers, which bear the loss."})
    eval_examples: int = field(default=0, metadata={"help": "Examples held out for evaluation."})
    sample_prompt: str | None = field(default=None, metadata={"help": "Question to answer after training."})
    sample_tokens: int = field(default=64, metadata={"help": "Length of that answer in tokens."})

    def __post_init__(self):
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except json.JSONDecodeError as error:
                raise ValueError(f"model_config must be a JSON object, got {self.model_config!r}: {error}") from error
        if self.model_config is not None and "model_type" not in self.model_config:
            raise ValueError(f"model_config needs a model_type, such as llama; got {self.model_config}")
        if self.eval_examples < 0:
            raise ValueError(f"eval_examples must be at least 0, got {self.eval_examples}")
        if self.sample_tokens < 1:
            raise ValueError(f"sample_tokens must be at least 1, got {self.sample_tokens}")


@dataclass
class TokenArguments:
    """What TRL's ``SFTConfig`` has and ``TrainingArguments`` lacks."""

    max_length: int = field(default=1024, metadata={"help": "Tokens of an example; the rest is cut off."})

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")


class Recipe(NamedTuple):
    """A parsed recipe."""

    run: RecipeArguments
    training: TrainingArguments
    model: ModelConfig
    max_length: int | None


class _Parser(HfArgumentParser):
    """Raises where argparse would print two hundred options and exit."""

    def error(self, message):
        raise ValueError(message)


def parse_recipe(argv: list[str]) -> Recipe:
    """Read ``RECIPE.yaml [--key value ...]``.

    Args:
        argv: path of the recipe, then overrides. Keys are the fields of ``RecipeArguments``, of TRL's ``ModelConfig``,
            of ``LigerTrainingArguments`` with ``max_length``, or of ``LigerSFTConfig`` with ``trainer: sft``.
            ``bf16: auto`` means wherever the GPU has it; ``--key null`` unsets what the recipe says.

    Raises:
        ValueError: an unknown key (names the nearest), a value of the wrong type, a combination that cannot run, a
            recipe that does not exist or is no YAML mapping.
    """
    path, *overrides = argv
    if not Path(path).is_file():
        raise ValueError(f"recipe: no such file: {path!r}")
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"recipe: {path!r} must hold a YAML mapping of keys to values, got {type(content).__name__}")
    content, overrides = _unset(content, overrides)
    # As flags before those of the command line, YAML values meet the same checks and lose against the latter.
    flags = [*_flags(content), *overrides]

    first = _Parser(allow_abbrev=False, add_help=False)
    first.add_argument("--trainer", default="trainer")
    trainer = first.parse_known_args(flags)[0].trainer
    if trainer not in TRAINERS:
        raise ValueError(f"trainer must be one of {', '.join(TRAINERS)}, got {trainer!r}{nearest(trainer, TRAINERS)}")
    classes = [RecipeArguments, ModelConfig, getattr(arguments, TRAINERS[trainer])]
    if trainer == "trainer":
        classes.append(TokenArguments)
    parser = _Parser(classes, allow_abbrev=False, prog=f"liger-trainer train {path}")
    options = parser._option_string_actions
    options["--bf16"].type = _bool_or_auto
    valid = {action.dest for action in parser._actions}
    for key in [*content, *(flag.removeprefix("--").split("=")[0] for flag in overrides if flag.startswith("--"))]:
        if f"--{key}" not in options:
            source = path if key in content else "command line"
            raise ValueError(f"{source}: unknown key {key!r}{nearest(str(key), valid)}")
    *parsed, rest = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise ValueError(f"{rest[0]!r} belongs to no key: overrides are written --key value, one value to most keys")
    run, model, training = parsed[:3]
    recipe = Recipe(run, training, model, parsed[3].max_length if trainer == "trainer" else training.max_length)
    _check(recipe)
    return recipe


def _check(recipe: Recipe):
    run, model = recipe.run, recipe.model
    if (run.model_config is None) == (model.model_name_or_path is None):
        raise ValueError(
            "give either model_name_or_path or model_config (random weights; `--model_config null` unsets it), "
            f"got model_name_or_path={model.model_name_or_path!r} and model_config={run.model_config!r}"
        )
    if run.trainer == "trainer" and (model.load_in_4bit or model.load_in_8bit):
        raise ValueError("load_in_4bit and load_in_8bit need trainer: sft, which prepares the quantised model")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != recipe.training.world_size:  # accelerate forms no group of processes without GPUs by itself
        raise ValueError(
            f"launched as {launched} processes, which form a group of {recipe.training.world_size}: "
            "each would train alone; without GPUs, add --use_cpu true"
        )


def _bool_or_auto(value: str | bool) -> bool:
    if value == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
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


def _flags(content: dict) -> list[str]:
    flags = []
    for key, value in content.items():
        if value is None:  # `key:` with nothing after it leaves the default
            continue
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return flags
