"""Training results as tables: plain text for the terminal, Markdown for the documents."""

import statistics

from benchmarks.common import text_table
from benchmarks.tables import LABELS
from benchmarks.train_arms import ARMS

# What the averages over points are of, and how they are called.
COMPARED = {
    "tokens_per_s": "tokens/s",
    "peak_allocated_gib": "peak",
    "above_static_gib": "peak above weights, gradients and optimizer state",
}


def columns_of(rows: list[dict], about: dict) -> dict[str, str]:
    """The keys that tell the rows' places apart, with their headings."""
    numeric = about["x"]["key"] != "name"
    columns = {"group": "model"}
    if numeric:
        columns |= {"x": about["x"]["label"]}
    if len({row["launch"] for row in rows}) > 1:
        columns |= {"launch": "launch"}
    return columns


def place_of(row: dict) -> tuple:
    """All that an arm's row shares with those of the other arms."""
    return row["point"], row["launch"], row["processes"]


def in_order(rows: list[dict], about: dict) -> list[dict]:
    """Rows by place, in the suite's order, and within a place by arm, in the order of ``ARMS``."""
    places = [tuple(place) for place in about["places"]]
    places += [place for place in map(place_of, rows) if place not in places]  # of an earlier form of the suite
    arms = list(ARMS)
    return sorted(rows, key=lambda row: (places.index(place_of(row)), arms.index(row["arm"])))


def change(row: dict, base: dict | None, metric: str) -> float | None:
    """``row``'s metric over that of ``base``, minus one; None where one of them has none or both are the same row."""
    if base is None or base is row or not row.get(metric) or not base.get(metric):
        return None
    return row[metric] / base[metric] - 1


def percent(value: float | None) -> str | None:
    """A change with its sign."""
    return None if value is None else f"{value:+.1%}"


def gib(value: float | None) -> str | None:
    """With one decimal."""
    return None if value is None else f"{value:.1f}"


def efficiency(row: dict, rows: list[dict]) -> str:
    """Tokens per second and process over those of the same arm on the fewest processes that it ran on."""
    same = [r for r in rows if r["status"] == "ok" and all(r[k] == row[k] for k in ("group", "launch", "arm"))]
    fewest = min(same, key=lambda r: r["processes"])
    return f"{row['tokens_per_s'] / row['processes'] / (fewest['tokens_per_s'] / fewest['processes']):.1%}"


def bases(rows: list[dict], arm: str = "hf") -> dict[tuple, dict]:
    """The row of ``arm`` at each place where it ran."""
    return {place_of(row): row for row in rows if row["arm"] == arm and row["status"] == "ok"}


def train_text(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """One line a place and arm: medians over the rounds, their spread, and changes against HF at the same place.

    Args:
        rows: of one result file.
        about: of its suite.
        markdown: for a document.
    """
    places, shown = columns_of(rows, about), in_order([row for row in rows if row["status"] != "absent"], about)
    padding = any(row.get("padded_tokens_per_s") != row.get("tokens_per_s") for row in shown)
    speed = ["tokens/s", "vs HF", "spread", *(["with padding"] if padding else [])]
    scaling = about["x"]["key"] == "num_processes"
    memory = ["peak GiB", "vs HF", "above state GiB", "vs HF", "reserved GiB"]
    header = [*places.values(), "arm", *speed, *(["scaling"] if scaling else []), *memory]
    header += ["first loss", "last loss", "rounds"]
    base, lines = bases(shown), []
    for row in shown:
        hf = base.get(place_of(row))
        line = [*(row[key] for key in places), LABELS[row["arm"]] if markdown else row["arm"]]
        if row["status"] != "ok":
            lines.append([*line, row["status"].upper(), *[None] * (len(header) - len(line) - 1)])
            continue
        line += [row["tokens_per_s"], percent(change(row, hf, "tokens_per_s")), f"{row['spread']:.1%}"]
        line += [row["padded_tokens_per_s"]] if padding else []
        line += [efficiency(row, shown)] if scaling else []
        for metric in ("peak_allocated_gib", "above_static_gib"):
            line += [gib(row[metric]), percent(change(row, hf, metric))]
        losses = [f"{row[key]:.4f}" for key in ("first_loss", "last_loss")]
        lines.append([*line, gib(row["peak_reserved_gib"]), *losses, sum(r["status"] == "ok" for r in row["rounds"])])
    absent = sorted({row["arm"] for row in rows if row["status"] == "absent"})
    parts = [text_table(header, lines, markdown), f"absent: {', '.join(absent)}" if absent else ""]
    return "\n\n".join(part for part in parts if part)


def average_text(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """Mean changes of each arm against HF, and of ours against liger-kernel, over the places where both ran.

    An empty text where no two arms ran at the same place.
    """
    rows = in_order(rows, about)
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm and row["status"] == "ok"]
        for other in ("hf", "liger") if arm.startswith("ours") else ("hf",):
            base = bases(rows, other)
            pairs = [(row, base[place_of(row)]) for row in own if place_of(row) in base]
            if arm == other or not pairs:
                continue
            means = []
            for metric in COMPARED:
                changes = [c for row, theirs in pairs if (c := change(row, theirs, metric)) is not None]
                means.append(percent(statistics.mean(changes)) if changes else None)
            names = [LABELS[name] if markdown else name for name in (arm, other)]
            lines.append([*names, *means, len(pairs)])
    return text_table(["arm", "against", *COMPARED.values(), "places"], lines, markdown) if lines else ""


def profile_text(rows: list[dict]) -> str:
    """Device time of a step by group, and the largest kernels."""
    parts = []
    for row in rows:
        profile = row["rounds"][-1]
        if "profile_groups" not in profile:
            continue
        total = sum(profile["profile_groups"].values())
        groups = [[g, ms, f"{ms / total:.1%}"] for g, ms in profile["profile_groups"].items()]
        kernels = [[k["name"][:70], k["group"], k["ms"], k["calls"]] for k in profile["profile_kernels"][:20]]
        parts.append(
            f"{row['point']}, {row['launch']}, {row['arm']}: {total:.2f} ms a step busy, "
            f"{profile['profile_idle_ms']:.2f} ms idle"
        )
        parts.append(text_table(["group", "ms", "share"], groups))
        parts.append(text_table(["kernel", "group", "ms", "calls"], kernels))
        gaps = [[g["ms"], g["after"], g["before"]] for g in profile["profile_gaps"]]
        parts.append(text_table(["idle ms", "after", "before"], gaps))
    return "\n\n".join(parts)
