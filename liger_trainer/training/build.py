"""From a parsed recipe to a Trainer that is ready to train: dataset, tokenizer, model."""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_peft_config, get_quantization_config

from ..callbacks import FlaggedLigerCallback, apply_for
from ..kernels.reference import IGNORE_INDEX
from ..medusa.model import MedusaModel
from ..report import LigerReport
from . import data, post_training, splade, synthetic
from .failures import MainProcessError
from .recipe import OF_TEXTS, Recipe, parse_recipe, peek
from .recipe_arguments import EMBEDDED, SYNTHETIC, RecipeError, require
from .throughput import ThroughputCallback

DEFAULT_VOCAB_SIZE = 8192


def from_main_process(make: Callable[[], Any]) -> Any:
    """Call ``make`` on the main process and return its result on every process: nodes may have different packages.

    Raises:
        Exception: on the main process, whatever ``make`` raises.
        RecipeError, MainProcessError: on the others, when ``make`` raises a ``RecipeError`` or anything else.
    """
    value = failure = None
    if PartialState().is_main_process:
        try:
            value = make()
        except Exception as error:  # the others wait for the broadcast
            failure = error
    # Send text, because not every exception can be pickled.
    cause = None if failure is None else (isinstance(failure, RecipeError), str(failure) or type(failure).__name__)
    value, cause = broadcast_object_list([value, cause])
    if failure is not None:
        raise failure
    if cause is not None:
        is_recipe_error, text = cause
        raise RecipeError(text) if is_recipe_error else MainProcessError(f"the main process failed: {text}")
    return value


def model_config(recipe: Recipe) -> PreTrainedConfig:
    """The transformers config of the recipe's model."""
    if recipe.run.model_config is not None:
        return config_of(recipe.shape)
    return _pretrained(AutoConfig, "model_name_or_path", recipe.model_name, revision=recipe.model.model_revision)


def _pretrained(auto: Any, key: str, name: str, **options: Any) -> Any:
    """``auto.from_pretrained(name)``. If there is no such thing, the error names the recipe's ``key``."""
    try:
        return auto.from_pretrained(name, **options)
    except OSError as error:
        if error.errno is not None:  # of the operating system, such as a full disk
            raise
        raise RecipeError(f"{key}: got {name!r}: {' '.join(str(error).split())}") from error


def config_of(shape: dict[str, Any]) -> Any:
    """The transformers config with the fields of a recipe's ``model_config``."""
    fields = dict(shape)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def build_dataset(recipe: Recipe) -> Dataset | IterableDataset:
    """The recipe's data, with ``prompt`` and ``completion``, ``text`` or ``messages``. Synthetic rows are token ids."""
    run = recipe.run
    if run.dataset == SYNTHETIC:
        return synthetic.rows(
            run.synthetic_lengths,
            run.synthetic_examples,
            recipe.max_length,
            model_config(recipe),
            recipe.training.seed,
        )
    if run.dataset == EMBEDDED:
        pairs = from_main_process(lambda: data.embedded_pairs(show_progress=not recipe.training.disable_tqdm))
        return data.in_memory(pairs, run.dataset_split)
    with recipe.training.main_process_first():  # the others then read its download from the cache
        dataset = data.load(run.dataset, run.dataset_config, run.dataset_split, run.streams)
    if run.trainer not in (*OF_TEXTS, "splade"):
        return dataset  # TRL knows the forms of its own trainers
    dataset = data.select_columns(dataset, run.text_column, run.prompt_column, run.completion_column)
    if run.response_marker is None:
        return dataset
    columns = ", ".join(get_dataset_column_names(dataset))
    if columns != "text":
        raise RecipeError(f"response_marker needs a text column; the dataset has {columns}")
    marker = {"marker": run.response_marker}
    return data.mapped(dataset, data.split_at, "Splitting", fn_kwargs=marker, remove_columns="text")


def build_tokenizer(recipe: Recipe, dataset: Dataset | IterableDataset) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or the model's, or for a model from ``model_config`` one trained on the dataset.

    For synthetic rows it can only pad.
    """
    if recipe.run.dataset == SYNTHETIC:
        length, multiple = recipe.max_length or 0, recipe.pad_to_multiple_of or 1
        even = recipe.run.synthetic_lengths == "full" and length % multiple == 0
        return synthetic.padding_tokenizer(model_config(recipe), with_mask=not even)
    source = recipe.run.tokenizer or recipe.model.model_name_or_path
    if source is not None:
        tokenizer = _pretrained(AutoTokenizer, "tokenizer" if recipe.run.tokenizer else "model_name_or_path", source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    size = recipe.shape.get("vocab_size", DEFAULT_VOCAB_SIZE)
    return from_main_process(lambda: data.train_tokenizer(data.texts(dataset), size))


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with pretrained weights, or with random ones from ``model_config``, made on the training device.

    Unless the rows are synthetic, a model from ``model_config`` gets the tokenizer's special tokens, and by default
    its vocabulary size.

    Raises:
        RecipeError: ``vocab_size`` in ``model_config`` is smaller than the tokenizer's.
    """
    run, model = recipe.run, recipe.model
    if run.model_config is None:
        return _pretrained(
            _auto_class(recipe),
            "model_name_or_path",
            recipe.model_name,
            revision=model.model_revision,
            quantization_config=get_quantization_config(model),
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
        )
    config = model_config(recipe)
    if run.dataset != SYNTHETIC:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        least = len(tokenizer)
        config = config_of({"vocab_size": least, **special, **recipe.shape})
        size = config.vocab_size
        require(size >= least, "model_config: vocab_size", size, f"at least the tokenizer's {least}")
    # A CPU needs minutes to draw billions of random weights. Under ZeRO-3 DeepSpeed chooses the device itself, because
    # it partitions the model while that is made. Under FSDP2 every rank makes the whole model. accelerate then moves it
    # to the meta device, shards it, and broadcasts rank 0's weights. Buffers outside the state dict (the rotary
    # frequencies) remain each rank's own, so no rank may start on the meta device.
    place = nullcontext() if is_deepspeed_zero3_enabled() else recipe.training.device
    with place:
        return made_model(recipe, config)


def made_model(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, in the class, dtype and attention implementation of the recipe's run."""
    options = {"attn_implementation": recipe.model.attn_implementation, "dtype": recipe.model.dtype}
    if recipe.model.dtype == "auto":
        del options["dtype"]
    return _auto_class(recipe).from_config(config, **options)


def _auto_class(recipe: Recipe) -> Any:
    return AutoModelForMaskedLM if recipe.run.trainer == "splade" else AutoModelForCausalLM


def with_adapters(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the recipe's PEFT adapters, as TRL's trainers add them too, and its Medusa heads.

    Raises:
        RecipeError: Medusa heads do not fit the model.
    """
    peft_config = get_peft_config(recipe.model)
    if peft_config is not None:
        from peft import get_peft_model

        model = cast(PreTrainedModel, get_peft_model(model, peft_config))
    if recipe.medusa is None:
        return model
    try:
        return MedusaModel.from_causal_lm(model, recipe.medusa)
    except ValueError as error:
        raise RecipeError(f"medusa_heads: {error}") from error


def planned_report(argv: list[str]) -> LigerReport | None:
    """The report of a run of ``RECIPE.yaml [--key value ...]``, from a model without weights; ``None``: not patched.

    A recipe with a ``model_config`` needs no hub.

    Raises:
        RecipeError: the recipe cannot run.
        ValueError: as in ``apply_liger``.
    """
    recipe = parse_recipe(argv)
    if not FlaggedLigerCallback().acts(recipe.training):
        return None
    shape = peek(argv, "model_config")  # parse_recipe drops it if the recipe also names a model
    config = model_config(recipe) if shape is None else config_of(json.loads(shape))
    with torch.device("meta"):
        model = with_adapters(recipe, made_model(recipe, config))
    return apply_for(recipe.training, model)


def build_trainer(recipe: Recipe) -> Trainer:
    """The recipe's Trainer, ready to train. The training arguments apply ``use_liger`` by themselves."""
    args, run = recipe.training, recipe.run
    _check_packages(recipe)
    set_seed(args.seed)
    dataset = build_dataset(recipe)
    tokenizer = build_tokenizer(recipe, dataset)
    model = build_model(recipe, tokenizer)
    if run.trainer not in OF_TEXTS:
        module = splade if run.trainer == "splade" else post_training
        trainer = module.build(recipe, dataset, tokenizer, model)
        return trainer if run.trainer == "grpo" else _metered(trainer)  # the tokens of a step are generated in it
    # With a response_marker the data has its own prompt template, which replaces the chat template.
    as_chat = tokenizer.chat_template and run.response_marker is None
    first = next(iter(dataset))
    if as_chat and isinstance(first.get("prompt"), str):
        dataset = data.mapped(dataset, data.as_messages, "Applying the chat form")
        first = next(iter(dataset))
    if "messages" in first or isinstance(first.get("prompt"), list):
        named = run.tokenizer or recipe.model.model_name_or_path
        require(bool(tokenizer.chat_template), "tokenizer", named, "one with a chat template: the dataset has messages")
    if run.trainer == "trainer" and run.dataset != SYNTHETIC:
        dataset = data.mapped(
            dataset,
            data.encode,
            "Tokenizing",
            fn_kwargs={"tokenizer": tokenizer, "max_length": recipe.max_length},
            remove_columns=list(first),
        )
        dataset = data.filtered(dataset, has_loss, "Dropping examples cut before their answer")
    splits = _split(dataset, recipe)
    common: dict[str, Any] = {"args": args, "train_dataset": splits["train"], "eval_dataset": splits["test"]}
    if run.trainer == "sft":
        from trl.trainer.sft_trainer import SFTTrainer

        trainer = SFTTrainer(model, peft_config=get_peft_config(recipe.model), processing_class=tokenizer, **common)
        if isinstance(trainer.train_dataset, Dataset):
            _check_length(trainer.train_dataset, recipe)
    else:
        model = with_adapters(recipe, model)
        padding = copy.copy(tokenizer)
        # As TRL's trainers do. Padding on the left, which tokenizers prefer for generation, would shift positions that
        # are counted from the start of the row, and would need a mask.
        padding.padding_side = "right"
        collator = DataCollatorForSeq2Seq(padding, pad_to_multiple_of=recipe.pad_to_multiple_of)
        # The Trainer only saves it with the model, which the placeholder for synthetic rows is not worth.
        saved = None if run.dataset == SYNTHETIC else tokenizer
        if run.streams:  # each process reads its own batches: those of several are not equally long
            cast(Any, args.accelerator_config).dispatch_batches = False
        trainer = Trainer(model, data_collator=collator, processing_class=saved, **common)
    return _metered(trainer)


def _metered(trainer: Trainer) -> Trainer:
    """The trainer with our callback before the others, so that the reporters see its keys."""
    trainer.callback_handler.callbacks.insert(0, ThroughputCallback())
    return trainer


def _check_packages(recipe: Recipe) -> None:
    """Raise ``RecipeError`` if a package is missing that only some recipes need."""
    model = recipe.model
    for key, package in (("use_peft", "peft"), ("load_in_4bit", "bitsandbytes"), ("load_in_8bit", "bitsandbytes")):
        met = find_spec(package) is not None or not getattr(model, key)
        require(met, key, True, f"false unless {package} is installed: pip install {package}")


def _split(dataset: Dataset | IterableDataset, recipe: Recipe) -> dict[str, Any]:
    """The rows to train on, and those held out: of a stream the first ones, or else random ones."""
    _check_length(dataset, recipe)
    held_out, seed = recipe.run.eval_examples, recipe.training.seed
    if isinstance(dataset, IterableDataset):
        rest = dataset.skip(held_out).shuffle(seed=seed, buffer_size=data.SHUFFLE_BUFFER)
        return {"train": rest, "test": dataset.take(held_out) if held_out else None}
    require(held_out < len(dataset), "eval_examples", held_out, f"fewer than the {len(dataset)} examples")
    if not held_out:
        return {"train": dataset, "test": None}
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return {"train": parts["train"], "test": parts["test"]}


def _check_length(dataset: Any, recipe: Recipe) -> None:
    """Raise ``RecipeError`` if ``dataset`` has no rows."""
    length = recipe.max_length
    if next(iter(dataset), None) is None:
        raise RecipeError(f"max_length: got {length}; must be larger: every example is cut before its answer")


def has_loss(example: dict[str, Any]) -> bool:
    """Whether any label is left after the cut to ``max_length``."""
    return any(label != IGNORE_INDEX for label in example["labels"][1:])
