"""Trials of a batch size: each trains a few steps of the recipe in fresh processes (``fit_trial``)."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .failures import ERROR, OUT_OF_MEMORY, SUCCESS, WRONG_RECIPE
from .recipe import peek, read_mapping
from .recipe_arguments import RecipeError, require

LOG_CHARACTERS = 6000
GRACE_SECONDS = 40  # time a trial gets to shut down after SIGTERM; torch's launcher gives its own processes 30


class TrialError(Exception):
    """A trial that failed for another reason than memory, which says nothing about the batch."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"\n{cause}\nliger-trainer: the search ended with this error of a trial")


class Launch(NamedTuple):
    """How a trial is launched: by accelerate with a config, or as a single process without one."""

    config_file: str | None = None
    num_processes: int | None = None


class Trial(NamedTuple):
    """One batch size to try."""

    argv: list[str]  # RECIPE.yaml [--key value ...]
    use_liger: bool
    batch: int  # rows per process
    accumulation: int  # micro-batches per step
    measures: bool = False  # takes as little memory as the recipe can, whatever is free


@dataclass
class Outcome:
    """The result of a trial.

    Attributes:
        fits: whether it trained.
        peak_gib: as ``peak_memory`` returns it, the largest value of any process.
        tokens_per_second: real tokens of all processes in the last step; None if it did not train.
        recomputed_layers: layers that recomputed their activations in the last step; None if memory did not decide.
        free_gib: free GPU memory before the first use, the smallest value of any process; None on other devices.
        device: name of the device.
        seconds: duration of the trial.
    """

    fits: bool
    peak_gib: dict[str, float] = field(default_factory=dict)
    free_gib: float | None = None
    device: str = ""
    seconds: float = 0.0
    tokens_per_second: float | None = None
    recomputed_layers: float | None = None

    @property
    def peak(self) -> str:
        """The peak memory for people."""
        return ", ".join(f"{name} {gib:.2f} GiB" for name, gib in self.peak_gib.items())

    @property
    def speed(self) -> str:
        """Tokens per second and recomputed layers for people, as far as they are known."""
        parts = [] if self.tokens_per_second is None else [f"{self.tokens_per_second:,.0f} tokens/s"]
        if self.recomputed_layers is not None:
            parts.append(f"{self.recomputed_layers:g} layers recomputed")
        return ", ".join(parts)


def recipe_batch(argv: list[str]) -> tuple[int, int]:
    """``per_device_train_batch_size`` and ``gradient_accumulation_steps``, or transformers' defaults, 8 and 1."""
    values = []
    for key, default in (("per_device_train_batch_size", "8"), ("gradient_accumulation_steps", "1")):
        value = peek(argv, key) or default
        require(value.isdecimal() and int(value) >= 1, key, value, "a whole number of at least 1")
        values.append(int(value))
    return values[0], values[1]


def run_and_print(trial: Trial, launch: Launch) -> Outcome:
    """``run_trial`` with a line of progress."""
    print(f"use_liger {str(trial.use_liger).lower():<5}  batch {trial.batch:>5}  ", end="", flush=True)
    outcome = run_trial(trial, launch)
    result = ", ".join(filter(None, (f"fits, peak {outcome.peak}", outcome.speed))) if outcome.fits else "out of memory"
    print(f"{result}  ({outcome.seconds:.0f} s)", flush=True)
    return outcome


def run_trial(trial: Trial, launch: Launch) -> Outcome:
    """Train a few steps in fresh processes, and combine the results that each of them wrote.

    Raises:
        RecipeError: the recipe cannot run.
        TrialError: the trial failed for another reason than memory.
        SystemExit: SIGTERM or SIGHUP arrived; the trial has been ended.
    """
    start = time.perf_counter()
    with _signals_as_exit(), tempfile.TemporaryDirectory(prefix="liger_trainer_fit_") as folder:
        job = json.dumps({"folder": folder, **trial._asdict()})
        with open(Path(folder) / "log", "w+", encoding="utf-8", errors="replace") as log:
            command = trial_command(launch, job)
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait()
            except BaseException:  # Ctrl-C or SIGTERM, which do not reach the trial's session
                _end(process)
                raise
            log.seek(0)
            text = log.read()
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("rank-*.json"))]
    by_status = {result["status"]: result for result in reversed(results)}
    free = min((result["free_gib"] for result in results if "free_gib" in result), default=None)
    seconds = time.perf_counter() - start
    if OUT_OF_MEMORY in by_status:
        return Outcome(False, {}, free, by_status[OUT_OF_MEMORY]["device"], seconds)
    for status, kind in ((WRONG_RECIPE, RecipeError), (ERROR, TrialError)):
        if status in by_status:
            raise kind(by_status[status]["message"])
    if by_status.keys() != {SUCCESS} or len(results) != results[0]["world_size"]:
        raise TrialError(
            f"a trial with batch {trial.batch} ended with status {process.returncode}, and not all of its processes "
            f"said why: killed for the host's memory? The end of what it printed:\n{text[-LOG_CHARACTERS:]}"
        )
    first = results[0]
    speed = (first.get(name) for name in ("tokens_per_second", "recomputed_layers"))
    return Outcome(True, first["peak_gib"], free, first["device"], seconds, *speed)


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit, unless they are handled or ignored (``nohup``) already.

    By default they would end this process at once and leave the trial on the device.
    """
    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    names = [s for s in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(s) is signal.SIG_DFL]
    for name in names:
        signal.signal(name, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for name in names:
            signal.signal(name, signal.SIG_DFL)


def _end(process: subprocess.Popen) -> None:
    """End a trial. A launcher has its processes in sessions of their own, and ends them after SIGTERM."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE_SECONDS)
    finally:  # also if Ctrl-C comes again
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def trial_command(launch: Launch, job: str) -> list[str]:
    """The command line of a trial. Port 0 makes the launcher choose a free one."""
    trial = ["-m", "liger_trainer.training.fit_trial", job]
    if launch.config_file is None:
        return [sys.executable, *trial]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch.config_file]
    if launch.num_processes is not None:
        command += ["--num_processes", str(launch.num_processes)]
    return [*command, "--main_process_port", "0", *trial]


def check_launch(launch: Launch) -> None:
    """Raise ``RecipeError`` for a launch that trials cannot use."""
    if launch.config_file is None:
        if launch.num_processes not in (None, 1):
            raise RecipeError(f"num_processes {launch.num_processes} needs a config_file, such as configs/fsdp2.yaml")
        return
    machines = read_mapping(launch.config_file, "config_file").get("num_machines", 1)
    require(machines == 1, f"config_file: num_machines in {launch.config_file!r}", machines, "1")
