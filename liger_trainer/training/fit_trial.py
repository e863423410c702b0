"""One process of a trial of a batch size: trains a few steps and writes the result as JSON."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, cast

import torch

from ..config import LigerConfig
from ..kernels.linear_loss.options import AUTO_MIB
from .build import DEFAULT_VOCAB_SIZE, build_trainer
from .failures import ERROR, OUT_OF_MEMORY, STOPPED, SUCCESS, WRONG_RECIPE, exit_status, is_lost_peer
from .recipe import OF_TEXTS, Recipe, as_flags, parse_recipe
from .recipe_arguments import SYNTHETIC, require
from .throughput import GIB, peak_memory

STEPS = 3  # the first creates the optimizer's state; the others hold it together with activations and gradients


def trial_recipe(job: dict[str, Any]) -> Recipe:
    """The recipe for the trial: the same model and engine, few steps on long rows, no saving or evaluation.

    Unless the recipe's own rows are synthetic and full, every batch of two or more rows has padding, because rows keep
    their order. An attention mask takes memory, and so do the keys and values that transformers then repeats for each
    query head.

    Raises:
        RecipeError: as in ``parse_recipe``.
    """
    settings = {
        "per_device_train_batch_size": job["batch"],
        # Gradients of earlier micro-batches are held beside the activations. A second one already shows that.
        "gradient_accumulation_steps": min(job["accumulation"], 2),
        "max_steps": STEPS,
        "output_dir": job["folder"],
        "train_sampling_strategy": "sequential",
        **dict.fromkeys(("auto_find_batch_size", "load_best_model_at_end", "push_to_hub"), False),
        **dict.fromkeys(("save_strategy", "eval_strategy"), "no"),
        **{"logging_strategy": "steps", "logging_steps": 1, "report_to": "none", "disable_tqdm": True},
        **({"use_liger": True} if job["use_liger"] else {}),
    }
    recipe = parse_recipe([*job["argv"], *as_flags(settings)])
    run, args = recipe.run, cast(Any, recipe.training)  # Liger's arguments of one trainer or another
    if not job["use_liger"]:  # as a flag, it would clash with a liger_config of the recipe
        args.use_liger, args.liger_config = False, None
    elif job["measures"]:
        args.liger_config = smallest(LigerConfig.parse(args.liger_config))
    require(run.trainer in OF_TEXTS, "trainer", run.trainer, f"{' or '.join(OF_TEXTS)} to look for a batch size")
    full = run.dataset == SYNTHETIC and run.synthetic_lengths == "full"
    run.dataset, run.synthetic_lengths = SYNTHETIC, "full" if full else "ragged"
    if run.trainer == "sft":
        args.shuffle_dataset = False
    run.synthetic_examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * STEPS
    run.eval_examples, run.sample_prompt = 0, None
    if run.model_config is not None:  # the size of the tokenizer that would be trained on the recipe's data
        recipe.shape.setdefault("vocab_size", DEFAULT_VOCAB_SIZE)
    return recipe


def smallest(config: LigerConfig) -> dict[str, Any]:
    """The options with which peaks grow evenly: what adapts to free memory takes as little as it can."""
    budget = AUTO_MIB if config.logits_budget_mib == "auto" else config.logits_budget_mib
    return {**config.to_dict(), "recompute": "all", "logits_budget_mib": int(budget)}


def outcome(job: dict[str, Any]) -> dict[str, Any]:
    """This process's result: ``status``, an exit status of ``failures``, and ``message`` or fields of ``Outcome``."""
    facts: dict[str, Any] = {"device": ""}
    try:
        recipe = trial_recipe(job)
        device = recipe.training.device
        facts["device"] = device.type
        if device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name(device)
            facts["free_gib"] = torch.cuda.mem_get_info(device)[0] / GIB
        trainer = build_trainer(recipe)
        trainer.train()
        last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    except Exception as error:
        status = exit_status(error)
        if status == OUT_OF_MEMORY:
            return {"status": status, **facts}
        if status == WRONG_RECIPE:
            return {"status": status, "message": str(error)}
        return {"status": STOPPED if is_lost_peer(error) else ERROR, "message": traceback.format_exc()}
    speed = {name: last.get(name) for name in ("tokens_per_second", "recomputed_layers")}
    return {
        "status": SUCCESS, **facts, **speed, "world_size": recipe.training.world_size, "peak_gib": peak_memory(device)
    }  # fmt: skip


def main(job: dict[str, Any]) -> None:
    """Write ``outcome`` to the job's folder and exit at once, as other processes may wait for this one."""
    result = outcome(job)
    rank = os.environ.get("RANK", "0")
    (Path(job["folder"]) / f"rank-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result["status"] != SUCCESS)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
