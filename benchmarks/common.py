"""What every benchmark shares: fresh worker processes, provenance, result files and tables. Imports no torch."""

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from liger_trainer.environment import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HOPELESS = 1e9  # stands for an infinite error, which JSON cannot say
PREFIX = "@result "  # marks the lines of a worker's stdout that are messages; libraries print there too
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "deepspeed",
    "peft",
    "liger-trainer",
    "liger-kernel",
    "cut-cross-entropy",
)


def emit(message: dict) -> None:
    """Send one message from a worker to the process that started it."""
    sys.stdout.write(f"{PREFIX}{json.dumps(message)}\n")  # at once: print would send the end of the line by itself
    sys.stdout.flush()


class Worker:
    """A started process whose messages are read later; with ``waits``, it gets its job as a line of its stdin.

    It sees one device, unless the environment says which ones or it is to see ``all_devices``.
    """

    def __init__(self, command: Sequence[str], waits: bool = False, all_devices: bool = False):
        env = ({} if all_devices else {"CUDA_VISIBLE_DEVICES": "0"}) | os.environ
        env |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.stderr = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - closed by messages or stop
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE if waits else subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self.stderr, text=True, env=env, cwd=ROOT,
        )  # fmt: skip

    def stop(self) -> None:
        """End it, whatever it does; nothing happens to one that has ended."""
        self.process.kill()
        self.process.wait()
        self.stderr.close()

    def messages(self, timeout: float, job: dict | None = None) -> Iterator[dict]:
        """The messages it emits, as they come, after ``job`` has been handed to it.

        The last one is ``{"kind": "exit", "code": int, "tail": str}``: the exit status and, where that is not 0, the
        end of what the worker wrote. A worker still running after ``timeout`` seconds is killed.
        """
        noise: list[str] = []
        watchdog = threading.Timer(timeout, self.process.kill)
        watchdog.start()
        try:
            if job is not None:
                with contextlib.suppress(BrokenPipeError):  # it has ended: its status tells why
                    self.process.stdin.write(json.dumps(job) + "\n")
                    self.process.stdin.close()
            for line in self.process.stdout:
                if line.startswith(PREFIX):
                    yield json.loads(line[len(PREFIX) :])
                else:
                    noise.append(line)
            code = self.process.wait()
            self.stderr.seek(0)
            tail = "" if code == 0 else ("".join(noise[-5:]) + self.stderr.read())[-2000:].strip()
        finally:  # the reader of this generator may have stopped early
            watchdog.cancel()
            self.stop()
        yield {"kind": "exit", "code": code, "tail": tail}


def run_worker(command: Sequence[str], timeout: float, all_devices: bool = False) -> Iterator[dict]:
    """Run ``command`` and yield its messages; see ``Worker``."""
    yield from Worker(command, all_devices=all_devices).messages(timeout)


def describe_software() -> dict:
    """Python and the versions of the packages that matter; ``None`` where one is not installed."""
    return {"python": platform.python_version(), "packages": versions(PACKAGES)}


def current_commit(explicit: str | None = None) -> str:
    """The commit that is measured: given, ``$LIGER_COMMIT``, or git's, with ``+uncommitted`` where the tree differs."""
    given = explicit or os.environ.get("LIGER_COMMIT")
    if given:
        return given

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return "uncommitted"
    return head + ("+uncommitted" if git("status", "--porcelain", "--", ":!benchmarks/results") else "")


def slug(device_name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` -> ``"h100-80gb-hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("nvidia", "")).strip("-")


class ResultFile:
    """``{"runs": [provenance], "results": [row]}`` on disk, rewritten after every row, so that a kill loses nothing.

    Rows with the same values of ``keys`` replace each other, also across runs: ``row["run"]`` is the index of the
    provenance it was measured under. Where a row has a list of ``rounds``, each of these has its own ``run`` as well.
    In memory, ``run`` is the provenance itself. Several processes may add rows to one file at a time, each its own.

    Args:
        path: the file; rows that are in it stay.
        keys: what tells rows apart.
        provenance: of the run that begins now.
        about: further entries of the file, about all of its rows.
    """

    def __init__(self, path: Path, keys: Sequence[str], provenance: dict, about: dict | None = None):
        self.path, self.keys, self.provenance, self.about = path, keys, provenance, about or {}
        self.rows = self._read()

    def _key(self, row: dict) -> str:
        return json.dumps([row.get(k) for k in self.keys], sort_keys=True)

    def _read(self) -> list[dict]:
        if not self.path.exists():
            return []
        data = json.loads(self.path.read_text())
        return [_with_runs(row, data["runs"].__getitem__) for row in data["results"]]

    def add(self, row: dict, revise: Callable[[list[dict]], list[dict]] = lambda rows: rows) -> None:
        """Add or replace one row and write the file. The row, and a round of it without a ``run``, is of this run.

        ``revise``: takes all rows and returns them with what is to be said differently of them now; their runs stay.
        """
        row = row | {"run": self.provenance}
        if "rounds" in row:
            row["rounds"] = [{"run": self.provenance} | each for each in row["rounds"]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            self.rows = revise([r for r in self._read() if self._key(r) != self._key(row)] + [row])
            runs = []  # those that a row is of
            for part in (part for each in self.rows for part in (each, *each.get("rounds", []))):
                if part["run"] not in runs:
                    runs.append(part["run"])
            content = self.about | {"runs": runs, "results": [_with_runs(each, runs.index) for each in self.rows]}
            write_whole(self.path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` at once, so that nobody reads half of it and a kill leaves what was there."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Until the end of the block, other processes that ask for the same lock wait. Leaves ``.NAME.lock`` beside it."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:  # network file systems lock no folders
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _with_runs(row: dict, run_of: Callable) -> dict:
    """``row`` with ``run_of(run)`` in the place of its run and of those of its rounds."""
    row = row | {"run": run_of(row["run"])}
    if "rounds" in row:
        row["rounds"] = [each | {"run": run_of(each["run"])} for each in row["rounds"]]
    return row


def provenance(hello: dict, commit: str | None) -> dict:
    """What a worker said of its device and software, with the commit, the date and the command of this process.

    In the command, ``OUT`` stands for the folder given as ``--out``.
    """
    words = [os.path.relpath(a, ROOT) if a.startswith(str(ROOT)) else a for a in sys.argv]
    words = ["OUT" if before == "--out" else re.sub("^--out=.*", "--out=OUT", word)
             for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
    command = shlex.join(["python", *words])
    about = {k: v for k, v in hello.items() if k != "kind"}
    return about | {
        "commit": current_commit(commit),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


class Progress:
    """One line per finished step: a live bar where a person watches, plain lines elsewhere."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.description}"))
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def step(self, text: str, quiet: bool = False) -> None:
        """Report that one step is done; ``quiet``: only where there is a bar."""
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=text)
        elif not quiet:
            spent = time.monotonic() - self.start
            left = spent / self.done * (self.total - self.done)
            print(f"[{self.done}/{self.total} {spent:5.0f} s, {left:.0f} s left] {text}", flush=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.stop()


def format_number(value: object) -> str:
    """Three significant digits for floats, ``-`` for nothing."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], markdown: bool = False) -> str:
    """Rows as aligned text, or as a Markdown table; the first column is left-aligned."""
    cells = [list(header), *([format_number(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip())
    if markdown:
        lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)
