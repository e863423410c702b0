"""A recipe: one training run as YAML. Its keys are fields of dataclasses, and the command line overrides them."""

import json
import os
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from trl.trainer.model_config import ModelConfig

from .. import arguments
from ..config import nearest
from ..medusa.model import MedusaConfig
from .recipe_arguments import (
    SYNTHETIC,
    MedusaArguments,
    RecipeArguments,
    RecipeError,
    TokenArguments,
    require,
    require_one_of,
)  # fmt: skip
from .shipped import recipe_file

TRAINERS = {
    "trainer": "LigerTrainingArguments", "sft": "LigerSFTConfig", "dpo": "LigerDPOConfig", "grpo": "LigerGRPOConfig",
    "gkd": "LigerGKDConfig", "splade": "LigerTrainingArguments",
}  # fmt: skip
OF_TEXTS = ("trainer", "sft")
# Names that other tools use, which are spelled too differently to be found as the nearest key.
ALIASES = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "seq_length": "max_length", "max_seq_length": "max_length", "model": "model_name_or_path",
}  # fmt: skip


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
        raise RecipeError(re.sub(r"^argument --(\w+)\S*:", r"\1:", message))


def argument_classes(trainer: str) -> list[Any]:
    """The dataclasses whose fields are the keys of a recipe with this ``trainer``."""
    classes = [RecipeArguments, ModelConfig, getattr(arguments, TRAINERS[trainer]), MedusaArguments]
    return [*classes, TokenArguments] if trainer in ("trainer", "splade") else classes


def parse_recipe(argv: list[str]) -> Recipe:
    """Read ``RECIPE.yaml [--key value ...]``.

    Args:
        argv: path of the recipe or its name in the package, then overrides. Keys are the fields of
            ``RecipeArguments``, of TRL's ``ModelConfig``, of ``LigerTrainingArguments`` with ``max_length``, or of
            ``LigerSFTConfig`` with ``trainer: sft``. They may be spelled with dashes. ``bf16: auto`` is true if the GPU
            supports it; without ``bf16``, accelerate's config decides. ``--key null`` unsets a key of the recipe.

    Raises:
        RecipeError: the file does not exist or is not a YAML mapping, a key is unknown (the nearest one is named), a
            value has the wrong type, or the combination cannot run.
    """
    content, overrides = _read(argv)
    given = {**content, **overrides}
    trainer = str(given.get("trainer") or "trainer")
    require_one_of(trainer, "trainer", TRAINERS)
    parser = _Parser(argument_classes(trainer), allow_abbrev=False, prog=f"liger-trainer train {argv[0]}")
    options = parser._option_string_actions
    options["--bf16"].type = _bool_or_auto
    if _launched_in_bf16():
        options["--bf16"].default = True
    valid = {action.dest for action in parser._actions}
    for key in given:
        if f"--{key}" not in options:
            source = "command line" if key in overrides else argv[0]
            raise RecipeError(f"{source}: unknown key {key!r}{_hint(key, trainer, valid)}")
    try:
        run, model, training, medusa, *tokens, rest = parser.parse_args_into_dataclasses(
            as_flags(given), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:  # raised by the dataclasses, transformers' included
        raise RecipeError(str(error)) from error
    if rest:
        raise RecipeError(f"{rest[0]!r} belongs to no key: overrides are written --key value, one value for most keys")
    lengths = tokens[0] if tokens else training
    length, multiple = (getattr(lengths, name, None) for name in ("max_length", "pad_to_multiple_of"))
    recipe = Recipe(run, training, model, length, multiple, medusa.config())
    _choose_model(recipe, "model_config" in overrides)
    _check(recipe)
    return recipe


def _hint(key: str, trainer: str, valid: set[str]) -> str:
    """What may help with a key that ``trainer`` does not have: another trainer, or the nearest valid key."""
    for other in TRAINERS:
        if any(key in cls.__dataclass_fields__ for cls in argument_classes(other)):
            return f": it needs trainer: {other}, got {trainer}"
    return f" (did you mean {ALIASES[key]!r}?)" if ALIASES.get(key) in valid else nearest(key, valid)


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
    content = read_mapping(str(recipe_file(path)), "recipe")
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
    for name, value in (("model_name_or_path", model.model_name_or_path), ("tokenizer", run.tokenizer)):
        if value is not None and value.startswith(("/", "./", "../", "~")):
            require(Path(value).exists(), name, value, "a name on the hub or an existing folder")
    if run.streams:
        steps = recipe.training.max_steps
        require(steps > 0, "max_steps", steps, "at least 1 with streaming, which does not know the number of rows")
        require(
            run.model_config is None or run.tokenizer is not None,
            "tokenizer",
            None,
            "named with streaming: it cannot be trained on the rows",
        )
    if run.trainer not in OF_TEXTS:
        texts = f"trainer: {' or '.join(OF_TEXTS)}, whose rows are texts"
        require(run.dataset != SYNTHETIC, "dataset", SYNTHETIC, f"another one; synthetic rows are for {texts}")
        require(not run.auto_batch_size, "auto_batch_size", True, f"false; it is for {texts}")
        require(run.eval_examples == 0, "eval_examples", run.eval_examples, f"0; it is for {texts}")
    require(
        (run.reward is not None) == (run.trainer == "grpo"), "reward", run.reward,
        "a function with trainer: grpo, and null with any other",
    )  # fmt: skip
    if run.trainer == "gkd":
        teacher = cast(Any, recipe.training).teacher_model_name_or_path
        require(teacher is not None, "teacher_model_name_or_path", None, "the hub name or path of the teacher")
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
    try:
        return string_to_bool(value)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"got {value!r}; must be true, false or auto") from error
