"""Training results as tables: plain text for the terminal, Markdown for the documents."""

import statistics

from benchmarks.common import format_number, text_table
from benchmarks.tables import LABELS
from benchmarks.train_arms import ARMS
from benchmarks.train_changes import change, percent, percent_and_range
from benchmarks.train_rows import GRAD_NORM_TOLERANCE, counts_text, place_of

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


def in_order(rows: list[dict], about: dict) -> list[dict]:
    """Rows by place, in the suite's order, and within a place by arm, in the order of ``ARMS``."""
    places = [tuple(place) for place in about["places"]]
    places += [place for place in map(place_of, rows) if place not in places]  # of an earlier form of the suite
    arms = list(ARMS)
    return sorted(rows, key=lambda row: (places.index(place_of(row)), arms.index(row["arm"])))


def gib(value: float | None) -> str | None:
    """With one decimal."""
    return None if value is None else f"{value:.1f}"


def efficiency(row: dict, rows: list[dict]) -> str:
    """Tokens per second and process over those of the same arm on the fewest processes that it ran on."""
    same = [
        r for r in rows if r["status"] in ("ok", "inexact") and all(r[k] == row[k] for k in ("group", "launch", "arm"))
    ]
    fewest = min(same, key=lambda r: r["processes"])
    return f"{row['tokens_per_s'] / row['processes'] / (fewest['tokens_per_s'] / fewest['processes']):.1%}"


def bases(rows: list[dict], arm: str = "hf") -> dict[tuple, dict]:
    """The row of ``arm`` at each place where it ran."""
    return {place_of(row): row for row in rows if row["arm"] == arm and row["status"] == "ok"}


def train_text(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """One line a place and arm: medians over the rounds, their spread, and changes against HF in the same rounds.

    Args:
        rows: of one result file.
        about: of its suite.
        markdown: for a document.
    """
    places, shown = columns_of(rows, about), in_order([row for row in rows if row["status"] != "absent"], about)
    padding = any(row.get("padded_tokens_per_s") != row.get("tokens_per_s") for row in shown)
    speed = ["tokens/s", "vs HF", "spread", *(["with padding"] if padding else [])]
    scaling = about["x"]["key"] == "num_processes"
    memory = ["peak GiB", "vs HF", "above static GiB", "above state GiB", "vs HF", "reserved GiB"]
    header = [*places.values(), "arm", *speed, *(["scaling"] if scaling else []), *memory]
    header += ["first loss", "last loss", "last grad norm", "rounds"]
    base, lines = bases(shown), []
    for row in shown:
        hf = base.get(place_of(row))
        line = [*(row[key] for key in places), LABELS[row["arm"]] if markdown else row["arm"]]
        if row["status"] not in ("ok", "inexact"):
            lines.append([*line, row["status"].upper(), *[None] * (len(header) - len(line) - 2), counts_text(row)])
            continue
        mark = "~" if row["status"] == "inexact" else ""
        line += [format_number(row["tokens_per_s"]) + mark, percent_and_range(row, hf, "tokens_per_s")]
        line += [f"{row['spread']:.1%}" if row["spread"] is not None and len(row["rounds"]) > 1 else None]
        line += [row["padded_tokens_per_s"]] if padding else []
        line += [efficiency(row, shown)] if scaling else []
        line += [gib(row["peak_allocated_gib"]), percent(change(row, hf, "peak_allocated_gib"))]
        line += [gib(above_static(row))]
        line += [gib(row["above_static_gib"]), percent(change(row, hf, "above_static_gib"))]
        losses = [f"{row[key]:.4f}" for key in ("first_loss", "last_loss")]
        lines.append([*line, gib(row["peak_reserved_gib"]), *losses, row.get("last_grad_norm"), counts_text(row)])
    absent = sorted({row["arm"] for row in rows if row["status"] == "absent"})
    parts = [
        text_table(header, lines, markdown),
        f"absent: {', '.join(absent)}" if absent else "",
        inexact_text(shown),
        not_measured(rows, about, markdown),
    ]
    return "\n\n".join(part for part in parts if part)


def brief_text(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """One line a place, one column an arm: tokens per second, and peak memory in GiB in brackets."""
    places, shown = columns_of(rows, about), in_order(rows, about)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in shown if row["status"] != "absent")]
    at = {(place_of(row), row["arm"]): row for row in shown}

    def cell(row: dict | None) -> str | None:
        if row is None or row["status"] not in ("ok", "inexact"):
            return None if row is None else row["status"].upper()
        mark = "~" if row["status"] == "inexact" else ""
        return f"{format_number(row['tokens_per_s'])}{mark} ({gib(row['peak_allocated_gib']) or '-'})"

    first = {place_of(row): row for row in reversed(shown)}
    lines = [
        [*(first[place][key] for key in places), *(cell(at.get((place, arm))) for arm in arms)]
        for place in dict.fromkeys(place_of(row) for row in shown)
    ]
    header = [*places.values(), *(LABELS[arm] if markdown else arm for arm in arms)]
    parts = [text_table(header, lines, markdown), inexact_text(shown), not_measured(rows, about, markdown)]
    return "\n\n".join(part for part in parts if part)


def gains_text(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """Our tokens per second against each other arm's: a line a place. An empty text where ours or all others lack."""
    places, good = columns_of(rows, about), [row for row in in_order(rows, about) if row["status"] == "ok"]
    arms = [arm for arm in ARMS if not arm.startswith("ours") and any(row["arm"] == arm for row in good)]
    others = {arm: bases(good, arm) for arm in arms}
    lines = []
    for place, row in bases(good, "ours").items():
        gains = (percent_and_range(row, others[arm].get(place), "tokens_per_s") for arm in arms)
        lines.append([*(row[key] for key in places), *gains])
    header = [*places.values(), *(f"over {LABELS[arm] if markdown else arm}" for arm in arms)]
    return text_table(header, lines, markdown) if lines and arms else ""


def growth_text(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """Each arm's numbers at its smallest x and at its largest. An empty text where x is no quantity."""

    def cell(first: dict, last: dict, metric: str) -> str | None:
        growth = change(last, first, metric)
        if growth is None:
            return None
        factor = percent(growth) if growth < 9 else f"{1 + growth:.0f}x"
        return f"{format_number(first[metric])} to {format_number(last[metric])} ({factor})"

    if about["x"]["key"] in ("name", "num_processes"):
        return ""
    places = columns_of(rows, about)
    label = places.pop("x")
    series: dict[tuple, list[dict]] = {}
    for row in (row for row in in_order(rows, about) if row["status"] == "ok"):
        series.setdefault((*(row[key] for key in places), row["arm"]), []).append(row)
    lines = []
    for (*place, arm), own in series.items():
        first, last = (choose(own, key=lambda row: row["x"]) for choose in (min, max))
        if first is not last:
            cells = (cell(first, last, metric) for metric in COMPARED)
            lines.append([*place, LABELS[arm] if markdown else arm, f"{first['x']} to {last['x']}", *cells])
    speed, *memory = COMPARED.values()
    header = [*places.values(), "arm", label, speed, *(f"{name}, GiB" for name in memory)]
    return text_table(header, lines, markdown) if lines else ""


def inexact_text(rows: list[dict]) -> str:
    """What the mark means, where a row has it."""
    inexact = any(row["status"] == "inexact" for row in rows)
    return f"~: first gradient norm more than {GRAD_NORM_TOLERANCE:.0%} from HF's" if inexact else ""


def above_static(row: dict) -> float | None:
    """Peak over weights and optimizer state, GiB."""
    return None if row["static_gib"] is None else row["peak_allocated_gib"] - row["static_gib"]


def not_measured(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """What of the suite has no row: arms that are at no place, places without any arm, arms at the other places."""
    arms, places = about.get("arms", []), [tuple(place) for place in about["places"]]
    measured = {(place_of(row), row["arm"]) for row in rows}
    never = [arm for arm in arms if not any((place, arm) in measured for place in places)]
    parts = [LABELS[arm] if markdown else arm for arm in never]
    several = len({place[1:] for place in places}) > 1
    for place in places:
        point, launch, processes = place
        where = f"{point}, {launch} x {processes}" if several else point
        lacking = [arm for arm in arms if arm not in never and (place, arm) not in measured]
        if not any(place == other for other, _ in measured):
            parts.append(where)
        elif lacking:
            parts.append(f"{where}: {', '.join(LABELS[arm] if markdown else arm for arm in lacking)}")
    return f"not measured: {'; '.join(parts)}" if parts else ""


def average_text(rows: list[dict], about: dict, markdown: bool = False) -> str:
    """Mean changes of each arm against HF, and of ours against liger-kernel, a launch at a time.

    They are over the places where every arm that ran at all has a result, so that all lines are of the same places. An
    empty text where no two arms have one in common. Launches are apart because what counts as state differs between
    engines.
    """
    good = [row for row in in_order(rows, about) if row["status"] == "ok"]
    launches = list(dict.fromkeys(row["launch"] for row in good))
    several = len({launch for _, launch, _ in about["places"]}) > 1
    lines = []
    for launch in launches:
        here = [row for row in good if row["launch"] == launch]
        arms = list(dict.fromkeys(row["arm"] for row in here))
        main = [arm for arm in arms if not arm.startswith("ours_")]  # variants of ours may be at some places only
        common = set.intersection(*({place_of(row) for row in here if row["arm"] == arm} for arm in main or arms))
        pairs = [(arm, other) for arm in arms for other in (("hf", "liger") if arm.startswith("ours") else ("hf",))]
        for arm, other in pairs:
            if other not in arms or arm == other or not common:
                continue
            own, theirs = (
                {place: row for place, row in bases(here, one).items() if place in common} for one in (arm, other)
            )
            means = []
            for metric in COMPARED:
                changes = [c for place in own if (c := change(own[place], theirs[place], metric)) is not None]
                means.append(percent(statistics.mean(changes)) if changes else None)
            names = [LABELS[name] if markdown else name for name in (arm, other)]
            lines.append([*([launch] if several else []), *names, *means, len(own)])
    header = [*(["launch"] if several else []), "arm", "against", *COMPARED.values(), "places"]
    return text_table(header, lines, markdown) if lines else ""


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
