"""The training benchmark's jobs, and the rows of its result file that they make."""

import statistics
from collections import Counter

import yaml

from benchmarks.common import ROOT, format_number
from benchmarks.suite import Suite
from benchmarks.train_arms import ARMS

KEYS = ("point", "launch", "processes", "arm")
# What has to be the same for rounds to belong to one row.
SETTINGS = ("recipe", "overrides", "config_file", "environment", "warmup", "steps", "window")
MEMORY = ("peak_allocated_gib", "peak_reserved_gib", "static_gib", "gradients_gib", "above_static_gib")
SAME = ("first_loss", "last_loss", "first_grad_norm", "last_grad_norm")  # in all arms, if they compute the same
MEDIANS = ("tokens_per_s", "padded_tokens_per_s", "step_ms", *MEMORY, *SAME)
# How far an arm's first gradient norm may be from HF's. bf16 sums differ by some tenths of a percent; a gradient that
# lacks a part or has a wrong factor differs by more.
GRAD_NORM_TOLERANCE = 0.03


def plan(suite: Suite) -> list[dict]:
    """All jobs in order: a round over all points and launches, then the next; its arms follow each other.

    So the arms are interleaved (A B C A B C), and a run that is cut short has every point once before any twice.
    """
    return [
        {
            "point": point.name,
            "group": point.group,
            "x": launch.num_processes if suite.about["x"]["key"] == "num_processes" else point.x,
            "launch": launch.name,
            "processes": launch.num_processes,
            "arm": arm,
            "recipe": point.recipe,
            "overrides": point.overrides,
            "config_file": launch.config_file,
            "environment": suite.environment,
            "warmup": point.warmup,
            "steps": point.steps,
            "window": point.window,
            "round": number,
        }
        for number in range(suite.rounds)
        for point in suite.points
        for launch in suite.launches
        for arm in suite.arms
    ]


def key_of(job: dict) -> tuple:
    """What tells the rows of a file apart."""
    return tuple(job[k] for k in KEYS)


def place_of(row: dict) -> tuple:
    """All that an arm's row shares with those of the other arms."""
    return row["point"], row["launch"], row["processes"]


def missing_packages(job: dict) -> list[str]:
    """What the job's arm and its launch need and what is not installed."""
    import importlib.util

    missing = ARMS[job["arm"]].missing()
    engine = yaml.safe_load((ROOT / job["config_file"]).read_text())["distributed_type"]
    if engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        missing.append("deepspeed")
    return missing


def _settings(row: dict) -> list:
    return [row.get(key) or None for key in SETTINGS]  # rows are older than some keys


def kept_rounds(job: dict, rows: dict[tuple, dict], keep_old: bool = False) -> list[dict]:
    """The rounds of ``job``'s row that stand: those with its fingerprint. What failed is tried again.

    ``keep_old``: those of the same settings, whatever else has changed.
    """
    row = rows.get(key_of(job))
    if row is None or _settings(row) != _settings(job):
        return []
    good = [r for r in row["rounds"] if r["status"] in ("ok", "oom")]
    return [r for r in good if keep_old or r.get("fingerprint") == job["fingerprint"]]


def is_settled(rounds: list[dict]) -> bool:
    """Whether a further round would only repeat what is known: out of memory, absent, an error."""
    return bool(rounds) and all(r["status"] != "ok" for r in rounds)


def combine(job: dict, rounds: list[dict]) -> dict:
    """The row of one arm: medians over its good rounds, or what went wrong in the last one."""
    row = {k: v for k, v in job.items() if k not in ("round", "device", "profile", "fingerprint")}
    good = [r for r in rounds if r["status"] == "ok"]
    if not good:
        return row | {"status": rounds[-1]["status"], "note": rounds[-1].get("note", ""), "rounds": rounds}
    values = {name: [r[name] for r in good if r.get(name) is not None] for name in MEDIANS}
    medians = {name: statistics.median(many) if many else None for name, many in values.items()}
    speeds = values["tokens_per_s"]
    spread = (max(speeds) - min(speeds)) / medians["tokens_per_s"] if len(speeds) > 1 else None
    return row | {"status": "ok", **medians, "spread": spread, "rounds": rounds}


def judge(row: dict, hf: dict | None) -> dict:
    """``row``, ``inexact`` where its first gradient norm is not that of ``hf``, the row of HF at the same place.

    The loss cannot show a wrong backward: within so few steps it hardly depends on the weights' changes.
    """
    if row["status"] not in ("ok", "inexact"):
        return row
    row = {k: v for k, v in row.items() if k != "note"} | {"status": "ok"}
    ours, theirs = (r.get("first_grad_norm") if r else None for r in (row, hf))
    if hf is not None and _settings(row) != _settings(hf):
        return row  # HF's row is of other settings: not the same work
    if ours is None or theirs is None or abs(ours - theirs) <= GRAD_NORM_TOLERANCE * theirs:
        return row
    return row | {"status": "inexact", "note": f"first gradient norm {ours:.4g}, that of HF {theirs:.4g}"}


def has_failed(row: dict) -> bool:
    """Whether a row of ours is not what it should be: an error, out of memory in some rounds only, inexact."""
    counts = {round_["status"] for round_ in row["rounds"]}
    return row["arm"].startswith("ours") and (
        row["status"] == "inexact" or "error" in counts or {"ok", "oom"} <= counts
    )


def counts_text(row: dict) -> str:
    """The number of rounds, by status where they did not all go well."""
    counts = Counter(r["status"] for r in row["rounds"])
    if set(counts) == {"ok"}:
        return str(counts["ok"])
    return ", ".join(f"{n} {'OOM' if status == 'oom' else status}" for status, n in counts.items())


def describe(round_: dict) -> str:
    """One round in a few words."""
    if round_["status"] != "ok":
        return f"{round_['status']} {round_.get('note', '')[:200]}"
    numbers = {"ms": round_["step_ms"], "tok/s": round_["tokens_per_s"], "GiB": round_["peak_allocated_gib"]}
    text = " ".join(f"{format_number(v)} {k}" for k, v in numbers.items())
    loss, norm = ([round_[f"{at}_{name}"] for at in ("first", "last")] for name in ("loss", "grad_norm"))
    return (
        f"{text} loss {loss[0]:.4f} -> {loss[1]:.4f}, gradient norm {format_number(norm[0])} -> "
        f"{format_number(norm[1])}, "
        f"{round_['seconds']:.0f} s in all"
    )
