"""Run a recipe: ``accelerate launch -m liger_trainer.train recipes/quickstart.yaml [--key value ...]``."""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .auto_batch_size import with_largest_batch
from .build import build_trainer, from_main_process
from .checkpoints import resume_path
from .failures import FailureGuard
from .recipe import TRAINERS, Recipe, parse_recipe
from .recipe_arguments import RecipeError
from .recipe_keys import USAGE, keys_text
from .trials import TrialError


def answer(directory: str, question: str, max_new_tokens: int, device: torch.device) -> str:
    """The saved model's greedy answer to ``question``.

    The model is loaded again in this process alone, because the one in training may be sharded over ranks.
    """
    unset_hf_deepspeed_config()  # or else ZeRO-3 would shard this one too
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    model.to(device).eval()
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    else:
        inputs = tokenizer(question, return_tensors="pt")
    inputs = inputs.to(device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def summary(recipe: Recipe, trainer: Trainer) -> str:
    """The results of the run for the terminal, with the generated answer to ``sample_prompt``."""
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
    folder, run = str(trainer.args.output_dir), recipe.run
    lines.append(("saved to", folder))
    if run.sample_prompt is not None:
        text = answer(folder, run.sample_prompt, run.sample_tokens, trainer.args.device)
        lines += [("question", run.sample_prompt), ("answer", text)]
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def main(argv: list[str] | None = None) -> None:
    """Train by a recipe, save the model and print a summary. ``failures`` has the exit statuses."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(keys_text(next((name for name in TRAINERS if name in argv), "trainer")))
        return
    with FailureGuard() as guard:
        if not argv or argv[0].startswith("-"):
            raise RecipeError(f"no recipe given; usage: {USAGE}")
        try:
            argv = with_largest_batch(argv)  # before this process takes memory of the device
        except TrialError as error:
            sys.exit(str(error))
        recipe = parse_recipe(argv)
        args = recipe.training
        checkpoint = from_main_process(lambda: resume_path(args.resume_from_checkpoint, args.output_dir))
        guard.watch(args)
        trainer = guard.trainer = build_trainer(recipe)
        if checkpoint is not None and trainer.is_world_process_zero():
            print(f"liger-trainer: resuming from {checkpoint}", flush=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if trainer.is_world_process_zero():
            print(f"\n{summary(recipe, trainer)}")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        guard.end_success()
