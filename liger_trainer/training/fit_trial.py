"""One process of a trial of ``fit``: trains a few steps and writes down how that went, as JSON."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from . import fit
from .errors import RecipeError
from .failures import is_lost_peer, is_out_of_memory
from .recipe import Recipe, parse_recipe
from .synthetic import SYNTHETIC
from .throughput import GIB, peak_memory
from .train import DEFAULT_VOCAB_SIZE, build_trainer

STEPS = 3  # the first makes the optimizer's state, the others hold it beside activations and gradients


def trial_recipe(job: dict) -> Recipe:
    """The recipe for the trial: the same model and engine, few steps on long rows, nothing saved or evaluated.

    Unless the recipe's own rows are synthetic and full, every batch of two or more has padding, in the order of the
    rows: with the attention's mask comes memory of its own, in transformers also for keys and values repeated for each
    query head.

    Raises:
        RecipeError: as in ``parse_recipe``.
    """
    settings = {
        "per_device_train_batch_size": job["batch"],
        # Gradients of earlier micro-batches are held beside the activations: a second one shows all there is to show.
        "gradient_accumulation_steps": min(job["accumulation"], 2),
        "max_steps": STEPS,
        "output_dir": job["folder"],
        "train_sampling_strategy": "sequential",
        **{"auto_find_batch_size": "false", "load_best_model_at_end": "false", "push_to_hub": "false"},
        **{"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"},
        **{"report_to": "none", "disable_tqdm": "true"},
        **({"use_liger": "true"} if job["use_liger"] else {}),
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    recipe = parse_recipe([*job["argv"], *flags])
    run, args = recipe.run, recipe.training
    if not job["use_liger"]:  # as a flag, it would clash with a liger_config of the recipe
        args.use_liger, args.liger_config = False, None
    full = run.dataset == SYNTHETIC and run.synthetic_lengths == "full"
    run.dataset, run.synthetic_lengths = SYNTHETIC, "full" if full else "ragged"
    if run.trainer == "sft":
        args.shuffle_dataset = False
    run.synthetic_examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * STEPS
    run.eval_examples, run.sample_prompt = 0, None
    if run.model_config is not None:  # what the tokenizer that the recipe's data would train is asked for
        run.model_config.setdefault("vocab_size", DEFAULT_VOCAB_SIZE)
    return recipe


def outcome(job: dict) -> dict:
    """The process's part in the trial: ``status``, and ``message`` or what ``run_trial`` makes an ``Outcome`` of."""
    facts = {"device": ""}
    try:
        recipe = trial_recipe(job)
        device = recipe.training.device
        facts["device"] = device.type
        if device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name(device)
            facts["free_gib"] = torch.cuda.mem_get_info(device)[0] / GIB
        build_trainer(recipe).train()
    except RecipeError as error:
        return {"status": fit.WRONG_RECIPE, "message": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"status": fit.OUT_OF_MEMORY, **facts}
        return {"status": fit.LOST_PEER if is_lost_peer(error) else fit.ERROR, "message": traceback.format_exc()}
    world_size, peak = recipe.training.world_size, peak_memory(device)
    return {"status": fit.FITS, **facts, "world_size": world_size, "peak_gib": peak}


def main(job: dict):
    """Write ``outcome`` to the job's folder, and end at once: other processes may be waiting for this one."""
    result = outcome(job)
    rank = os.environ.get("RANK", "0")
    (Path(job["folder"]) / f"rank-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if result["status"] == fit.FITS else 1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
