"""``liger-trainer fit``: the largest batch with which a recipe trains, with and without the kernels."""

import json
import shlex
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..environment import environment
from .batch_search import expected_batch, search
from .failures import ERROR, SUCCESS, WRONG_RECIPE
from .recipe_arguments import RecipeError, require
from .trials import Launch, Outcome, Trial, TrialError, check_launch, recipe_batch, run_and_print


@dataclass
class Found:
    """The result with or without the kernels; ``batch`` is 0 if not even one row fits."""

    use_liger: bool
    batch: int
    trials: dict[int, Outcome]


def fit(
    argv: list[str],
    use_liger: bool,
    launch: Launch = Launch(),  # noqa: B008  a tuple
    max_batch: int = 1024,
    resolution: float = 1 / 16,
) -> Found:
    """The largest ``per_device_train_batch_size`` with which the recipe trains on rows of its full ``max_length``.

    On a GPU, two sizes are measured, with all layers recomputed if the recipe recomputes any. A line through their
    peaks predicts the largest, and the recipe as it is checks that. Elsewhere, or if the check fails, it is a search.

    Args:
        argv: path of the recipe, then overrides. The recipe's own batch is tried first.
        use_liger: whether to use the kernels, whatever the recipe says.
        launch: how to launch a trial.
        max_batch, resolution: ``limit`` and ``resolution`` of ``search``.

    Raises:
        RecipeError: the recipe cannot run.
        TrialError: a trial failed for another reason than memory.
    """
    start, accumulation = recipe_batch(argv)
    trials: dict[int, Outcome] = {}
    predicted: int | None = None

    def fits(batch: int) -> bool:
        measures = predicted is None
        trials[batch] = run_and_print(Trial(argv, use_liger, batch, accumulation, measures), launch)
        return trials[batch].fits

    def expected() -> int | None:
        nonlocal predicted
        if predicted is not None:  # its check failed, and what follows is not measured
            return None
        peaks = {batch: t.peak_gib["allocated"] for batch, t in trials.items() if t.fits and t.free_gib is not None}
        free = (trials[batch].free_gib or 0.0 for batch in peaks)
        predicted = expected_batch(peaks, min(free, default=0.0))
        return predicted

    return Found(use_liger, search(fits, start, max_batch, resolution, expected, accept_expected=True), trials)


def table(found: list[Found], max_batch: int) -> str:
    """The results side by side, and the ratio of the first batch to the second."""
    lines = [f"{'use_liger':<10}{'largest batch':>14}   peak memory there"]
    for arm in found:
        found_there = arm.trials[arm.batch] if arm.batch else None
        peak = (
            "not one row fits"
            if found_there is None
            else ", ".join(filter(None, (found_there.peak, found_there.speed)))
        )
        size = f"{arm.batch}{'+' if arm.batch == max_batch else ''}"
        lines.append(f"{str(arm.use_liger).lower():<10}{size:>14}   {peak}")
    if any(arm.batch == max_batch for arm in found):
        lines.append(f"+: the largest that was tried (--max_batch {max_batch})")
    elif len(found) == 2 and found[1].batch:
        lines.append(f"{found[0].batch / found[1].batch:.2f} times the batch")
    return "\n".join(lines)


def main(args: Namespace) -> int:
    """Run ``liger-trainer fit`` and return its exit status: 2 if recipe or launch cannot run, 1 if a trial failed."""
    launch = Launch(args.config_file, args.num_processes)
    argv = [args.recipe, *args.rest]
    arms = {"both": (True, False), "true": (True,), "false": (False,)}[args.use_liger]
    try:
        check_launch(launch)
        require(args.max_batch >= 1, "max_batch", args.max_batch, "at least 1")
        require(0 <= args.resolution <= 1, "resolution", args.resolution, "from 0 to 1")
        found = [fit(argv, use_liger, launch, args.max_batch, args.resolution) for use_liger in arms]
    except RecipeError as error:
        print(f"\nliger-trainer: error: {error}", file=sys.stderr)
        return WRONG_RECIPE
    except TrialError as error:
        print(error, file=sys.stderr)
        return ERROR
    print(f"\n{table(found, args.max_batch)}")
    if args.json is not None:
        content = {
            "command": shlex.join(["liger-trainer", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": next(iter(found[0].trials.values())).device,
            "environment": environment(),
            "recipe": args.recipe,
            "overrides": args.rest,
            "launch": launch._asdict(),
            "max_batch": args.max_batch,
            "resolution": args.resolution,
            "arms": [asdict(arm) for arm in found],
        }
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return SUCCESS
