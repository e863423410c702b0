"""Which checkpoints of a run can be resumed: a process may have ended while it wrote one."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .recipe_arguments import RecipeError, require

FOLDER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class Checkpoints(NamedTuple):
    """The checkpoint folders of a run, sorted by step."""

    complete: list[Path]
    incomplete: list[Path]

    @property
    def last(self) -> Path | None:
        """The complete checkpoint with the most steps."""
        return self.complete[-1] if self.complete else None


def find_checkpoints(output_dir: str | None) -> Checkpoints:
    """The checkpoints in ``output_dir``; none if the folder does not exist."""
    found = Checkpoints([], [])
    folder = Path(output_dir or "")
    if output_dir and folder.is_dir():
        matches = ((FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
        for _, path in sorted((int(match[1]), path) for match, path in matches if match):
            (found.complete if is_complete(path) else found.incomplete).append(path)
    return found


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder holds a readable state of the Trainer, and the optimizer's state.

    The Trainer writes its own state last, after weights and optimizer state; under FSDP and DeepSpeed the collectives
    that save those have finished on all ranks by then. Without the optimizer's state (``save_only_model``) the Trainer
    would silently resume at the same step with a new optimizer and schedule.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        names = [path.name for path in checkpoint.iterdir()]
    except (OSError, ValueError):
        return False
    # optimizer.pt; under FSDP optimizer.bin or the folder optimizer_0; under DeepSpeed the folder global_step<N>.
    has_optimizer = any(name.startswith(("optimizer", "global_step")) for name in names)
    return isinstance(state, dict) and "global_step" in state and has_optimizer


def resume_path(value: str | None, output_dir: str | None) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` refers to.

    Args:
        value: ``true`` for the last complete checkpoint of ``output_dir``, the path of one, or ``None`` or ``false``
            to start from scratch.
        output_dir: the output folder of the run.

    Raises:
        RecipeError: there is no complete checkpoint, or the given one is not complete.
    """
    if value is None or value.lower() == "false":
        return None
    found = find_checkpoints(output_dir)
    incomplete = ", ".join(path.name for path in found.incomplete)
    if value.lower() == "true":
        if found.last is None:
            note = f" (not complete: {incomplete})" if incomplete else ""
            raise RecipeError(
                f"resume_from_checkpoint: no complete checkpoint in output_dir {output_dir!r}{note}; "
                "without the key the run starts from scratch"
            )
        return str(found.last)
    others = f"the last complete one is {str(found.last)!r}" if found.last else f"{output_dir!r} has none"
    allowed = (
        f"true, or the path of a complete checkpoint, with a readable {TRAINER_STATE_NAME} and the optimizer's state "
        f"(save_only_model leaves that out); {others}"
    )
    require(is_complete(Path(value)), "resume_from_checkpoint", value, allowed)
    return value
