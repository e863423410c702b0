"""Run a recipe: ``accelerate launch -m liger_trainer.train recipes/quickstart.yaml [--key value ...]``."""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from trl import get_peft_config, get_quantization_config

from ..medusa.model import MedusaModel
from . import data, synthetic
from .checkpoints import resume_path
from .errors import RecipeError
from .failures import FailureGuard, MainProcessError
from .fit import TRIAL_FAILED, TrialError, wants_largest_batch, with_largest_batch
from .recipe import Recipe, parse_recipe
from .throughput import ThroughputCallback

DEFAULT_VOCAB_SIZE = 8192


def from_main_process(make: Callable[[], Any]) -> Any:
    """What ``make`` returns on the main process, on every process: nodes may have different packages installed.

    Raises:
        Exception: on the main process, what ``make`` raises.
        RecipeError, MainProcessError: on the others, as it does so.
    """
    value = failure = None
    if PartialState().is_main_process:
        try:
            value = make()
        except Exception as error:  # the others wait for a word
            failure = error
    # As text: not every exception survives pickling.
    told = None if failure is None else (isinstance(failure, RecipeError), str(failure) or type(failure).__name__)
    value, told = broadcast_object_list([value, told])
    if failure is not None:
        raise failure
    if told is not None:
        is_recipe_error, text = told
        raise RecipeError(text) if is_recipe_error else MainProcessError(f"the main process failed: {text}")
    return value


def model_config(recipe: Recipe):
    """The transformers config of the recipe's model."""
    if recipe.run.model_config is not None:
        return AutoConfig.for_model(**recipe.run.model_config)
    return AutoConfig.from_pretrained(recipe.model.model_name_or_path, revision=recipe.model.model_revision)


def build_dataset(recipe: Recipe):
    """The recipe's data as ``prompt`` and ``completion``, ``text``, or ``messages``; synthetic rows are token ids."""
    run = recipe.run
    if run.dataset == synthetic.SYNTHETIC:
        return synthetic.rows(
            run.synthetic_lengths,
            run.synthetic_examples,
            recipe.max_length,
            model_config(recipe),
            recipe.training.seed,
        )
    if run.dataset == data.EMBEDDED:
        pairs = from_main_process(lambda: data.embedded_pairs(show_progress=not recipe.training.disable_tqdm))
        return data.in_memory(pairs, run.dataset_split)
    with recipe.training.main_process_first():  # the others then read what it has downloaded and cached
        dataset = data.load(run.dataset, run.dataset_config, run.dataset_split)
    dataset = data.select_columns(dataset, run.text_column, run.prompt_column, run.completion_column)
    if run.response_marker is None:
        return dataset
    if dataset.column_names != ["text"]:
        raise RecipeError(f"response_marker needs a text column, the dataset gives {', '.join(dataset.column_names)}")
    return dataset.map(
        data.split_at, fn_kwargs={"marker": run.response_marker}, remove_columns="text", desc="Splitting"
    )


def build_tokenizer(recipe: Recipe, dataset):
    """The named tokenizer, the model's, or for a model from ``model_config`` one trained on the dataset.

    Synthetic rows need none: theirs only pads.
    """
    if recipe.run.dataset == synthetic.SYNTHETIC:
        even = recipe.run.synthetic_lengths == "full" and recipe.max_length % (recipe.pad_to_multiple_of or 1) == 0
        return synthetic.stand_in_tokenizer(model_config(recipe), with_mask=not even)
    source = recipe.run.tokenizer or recipe.model.model_name_or_path
    if source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    size = recipe.run.model_config.get("vocab_size", DEFAULT_VOCAB_SIZE)
    return from_main_process(lambda: data.train_tokenizer(data.texts(dataset), size))


def build_model(recipe: Recipe, tokenizer):
    """Pretrained weights, or random ones from ``model_config``, made on the device of training.

    Unless the rows are synthetic, the model gets the tokenizer's special tokens, and its size as default.

    Raises:
        RecipeError: a ``vocab_size`` in ``model_config`` that is smaller than the tokenizer's.
    """
    run, model = recipe.run, recipe.model
    options = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    if run.model_config is None:
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            quantization_config=get_quantization_config(model),
            **options,
        )
    config = model_config(recipe)
    if run.dataset != synthetic.SYNTHETIC:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **run.model_config})
        if config.vocab_size < len(tokenizer):
            raise RecipeError(f"model_config: vocab_size {config.vocab_size} is below the tokenizer's {len(tokenizer)}")
    if model.dtype == "auto":
        del options["dtype"]
    # Random numbers for billions of weights take a CPU minutes. Under ZeRO-3 DeepSpeed chooses the device itself, as
    # it partitions while the model is made. Under FSDP2 every rank makes the whole model: accelerate then moves it to
    # the meta device, shards that, and sends rank 0's weights around; it only keeps a rank's own copy of the buffers
    # that are in no state dict (the rotary frequencies), which is why no rank may start on the meta device.
    place = nullcontext() if is_deepspeed_zero3_enabled() else recipe.training.device
    with place:
        return AutoModelForCausalLM.from_config(config, **options)


def build_trainer(recipe: Recipe) -> Trainer:
    """The recipe's Trainer, ready to train. ``use_liger`` acts by itself, through the arguments."""
    args, run = recipe.training, recipe.run
    set_seed(args.seed)
    dataset = build_dataset(recipe)
    tokenizer = build_tokenizer(recipe, dataset)
    model = build_model(recipe, tokenizer)
    peft_config = get_peft_config(recipe.model)
    # A response_marker is part of a prompt template of the data's own, which takes the place of the chat template.
    as_chat = tokenizer.chat_template and run.response_marker is None
    if "prompt" in dataset.column_names and as_chat and isinstance(dataset[0]["prompt"], str):
        dataset = dataset.map(data.as_messages, desc="Applying the chat form")
    if run.trainer == "trainer" and run.dataset != synthetic.SYNTHETIC:
        dataset = dataset.map(
            data.encode,
            fn_kwargs={"tokenizer": tokenizer, "max_length": recipe.max_length},
            remove_columns=dataset.column_names,
            desc="Tokenizing",
        ).filter(has_loss, desc="Dropping examples cut before their answer")
    splits = {"train": dataset, "test": None}
    if run.eval_examples >= len(dataset):
        raise RecipeError(f"eval_examples must be fewer than the {len(dataset)} examples, got {run.eval_examples}")
    if run.eval_examples:
        splits = dataset.train_test_split(test_size=run.eval_examples, seed=args.seed)
    common = {
        "args": args,
        "train_dataset": splits["train"],
        "eval_dataset": splits["test"],
    }
    if run.trainer == "sft":
        from trl import SFTTrainer

        trainer = SFTTrainer(model, peft_config=peft_config, processing_class=tokenizer, **common)
    else:
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if recipe.medusa is not None:
            try:
                model = MedusaModel.from_causal_lm(model, recipe.medusa)
            except ValueError as error:
                raise RecipeError(f"medusa_heads: {error}") from error
        padding = copy.copy(tokenizer)
        # As TRL's trainers pad: on the left, which tokenizers prefer for generation, padding would shift positions that
        # are counted from the row's begin, and keep its mask.
        padding.padding_side = "right"
        collator = DataCollatorForSeq2Seq(padding, pad_to_multiple_of=recipe.pad_to_multiple_of)
        # The Trainer only saves it beside the model: one that stands in for synthetic rows is not worth that.
        saved = None if run.dataset == synthetic.SYNTHETIC else tokenizer
        trainer = Trainer(model, data_collator=collator, processing_class=saved, **common)
    trainer.callback_handler.callbacks.insert(0, ThroughputCallback())  # before the reporters, so that they see it
    return trainer


def has_loss(example: dict) -> bool:
    """Whether any label is left after cutting to ``max_length``."""
    return any(label != -100 for label in example["labels"][1:])


def answer(directory: str, question: str, max_new_tokens: int, device) -> str:
    """The saved model's greedy answer to ``question``.

    The model is loaded anew, in this process alone: the one in training may be sharded over ranks.
    """
    unset_hf_deepspeed_config()  # or ZeRO-3 would shard this one, too
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).to(device).eval()
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    else:
        inputs = tokenizer(question, return_tensors="pt")
    inputs = inputs.to(device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def summary(recipe: Recipe, trainer: Trainer) -> str:
    """What the run did, for the terminal; generates the answer to ``sample_prompt``."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    final = history[-1]
    lines = [("steps", f"{trainer.state.global_step}")]
    if losses:
        lines.append(("loss", f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last"))
    if "tokens_per_second" in final:
        rate, padded = final["tokens_per_second"], final["padded_tokens_per_second"]
        lines.append(("tokens/s", f"{rate:,.0f} ({padded:,.0f} with padding)"))
    if "mfu" in final:
        lines.append(("MFU", f"{final['mfu']:.1%}"))
    memory = {key: value for key, value in final.items() if key.startswith("peak_memory_")}
    if memory:
        names = {key: key.removeprefix("peak_memory_").removesuffix("_gib") for key in memory}
        parts = (f"{value:.2f} GiB {names[key]}" for key, value in memory.items())
        lines.append(("peak memory", ", ".join(parts)))
    lines.append(("saved to", trainer.args.output_dir))
    run = recipe.run
    if run.sample_prompt is not None:
        text = answer(trainer.args.output_dir, run.sample_prompt, run.sample_tokens, trainer.args.device)
        lines += [("question", run.sample_prompt), ("answer", text)]
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def main(argv: list[str] | None = None):
    """Train by a recipe, save the model and print a summary.

    Exit statuses: 2 for a recipe that cannot run, 12 when memory ran out, 1 for other errors (``failures``).
    """
    argv = sys.argv[1:] if argv is None else argv
    with FailureGuard() as guard:
        if not argv or argv[0].startswith("-"):
            raise RecipeError("no recipe given; usage: liger-trainer train RECIPE.yaml [--key value ...]")
        if wants_largest_batch(argv):  # in processes of their own, before this one takes memory of the device
            try:
                argv = with_largest_batch(argv)
            except TrialError as error:  # which holds what the trial printed
                sys.exit(f"\n{error}\n{TRIAL_FAILED}")
        recipe = parse_recipe(argv)
        args = recipe.training
        checkpoint = from_main_process(lambda: resume_path(args.resume_from_checkpoint, args.output_dir))
        guard.watch(args)
        trainer = guard.trainer = build_trainer(recipe)
        if checkpoint is not None and trainer.is_world_process_zero():
            print(f"liger-trainer: going on from {checkpoint}", flush=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if trainer.is_world_process_zero():
            print(f"\n{summary(recipe, trainer)}")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
