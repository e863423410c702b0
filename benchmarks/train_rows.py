"""The training benchmark's jobs, and the rows of its result file that they make."""

import statistics

import yaml

from benchmarks.common import ROOT, format_number
from benchmarks.suite import Suite
from benchmarks.train_arms import ARMS

KEYS = ("point", "launch", "processes", "arm")
# What has to be the same for rounds to belong to one row.
SETTINGS = ("recipe", "overrides", "config_file", "warmup", "steps", "window")
MEMORY = ("peak_allocated_gib", "peak_reserved_gib", "static_gib", "gradients_gib", "above_static_gib")
MEDIANS = ("tokens_per_s", "padded_tokens_per_s", "step_ms", *MEMORY, "first_loss", "last_loss")


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
            "warmup": suite.warmup,
            "steps": suite.steps,
            "window": suite.window,
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


def missing_packages(job: dict) -> list[str]:
    """What the job's arm and its launch need and what is not installed."""
    import importlib.util

    missing = ARMS[job["arm"]].missing()
    engine = yaml.safe_load((ROOT / job["config_file"]).read_text())["distributed_type"]
    if engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        missing.append("deepspeed")
    return missing


def kept_rounds(job: dict, rows: dict[tuple, dict]) -> list[dict]:
    """The rounds of ``job``'s row that stand: those of the same settings, or none. What failed is tried again."""
    row = rows.get(key_of(job))
    if row is None or any(row.get(k) != job[k] for k in SETTINGS):
        return []
    return [r for r in row["rounds"] if r["status"] in ("ok", "oom")]


def is_settled(rounds: list[dict]) -> bool:
    """Whether a further round would only repeat what is known: out of memory, absent, an error."""
    return any(r["status"] != "ok" for r in rounds)


def combine(job: dict, rounds: list[dict]) -> dict:
    """The row of one arm: medians over its good rounds, or what went wrong in the last one."""
    row = {k: v for k, v in job.items() if k not in ("round", "device", "profile")}
    good = [r for r in rounds if r["status"] == "ok"]
    if not good:
        return row | {"status": rounds[-1]["status"], "note": rounds[-1].get("note", ""), "rounds": rounds}
    medians = {f: statistics.median(r[f] for r in good) if good[0][f] is not None else None for f in MEDIANS}
    speeds = [r["tokens_per_s"] for r in good]
    spread = (max(speeds) - min(speeds)) / medians["tokens_per_s"]
    return row | {"status": "ok", **medians, "spread": spread, "rounds": rounds}


def describe(round_: dict) -> str:
    """One round in a few words."""
    if round_["status"] != "ok":
        return f"{round_['status']} {round_.get('note', '')[:200]}"
    numbers = {"ms": round_["step_ms"], "tok/s": round_["tokens_per_s"], "GiB": round_["peak_allocated_gib"]}
    text = " ".join(f"{format_number(v)} {k}" for k, v in numbers.items())
    return f"{text} loss {round_['first_loss']:.4f} -> {round_['last_loss']:.4f}, {round_['seconds']:.0f} s in all"
