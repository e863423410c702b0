"""Run a recipe: ``accelerate launch -m liger_trainer.train recipes/quickstart.yaml [--key value ...]``."""

import sys
from collections.abc import Callable
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
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import get_peft_config, get_quantization_config

from . import data
from .recipe import Recipe, parse_recipe
from .throughput import ThroughputCallback

DEFAULT_VOCAB_SIZE = 8192


def from_main_process(make: Callable[[], Any]) -> Any:
    """What ``make`` returns on the main process, on every process: nodes may have different packages installed."""
    box = [make() if PartialState().is_main_process else None]
    return broadcast_object_list(box)[0]


def build_dataset(recipe: Recipe):
    """The recipe's data as ``prompt`` and ``completion``, ``text``, or ``messages``."""
    run = recipe.run
    if run.dataset == data.EMBEDDED:
        pairs = from_main_process(lambda: data.embedded_pairs(show_progress=not recipe.training.disable_tqdm))
        return data.in_memory(pairs, run.dataset_split)
    with recipe.training.main_process_first():  # the others then read what it has downloaded and cached
        dataset = data.load(run.dataset, run.dataset_config, run.dataset_split)
    return data.select_columns(dataset, run.text_column, run.prompt_column, run.completion_column)


def build_tokenizer(recipe: Recipe, dataset):
    """The named tokenizer, the model's, or for a model from ``model_config`` one trained on the dataset."""
    source = recipe.run.tokenizer or recipe.model.model_name_or_path
    if source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    size = recipe.run.model_config.get("vocab_size", DEFAULT_VOCAB_SIZE)
    return from_main_process(lambda: data.train_tokenizer(data.texts(dataset), size))


def build_model(recipe: Recipe, tokenizer):
    """Pretrained weights, or random ones from ``model_config`` with the tokenizer's size and special tokens.

    Raises:
        ValueError: a ``vocab_size`` in ``model_config`` that is smaller than the tokenizer's.
    """
    model = recipe.model
    options = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    if recipe.run.model_config is None:
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            quantization_config=get_quantization_config(model),
            **options,
        )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **recipe.run.model_config})
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"model_config: vocab_size {config.vocab_size} is below the tokenizer's {len(tokenizer)}")
    if model.dtype == "auto":
        del options["dtype"]
    return AutoModelForCausalLM.from_config(config, **options)


def build_trainer(recipe: Recipe) -> Trainer:
    """The recipe's Trainer, ready to train. ``use_liger`` acts by itself, through the arguments."""
    args = recipe.training
    set_seed(args.seed)
    dataset = build_dataset(recipe)
    tokenizer = build_tokenizer(recipe, dataset)
    model = build_model(recipe, tokenizer)
    peft_config = get_peft_config(recipe.model)
    if "prompt" in dataset.column_names and tokenizer.chat_template and isinstance(dataset[0]["prompt"], str):
        dataset = dataset.map(data.as_messages, desc="Applying the chat form")
    if recipe.run.trainer == "trainer":
        dataset = dataset.map(
            data.encode,
            fn_kwargs={"tokenizer": tokenizer, "max_length": recipe.max_length},
            remove_columns=dataset.column_names,
            desc="Tokenizing",
        ).filter(has_loss, desc="Dropping examples cut before their answer")
    splits = {"train": dataset, "test": None}
    if recipe.run.eval_examples:
        splits = dataset.train_test_split(test_size=recipe.run.eval_examples, seed=args.seed)
    common = {
        "args": args,
        "train_dataset": splits["train"],
        "eval_dataset": splits["test"],
        "processing_class": tokenizer,
    }
    if recipe.run.trainer == "sft":
        from trl import SFTTrainer

        trainer = SFTTrainer(model, peft_config=peft_config, **common)
    else:
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
        trainer = Trainer(model, data_collator=collator, **common)
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
    """Train by a recipe, save the model and print a summary; exits with status 2 on a recipe that cannot run."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        sys.exit("usage: liger-trainer train RECIPE.yaml [--key value ...]")
    try:
        recipe = parse_recipe(argv)
    except (ValueError, TypeError) as error:
        print(f"liger-trainer: error: {error}", file=sys.stderr)
        sys.exit(2)
    trainer = build_trainer(recipe)
    trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"\n{summary(recipe, trainer)}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
