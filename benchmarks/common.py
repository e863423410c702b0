"""Shared code of the benchmarks: result files, provenance, tables as text, options. Imports no torch."""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.workers import ROOT
from liger_trainer.environment import versions

RESULTS = ROOT / "benchmarks" / "results"
INFINITE = 1e9  # stands for an infinite error, which JSON cannot express
PACKAGES = (
    "torch", "triton", "transformers", "trl", "accelerate", "deepspeed", "peft", "liger-trainer", "liger-kernel",
    "cut-cross-entropy",
)  # fmt: skip


def software() -> dict:
    """Python and the versions of the packages that matter; ``None`` if one is not installed."""
    return {"python": platform.python_version(), "packages": versions(PACKAGES)}


def current_commit(explicit: str | None = None) -> str:
    """The measured commit: ``explicit``, ``$LIGER_COMMIT``, or git's, with ``+uncommitted`` if the tree differs."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    given = explicit or os.environ.get("LIGER_COMMIT")
    head = given or (git("rev-parse", "HEAD") if shutil.which("git") else None)
    if given or head is None:
        return given or "uncommitted"
    return head + ("+uncommitted" if git("status", "--porcelain", "--", ":!benchmarks/results") else "")


def provenance(about_device: dict, commit: str | None) -> dict:
    """A worker's facts about device and software, with the commit, the date and the command of this process.

    In the command, ``OUT`` stands for the folder given as ``--out``.
    """
    words = [os.path.relpath(word, ROOT) if word.startswith(str(ROOT)) else word for word in sys.argv]
    words = ["OUT" if before == "--out" else re.sub("^--out=.*", "--out=OUT", word)
             for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
    date = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {key: value for key, value in about_device.items() if key != "kind"}
    return facts | {"commit": current_commit(commit), "date": date, "command": shlex.join(["python", *words])}


def slug(device_name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` -> ``"h100-80gb-hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("nvidia", "")).strip("-")


class ResultFile:
    """``{"runs": [provenance], "results": [row]}`` on disk, rewritten after every row, so that a kill loses nothing.

    Rows with the same values of ``keys`` replace each other, also across runs: ``row["run"]`` is the index of the row's
    provenance. If a row has a list of ``rounds``, each round has its own ``run``. In memory, ``run`` is the provenance
    itself.

    Args:
        path: the file; its existing rows are kept.
        keys: the keys that identify a row.
        provenance: provenance of the present run.
        about: further entries of the file that describe all rows.
    """

    def __init__(self, path: Path, keys: Sequence[str], provenance: dict, about: dict | None = None):
        self.path, self.keys, self.provenance, self.about = path, keys, provenance, about or {}
        data = json.loads(path.read_text()) if path.exists() else {"runs": [], "results": []}
        self.rows = [_with_runs(row, data["runs"].__getitem__) for row in data["results"]]

    def add(self, row: dict) -> None:
        """Add or replace one row and write the file. Without a ``run``, a round gets this one."""
        row = row | {"run": self.provenance}
        if "rounds" in row:
            row["rounds"] = [{"run": self.provenance} | each for each in row["rounds"]]
        others = [r for r in self.rows if any(r.get(key) != row.get(key) for key in self.keys)]
        self.rows = [*others, row]
        runs = []  # only the runs that some row refers to
        for part in (part for each in self.rows for part in (each, *each.get("rounds", []))):
            if part["run"] not in runs:
                runs.append(part["run"])
        content = self.about | {"runs": runs, "results": [_with_runs(each, runs.index) for each in self.rows]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)


def _with_runs(row: dict, run_of: Callable) -> dict:
    """``row`` with ``run_of(run)`` in place of its own ``run`` and of each round's."""
    row = row | {"run": run_of(row["run"])}
    if "rounds" in row:
        row["rounds"] = [each | {"run": run_of(each["run"])} for each in row["rounds"]]
    return row


class Progress:
    """Prints a line for each finished step."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()

    def step(self, text: str) -> None:
        """Report that one step is done."""
        self.done += 1
        spent = time.monotonic() - self.start
        left = spent / self.done * (self.total - self.done)
        print(f"[{self.done}/{self.total} {spent:5.0f} s, {left:.0f} s left] {text}", flush=True)


def format_number(value: object) -> str:
    """Three significant digits for floats, ``-`` for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table that is also aligned as plain text; the first column is left-aligned."""
    cells = [list(header), *([format_number(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(padded) + " |")
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: comma-separated names, each one of ``allowed``."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        if not chosen or not set(chosen) <= set(allowed):
            raise argparse.ArgumentTypeError(f"got {text!r}; must be one or more of {', '.join(allowed)}")
        return chosen

    return parse


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """``--out`` and ``--commit``."""
    help_out = "folder of the result file; default: benchmarks/results; a temporary one with --smoke"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=help_out)
    parser.add_argument("--commit", help="commit to record; default: $LIGER_COMMIT, else git's")


def output_folder(args: argparse.Namespace) -> Path:
    """The folder that these options choose; a smoke run must not touch the checkout's results."""
    return args.out or (Path(tempfile.mkdtemp(prefix="liger-bench-")) if args.smoke else RESULTS)
