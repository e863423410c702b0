"""Rows of the training benchmark's result file: made from rounds, checked, and compared with each other."""

import statistics
from collections import Counter

from benchmarks.common import format_number

KEYS = ("point", "launch", "processes", "arm")
# Equal in all rounds of a row.
SETTINGS = ("recipe", "overrides", "config_file", "environment", "warmup", "steps", "window")
SAME_RUN = ("commit", "device", "packages")  # if these are equal, a round need not be measured again
SAME = ("first_loss", "last_loss", "first_grad_norm", "last_grad_norm")  # equal in all arms if they compute the same
MEMORY = ("peak_allocated_gib", "peak_reserved_gib", "static_gib", "gradients_gib", "above_static_gib")
MEDIANS = ("tokens_per_s", "padded_tokens_per_s", "step_ms", *MEMORY, *SAME)
# How far an arm's first gradient norm may be from HF's. bf16 sums differ by some tenths of a percent; a gradient that
# lacks a part or has a wrong factor differs by more.
GRAD_NORM_TOLERANCE = 0.03


def key_of(job: dict) -> tuple:
    """The values that identify a row of a file."""
    return tuple(job[key] for key in KEYS)


def place_of(row: dict) -> tuple:
    """The part of a row's key that is the same for all arms."""
    return row["point"], row["launch"], row["processes"]


def same_settings(a: dict, b: dict) -> bool:
    """Whether two rows, or a row and a job, did the same work."""
    return all((a.get(key) or None) == (b.get(key) or None) for key in SETTINGS)  # rows are older than some keys


def kept_rounds(job: dict, row: dict | None, run: dict) -> list[dict]:
    """The rounds of ``job``'s row to keep: measured with the same settings, commit, device and packages.

    Rounds with an error are measured again, and so are rounds of a tree with uncommitted changes. ``row`` is the job's
    in the result file, ``run`` the provenance of the present run.
    """
    if row is None or run["commit"].endswith("uncommitted") or not same_settings(row, job):
        return []
    same = [r for r in row["rounds"] if all(r["run"].get(key) == run.get(key) for key in SAME_RUN)]
    return [r for r in same if r["status"] in ("ok", "oom")]


def is_settled(rounds: list[dict]) -> bool:
    """Whether a further round would only repeat what is known: out of memory, absent, an error."""
    return bool(rounds) and all(round_["status"] != "ok" for round_ in rounds)


def combine(job: dict, rounds: list[dict]) -> dict:
    """The row of one arm: medians over its good rounds, or what went wrong in the last one."""
    row = {key: value for key, value in job.items() if key not in ("round", "device", "profile")}
    good = [round_ for round_ in rounds if round_["status"] == "ok"]
    if not good:
        return row | {"status": rounds[-1]["status"], "note": rounds[-1].get("note", ""), "rounds": rounds}
    values = {name: [r[name] for r in good if r.get(name) is not None] for name in MEDIANS}
    medians = {name: statistics.median(many) if many else None for name, many in values.items()}
    speeds = values["tokens_per_s"]
    spread = (max(speeds) - min(speeds)) / statistics.median(speeds) if len(speeds) > 1 else None
    return row | {"status": "ok", **medians, "spread": spread, "rounds": rounds}


def judge(rows: list[dict]) -> list[dict]:
    """Mark rows as ``inexact`` if their first gradient norm differs from HF's at the same place.

    The loss cannot show a wrong backward: within so few steps it hardly depends on the weights' changes.
    """
    base = {place_of(row): row for row in rows if row["arm"] == "hf"}

    def judged(row: dict) -> dict:
        hf = base.get(place_of(row), {})
        ours, theirs = row.get("first_grad_norm"), hf.get("first_grad_norm")
        if row["status"] not in ("ok", "inexact") or ours is None or theirs is None or "seed" in row["arm"]:
            return row
        if not same_settings(row, hf) or abs(ours - theirs) <= GRAD_NORM_TOLERANCE * theirs:
            return row | {"status": "ok"}
        return row | {"status": "inexact", "note": f"first gradient norm {ours:.4g}, HF's {theirs:.4g}"}

    return [judged(row) for row in rows]


def has_failed(row: dict) -> bool:
    """Whether a row of ours is wrong: an error, out of memory in some rounds only, inexact."""
    counts = {round_["status"] for round_ in row["rounds"]}
    failed = row["status"] == "inexact" or "error" in counts or {"ok", "oom"} <= counts
    return row["arm"].startswith("ours") and failed


def counts_text(row: dict) -> str:
    """The number of rounds; by status unless all are ok."""
    counts = Counter(round_["status"] for round_ in row["rounds"])
    if set(counts) == {"ok"}:
        return str(counts["ok"])
    return ", ".join(f"{n} {'OOM' if status == 'oom' else status}" for status, n in counts.items())


def describe(round_: dict) -> str:
    """One round in a few words."""
    if round_["status"] != "ok":
        return f"{round_['status']} {round_.get('note', '')[:200]}"
    numbers = {"ms": round_["step_ms"], "tok/s": round_["tokens_per_s"], "GiB": round_["peak_allocated_gib"]}
    text = " ".join(f"{format_number(value)} {unit}" for unit, value in numbers.items())
    loss, norm = ([round_[f"{at}_{name}"] for at in ("first", "last")] for name in ("loss", "grad_norm"))
    text += f" loss {loss[0]:.4f} -> {loss[1]:.4f}, gradient norm {format_number(norm[0])} -> {format_number(norm[1])}"
    return f"{text}, {round_['seconds']:.0f} s in all"


def change(row: dict, base: dict | None, metric: str) -> float | None:
    """Relative change of ``metric`` from ``base`` to ``row``; None if either lacks it or both are the same row.

    It is the median over the rounds that both have, so that one slow round changes nothing. If they have no round in
    common, it compares the rows' medians.
    """
    if base is None or base is row or not row.get(metric) or not base.get(metric):
        return None
    changes = changes_by_round(row, base, metric)
    return statistics.median(changes) if changes else row[metric] / base[metric] - 1


def changes_by_round(row: dict, base: dict, metric: str) -> list[float]:
    """``change`` per pair of rounds: the first rounds of one run with each other, then the second ones, and so on."""
    runs = [round_.get("run") for round_ in row["rounds"]]
    pairs = []
    for run in (run for i, run in enumerate(runs) if run not in runs[:i]):
        own, theirs = ([r.get(metric) for r in each["rounds"] if r.get("run") == run] for each in (row, base))
        pairs += [(a, b) for a, b in zip(own, theirs, strict=False) if a and b]  # None: out of memory
    return [a / b - 1 for a, b in pairs]


def percent(value: float | None) -> str | None:
    """A change with its sign."""
    return None if value is None else f"{value:+.1%}"


def percent_and_range(row: dict, base: dict | None, metric: str) -> str | None:
    """``change``, with the smallest and the largest change of a round."""
    value = percent(change(row, base, metric))
    rounds = [] if value is None else changes_by_round(row, base, metric)
    return f"{value} ({100 * min(rounds):+.1f} to {100 * max(rounds):+.1f})" if len(rounds) > 1 else value
