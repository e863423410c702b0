"""The largest batch that trains: tries sizes, each in a fresh launch, with and without the kernels."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentTypeError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers.hf_argparser import string_to_bool

from ..environment import environment
from .batch_search import expected_batch, search
from .errors import RecipeError
from .recipe import peek

FITS, OUT_OF_MEMORY, WRONG_RECIPE, LOST_PEER, ERROR = "fits", "out of memory", "wrong recipe", "lost peer", "error"
LOG_CHARACTERS = 6000
# What a trial has to end in once it is told to: torch's launcher gives its own processes 30 s.
GRACE_SECONDS = 40
TRIAL_FAILED = "liger-trainer: the search ended with this error of a trial"


class TrialError(Exception):
    """A trial that failed for another reason than memory: it says nothing about the batch."""


class Launch(NamedTuple):
    """How a trial is launched: by accelerate with a config, or as one process without."""

    config_file: str | None = None
    num_processes: int | None = None


class Trial(NamedTuple):
    """What is tried."""

    argv: list[str]  # RECIPE.yaml [--key value ...]
    use_liger: bool
    batch: int  # rows of a process
    accumulation: int  # micro-batches of a step


@dataclass
class Outcome:
    """How a trial went.

    ``peak_gib``: as in ``ThroughputCallback``, the largest of all processes. ``free_gib``: of a GPU before it is used,
    the smallest of all processes; None elsewhere.
    """

    fits: bool
    peak_gib: dict[str, float] = field(default_factory=dict)
    free_gib: float | None = None
    device: str = ""
    seconds: float = 0.0


@dataclass
class Found:
    """The result for one arm; ``batch`` 0: not even one row fits."""

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

    Args:
        argv: path of the recipe, then overrides. Its own batch is tried first.
        use_liger: whether with the kernels, whatever the recipe says.
        launch: how to launch a trial.
        max_batch, resolution: as ``limit`` and ``resolution`` of ``search``.

    Raises:
        RecipeError: a recipe that cannot run.
        TrialError: a trial that failed for another reason than memory.
    """
    start, accumulation = recipe_batch(argv)
    trials = {}

    def fits(batch: int) -> bool:
        trials[batch] = try_and_tell(Trial(argv, use_liger, batch, accumulation), launch)
        return trials[batch].fits

    def expected() -> int | None:
        fitting = {batch: trial for batch, trial in trials.items() if trial.fits and trial.free_gib is not None}
        peaks = {batch: trial.peak_gib["allocated"] for batch, trial in fitting.items()}
        return expected_batch(peaks, min((trial.free_gib for trial in fitting.values()), default=0.0))

    return Found(use_liger, search(fits, start, max_batch, resolution, expected), trials)


def wants_largest_batch(argv: list[str]) -> bool:
    """Whether the recipe or the command line says ``auto_batch_size: true``."""
    return _is_true(peek(argv, "auto_batch_size"))


def _is_true(value: str | None) -> bool:
    try:
        return value is not None and string_to_bool(value)
    except ArgumentTypeError:  # for parse_recipe to name
        return False


def with_largest_batch(argv: list[str]) -> list[str]:
    """``argv`` with the largest ``per_device_train_batch_size`` that fits and with as much less accumulation.

    A step keeps its rows, ``per_device_train_batch_size * gradient_accumulation_steps`` of the recipe, so that learning
    rate and schedule stay right: only their divisors are tried. The recipe's ``use_liger`` stands.

    Raises:
        RecipeError: several processes; not one row fits; or as in ``fit``.
        TrialError: as in ``fit``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "auto_batch_size is for one process; for several, `liger-trainer fit RECIPE.yaml --config_file "
            "CONFIG.yaml` finds the batch, to be given as --per_device_train_batch_size"
        )
    batch, accumulation = recipe_batch(argv)
    rows = batch * accumulation
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    use_liger = _is_true(peek(argv, "use_liger"))

    def fits(number: int) -> bool:
        size = sizes[number - 1]
        return try_and_tell(Trial(argv, use_liger, size, rows // size), Launch()).fits

    number = search(fits, sizes.index(batch) + 1, len(sizes))
    if number == 0:
        raise RecipeError("auto_batch_size: not even a batch of one row fits the device; see docs/troubleshooting.md")
    size = sizes[number - 1]
    print(
        f"auto_batch_size: {size} x {rows // size} rows a step in place of {batch} x {accumulation} "
        "(per_device_train_batch_size x gradient_accumulation_steps)",
        flush=True,
    )
    return [
        *argv, "--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(rows // size)
    ]  # fmt: skip


def recipe_batch(argv: list[str]) -> tuple[int, int]:
    """``per_device_train_batch_size`` and ``gradient_accumulation_steps``, or transformers' defaults, 8 and 1."""
    values = []
    for key, default in (("per_device_train_batch_size", "8"), ("gradient_accumulation_steps", "1")):
        value = peek(argv, key) or default
        if not value.isdecimal() or int(value) < 1:
            raise RecipeError(f"{key} must be a whole number of at least 1, got {value!r}")
        values.append(int(value))
    return values[0], values[1]


def try_and_tell(trial: Trial, launch: Launch) -> Outcome:
    """``run_trial`` with a line of progress."""
    print(f"use_liger {str(trial.use_liger).lower():<5}  batch {trial.batch:>5}  ", end="", flush=True)
    outcome = run_trial(trial, launch)
    verdict = f"fits, peak {peak_text(outcome)}" if outcome.fits else "out of memory"
    print(f"{verdict}  ({outcome.seconds:.0f} s)", flush=True)
    return outcome


def peak_text(outcome: Outcome) -> str:
    """The peak memory for people."""
    return ", ".join(f"{name} {gib:.2f} GiB" for name, gib in outcome.peak_gib.items())


def run_trial(trial: Trial, launch: Launch) -> Outcome:
    """Train a few steps in fresh processes (``fit_trial``), and gather what each of them wrote down.

    Raises:
        RecipeError, TrialError: as in ``fit``.
        SystemExit: on SIGTERM or SIGHUP, when the trial has been ended.
    """
    start = time.perf_counter()
    with _signals_as_exit(), tempfile.TemporaryDirectory(prefix="liger_trainer_fit_") as folder:
        job = json.dumps({"folder": folder, **trial._asdict()})
        with open(Path(folder) / "log", "w+", encoding="utf-8", errors="replace") as log:
            command = trial_command(launch, job)
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait()
            except BaseException:  # Ctrl-C, SIGTERM: the trial's session does not get it
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
    for status in (WRONG_RECIPE, ERROR):
        if status in by_status:
            raise (RecipeError if status == WRONG_RECIPE else TrialError)(by_status[status]["message"])
    if by_status.keys() != {FITS} or len(results) != results[0]["world_size"]:
        raise TrialError(
            f"a trial with batch {trial.batch} ended with status {process.returncode}, and not all of its processes "
            f"said why: killed for the host's memory? The end of what it printed:\n{text[-LOG_CHARACTERS:]}"
        )
    return Outcome(True, results[0]["peak_gib"], free, results[0]["device"], seconds)


@contextmanager
def _signals_as_exit():
    """SIGTERM and SIGHUP raise SystemExit inside, unless they are handled or ignored (``nohup``) already.

    By default they would end this process at once and leave the trial on the device.
    """

    def leave(number, frame):
        sys.exit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    names = [s for s in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(s) is signal.SIG_DFL]
    for name in names:
        signal.signal(name, leave)
    try:
        yield
    finally:
        for name in names:
            signal.signal(name, signal.SIG_DFL)


def _end(process: subprocess.Popen):
    """End a trial; a launcher, which has put its processes into sessions of their own, ends these meanwhile."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE_SECONDS)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def trial_command(launch: Launch, job: str) -> list[str]:
    """The command line of a trial; port 0 lets the launcher find a free one."""
    trial = ["-m", "liger_trainer.fit_trial", job]
    if launch.config_file is None:
        return [sys.executable, *trial]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch.config_file]
    if launch.num_processes is not None:
        command += ["--num_processes", str(launch.num_processes)]
    return [*command, "--main_process_port", "0", *trial]


def check_launch(launch: Launch):
    """Raise RecipeError for a launch that ``fit`` cannot do."""
    if launch.config_file is None:
        if launch.num_processes not in (None, 1):
            raise RecipeError(f"num_processes {launch.num_processes} needs a config_file, such as configs/fsdp2.yaml")
        return
    if not Path(launch.config_file).is_file():
        raise RecipeError(f"config_file: no such file: {launch.config_file!r}")
    try:
        settings = yaml.safe_load(Path(launch.config_file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"config_file: {launch.config_file!r} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"config_file: {launch.config_file!r} must hold a mapping, got {type(settings).__name__}")
    machines = settings.get("num_machines", 1)
    if machines != 1:
        raise RecipeError(f"config_file must be for one machine, got num_machines {machines} in {launch.config_file!r}")


def table(found: list[Found], max_batch: int) -> str:
    """The arms side by side, and what the first gains over the second."""
    lines = [f"{'use_liger':<10}{'largest batch':>14}   peak memory there"]
    for arm in found:
        peak = peak_text(arm.trials[arm.batch]) if arm.batch else "not one row fits"
        size = f"{arm.batch}{'+' if arm.batch == max_batch else ''}"
        lines.append(f"{str(arm.use_liger).lower():<10}{size:>14}   {peak}")
    if any(arm.batch == max_batch for arm in found):
        lines.append(f"+: the largest that was tried (--max_batch {max_batch})")
    elif len(found) == 2 and found[1].batch:
        lines.append(f"{found[0].batch / found[1].batch:.2f} times the batch")
    return "\n".join(lines)


def main(args) -> int:
    """``liger-trainer fit``; exit status 2 on a recipe or launch that cannot run, 1 on a failed trial."""
    launch = Launch(args.config_file, args.num_processes)
    argv = [args.recipe, *args.rest]
    arms = {"both": (True, False), "true": (True,), "false": (False,)}[args.use_liger]
    try:
        check_launch(launch)
        if args.max_batch < 1:
            raise RecipeError(f"max_batch must be at least 1, got {args.max_batch}")
        if not 0 <= args.resolution <= 1:
            raise RecipeError(f"resolution must be from 0 to 1, got {args.resolution}")
        found = [fit(argv, use_liger, launch, args.max_batch, args.resolution) for use_liger in arms]
    except RecipeError as error:
        print(f"\nliger-trainer: error: {error}", file=sys.stderr)
        return 2
    except TrialError as error:
        print(f"\n{error}\n{TRIAL_FAILED}", file=sys.stderr)
        return 1
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
    return 0
