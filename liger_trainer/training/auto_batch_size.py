"""``auto_batch_size``: train with the largest batch that fits and the same number of rows per step."""

import os

from .batch_search import search
from .recipe import peek
from .recipe_arguments import RecipeError
from .trials import Launch, Trial, recipe_batch, run_and_print


def with_largest_batch(argv: list[str]) -> list[str]:
    """``argv`` with the largest ``per_device_train_batch_size`` that fits, if it asks for ``auto_batch_size``.

    A step keeps its number of rows, ``per_device_train_batch_size * gradient_accumulation_steps`` of the recipe, so
    that learning rate and schedule stay right: only divisors of that number are tried. ``use_liger`` is the recipe's.

    Args:
        argv: path of the recipe, then overrides.

    Raises:
        RecipeError: there are several processes, not even one row fits, or the recipe cannot run.
        TrialError: a trial failed for another reason than memory.
    """
    if not _is_true(peek(argv, "auto_batch_size")):
        return argv
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "auto_batch_size is for one process; for several, `liger-trainer fit RECIPE.yaml --config_file "
            "CONFIG.yaml` finds the batch to give as --per_device_train_batch_size"
        )
    batch, accumulation = recipe_batch(argv)
    rows = batch * accumulation
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    use_liger = _is_true(peek(argv, "use_liger"))

    def fits(number: int) -> bool:
        size = sizes[number - 1]
        return run_and_print(Trial(argv, use_liger, size, rows // size), Launch()).fits

    number = search(fits, sizes.index(batch) + 1, len(sizes))
    if number == 0:
        raise RecipeError("auto_batch_size: not even a batch of one row fits the device; see docs/troubleshooting.md")
    size = sizes[number - 1]
    print(
        f"auto_batch_size: {size} x {rows // size} rows per step instead of {batch} x {accumulation} "
        "(per_device_train_batch_size x gradient_accumulation_steps)",
        flush=True,
    )
    found = {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size}
    return [*argv, *(word for key, value in found.items() for word in (f"--{key}", str(value)))]


def _is_true(value: str | None) -> bool:
    """Whether ``value`` is one of the spellings of true that transformers' parser takes."""
    return value is not None and value.lower() in ("yes", "true", "t", "y", "1")
