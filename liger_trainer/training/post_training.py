"""TRL's trainers for preferences, rewards and distillation, from a recipe."""

import copy
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.trainer.utils import get_peft_config

from . import data
from .recipe import Recipe
from .recipe_arguments import EMBEDDED, RecipeError, require


def load_reward(name: str) -> Callable[..., Any]:
    """The function ``module:function`` or ``file.py:function``.

    Raises:
        RecipeError: There is no such file, module or function.
    """
    place, _, function = name.rpartition(":")
    allowed = "module:function or file.py:function"
    require(bool(place) and function.isidentifier(), "reward", name, allowed)
    if place.endswith(".py"):
        require(Path(place).is_file(), "reward", name, f"{allowed}; there is no such file")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise RecipeError(f"reward: got {name!r}; must be {allowed}: {error}") from error
    found = getattr(module, function, None)
    require(callable(found), "reward", name, f"{allowed}; there is no function {function!r}")
    return cast(Callable[..., Any], found)


def as_preference(example: dict[str, Any], index: int, rejected: list[str]) -> dict[str, Any]:
    """A pair whose chosen answer is the row's own, and whose rejected one is that of another question."""
    answers = {"chosen": example["completion"], "rejected": rejected[index]}
    sides = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": [{"role": "user", "content": example["prompt"]}], **sides}


def as_conversation(example: dict[str, Any]) -> dict[str, Any]:
    """Question and answer as one conversation."""
    messages = data.as_messages(example)
    return {"messages": [*messages["prompt"], *messages["completion"]]}


def as_question(example: dict[str, Any]) -> dict[str, Any]:
    """The question alone."""
    return {"prompt": data.as_messages(example)["prompt"]}


def _embedded(trainer: str, dataset: Dataset) -> Dataset | IterableDataset:
    """The embedded pairs in the form that ``trainer`` reads."""
    columns = dataset.column_names
    if trainer == "dpo":
        answers = dataset["completion"][:]
        half = len(answers) // 2
        options: dict[str, Any] = {"with_indices": True, "fn_kwargs": {"rejected": answers[half:] + answers[:half]}}
        return data.mapped(dataset, as_preference, "Making preferences", remove_columns=columns, **options)
    function = as_question if trainer == "grpo" else as_conversation
    return data.mapped(dataset, function, "Applying the chat form", remove_columns=columns)


def build(
    recipe: Recipe, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Trainer:
    """The trainer that the recipe names, ready to train."""
    run = recipe.run
    if run.dataset == EMBEDDED:
        dataset = _embedded(run.trainer, cast(Dataset, dataset))
    elif run.prompt_column is not None and run.prompt_column != "prompt":
        dataset = dataset.rename_column(run.prompt_column, "prompt")
    common: dict[str, Any] = {
        "model": model, "args": recipe.training, "train_dataset": dataset, "processing_class": tokenizer,
        "peft_config": get_peft_config(recipe.model),
    }  # fmt: skip
    if run.trainer == "dpo":
        from trl.trainer.dpo_trainer import DPOTrainer

        made = run.model_config is not None and common["peft_config"] is None  # TRL loads other references by name
        return DPOTrainer(ref_model=copy.deepcopy(model) if made else None, **common)
    if run.trainer == "grpo":
        from trl.trainer.grpo_trainer import GRPOTrainer

        assert run.reward is not None
        return GRPOTrainer(reward_funcs=load_reward(run.reward), **common)
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer(teacher_model=cast(Any, recipe.training).teacher_model_name_or_path, **common)
