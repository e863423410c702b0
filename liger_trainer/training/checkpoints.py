"""Which checkpoints of a run can be resumed: a process may end while it writes one."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import RecipeError

FOLDER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class Checkpoints(NamedTuple):
    """The checkpoint folders of a run, sorted by step."""

    complete: list[Path]
    incomplete: list[Path]

    @property
    def last(self) -> Path | None:
        """The complete one with the most steps."""
        return self.complete[-1] if self.complete else None


def find_checkpoints(output_dir: str) -> Checkpoints:
    """The checkpoints under ``output_dir``; none where there is no such folder."""
    found = Checkpoints([], [])
    folder = Path(output_dir)
    if folder.is_dir():
        steps = {path: FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
        for path in sorted((p for p, match in steps.items() if match), key=lambda p: int(steps[p][1])):
            (found.complete if is_complete(path) else found.incomplete).append(path)
    return found


def is_complete(checkpoint: Path) -> bool:
    """Whether the folder holds a readable state of the Trainer, and the optimizer's state.

    The Trainer writes its own state last, when the weights and the state of the optimizer are on disk; under FSDP and
    DeepSpeed the ranks have met by then, in the collectives that save these. With ``save_only_model`` it leaves out the
    optimizer's and would resume without a word: at the same step, but with a fresh optimizer and schedule.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        names = [path.name for path in checkpoint.iterdir()]
    except (OSError, ValueError):
        return False
    # optimizer.pt; of FSDP optimizer.bin or the folder optimizer_0; of DeepSpeed the folder global_step<N>.
    has_optimizer = any(name.startswith(("optimizer", "global_step")) for name in names)
    return isinstance(state, dict) and "global_step" in state and has_optimizer


def resume_path(value: str | None, output_dir: str) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` stands for.

    Args:
        value: ``true`` for the last complete checkpoint of ``output_dir``, the path of one, or ``None`` or ``false``
            to start anew.
        output_dir: the run's.

    Raises:
        RecipeError: there is none, or the one that was named is not complete.
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
                "without the key the run starts anew"
            )
        return str(found.last)
    if not is_complete(Path(value)):
        others = f"the last complete one is {str(found.last)!r}" if found.last else f"{output_dir!r} has none"
        raise RecipeError(
            f"resume_from_checkpoint must be true, or the path of a complete checkpoint, which has a readable "
            f"{TRAINER_STATE_NAME} and the optimizer's state (save_only_model leaves that out); got {value!r}; {others}"
        )
    return value
