"""Result rows as Markdown tables, for the terminal and for the documents: ops, the fused loss's curve, training."""

import statistics

from benchmarks.common import format_number, text_table
from benchmarks.peers import PEERS, TRAIN_ARMS
from benchmarks.rows import GRAD_NORM_TOLERANCE, change, counts_text, percent, percent_and_range, place_of

KERNEL_METRICS = {"full_ms": "forward + backward, ms", "fwd_ms": "forward, ms", "bwd_ms": "backward, ms"}
# The metrics that averages over points are made of.
COMPARED = {
    "tokens_per_s": "tokens/s",
    "peak_allocated_gib": "peak",
    "above_static_gib": "peak above weights, gradients and optimizer state",
}
# The settings of the fused loss's curve that a user can choose; its file also has ideas that are not in the product.
CURVE = {
    "low_memory": "low_memory",
    "chunks 256": "logits_budget_mib=256",
    "chunks 512": "default (512)",
    "chunks 1024": "logits_budget_mib=1024",
    "chunks 2048": "logits_budget_mib=2048",
}


def labels(arms: list[str]) -> list[str]:
    """The names of arms in tables."""
    return [PEERS[arm].label for arm in arms]


def op_arms(rows: list[dict]) -> list[str]:
    """Arms with at least one measurement, in the order of the table of peers."""
    present = {row["arm"] for row in rows if row["status"] in ("ok", "inexact", "oom")}
    return [arm for arm in PEERS if arm in present]


def pivot(rows: list[dict], metric: str, floor: str | None = None) -> str:
    """One line a shape, one column an arm; in brackets the multiple of the floor. ``~``: failed the accuracy check."""
    from benchmarks.ops import MEASURED  # needs torch

    def cell(row: dict | None) -> str:
        if row is None:
            return "-"
        if row["status"] in ("oom", "error"):
            return "OOM" if row["status"] == "oom" else "error"
        value, below = row.get(metric), row.get(floor) if floor else None
        multiple = f" ({value / below:.2f}x)" if value is not None and below else ""
        return format_number(value) + multiple + ("~" if row["status"] == "inexact" else "")

    rows = [r for r in rows if r["status"] not in ("absent", "unsupported")]
    arms, lines = op_arms(rows), []
    for op, shape in sorted(dict.fromkeys((r["op"], r["shape"]) for r in rows), key=lambda key: MEASURED.index(key[0])):
        here = {r["arm"]: r for r in rows if (r["op"], r["shape"]) == (op, shape)}
        if not any(r.get(metric) is not None for r in here.values()):
            continue
        line: list[object] = [f"{op} {shape}"]
        if floor:
            floors = [r[floor] for r in here.values() if r.get(floor)]
            line.append(statistics.median(floors) if floors else None)
        lines.append([*line, *(cell(here.get(arm)) for arm in arms)])
    return text_table(["op", *(["floor"] if floor else []), *labels(arms)], lines) if lines else ""


def kernels_text(rows: list[dict]) -> str:
    """What the kernel benchmark prints at its end."""
    if any("host_us" in row for row in rows):
        fields = ("host_us", "host_launch_us", "host_autograd_us", "host_full_us")
        lines = [[f"{r['op']} {r['shape']} {r['arm']}", *(r.get(f) for f in fields)] for r in rows if "host_us" in r]
        return text_table(["host us", "no grad", "bare launches", "autograd", "with backward"], lines)
    parts = [(title, pivot(rows, metric, f"floor_{metric}")) for metric, title in KERNEL_METRICS.items()]
    parts.append(("extra peak memory, MiB", pivot(rows, "extra_mib")))
    absent = dict.fromkeys(row["arm"] for row in rows if row["status"] == "absent")
    texts = [f"{title}\n\n{table}" for title, table in parts if table]
    return "\n\n".join([*texts, *([f"absent: {', '.join(absent)}"] if absent else [])])


def curve_shape(shape: dict) -> str:
    """As in the other tables."""
    return f"BT{shape['tokens']} H{shape['hidden']} V{shape['vocab']}"


def curve_points(shape: dict) -> dict[str, dict]:
    """The measurements of one shape of the curve, by setting, where they did not fail."""
    known = {variant["name"]: variant for variant in shape["variants"] if "ms" in variant}
    return {name: known[name] for name in CURVE if name in known}


def curve_text(data: dict) -> str:
    """Milliseconds, multiple of the three GEMMs alone, and MiB over the gradients, a shape a row."""
    rows = []
    for shape in data["shapes"]:
        known = curve_points(shape)
        cells = [
            f"{v['ms']:.1f} ms ({v['ratio']:.2f}x), {v['extra_mib']:.0f} MiB" if (v := known.get(name)) else "-"
            for name in CURVE
        ]
        rows.append([curve_shape(shape), f"{shape['floor_ms']['3']:.1f} ms", *cells])
    return text_table(["shape", "3 GEMMs", *CURVE.values()], rows)


# Training. ``rows`` are those of one result file, ``about`` is its suite.


def place_columns(rows: list[dict], about: dict) -> dict[str, str]:
    """The keys that tell the rows' places apart, with their headings."""
    columns = {"group": "model"} | ({} if about["x"]["key"] == "name" else {"x": about["x"]["label"]})
    return columns | ({"launch": "launch"} if len({row["launch"] for row in rows}) > 1 else {})


def in_order(rows: list[dict], about: dict) -> list[dict]:
    """Rows by place, in the suite's order, and within a place by arm, in the order of ``TRAIN_ARMS``."""
    places = [tuple(place) for place in about["places"]]
    places += [place for place in map(place_of, rows) if place not in places]  # of an earlier form of the suite
    return sorted(rows, key=lambda row: (places.index(place_of(row)), TRAIN_ARMS.index(row["arm"])))


def gib(value: float | None) -> str | None:
    """With one decimal."""
    return None if value is None else f"{value:.1f}"


def rate(row: dict) -> str:
    """Tokens per second, marked where the row is inexact."""
    return format_number(row["tokens_per_s"]) + ("~" if row["status"] == "inexact" else "")


def efficiency(row: dict, rows: list[dict]) -> str:
    """Tokens per second and process over those of the same arm on the fewest processes that it ran on."""
    same = [
        r for r in rows if r["status"] in ("ok", "inexact") and all(r[k] == row[k] for k in ("group", "launch", "arm"))
    ]
    fewest = min(same, key=lambda r: r["processes"])
    return f"{row['tokens_per_s'] / row['processes'] / (fewest['tokens_per_s'] / fewest['processes']):.1%}"


def by_place(rows: list[dict], arm: str) -> dict[tuple, dict]:
    """The row of ``arm`` at each place where it ran."""
    return {place_of(row): row for row in rows if row["arm"] == arm and row["status"] == "ok"}


def with_notes(table: str, rows: list[dict], about: dict, absent: str = "") -> str:
    """The table, what its mark means where a row has it, and what of the suite has no row."""
    inexact = any(row["status"] == "inexact" for row in rows if row["status"] != "absent")
    mark = f"~: first gradient norm more than {GRAD_NORM_TOLERANCE:.0%} from HF's" if inexact else ""
    return "\n\n".join(part for part in (table, absent, mark, not_measured(rows, about)) if part)


def train_text(rows: list[dict], about: dict) -> str:
    """One line a place and arm: medians over the rounds, their spread, and changes against HF in the same rounds."""
    places, shown = place_columns(rows, about), in_order([row for row in rows if row["status"] != "absent"], about)
    padding = any(row.get("padded_tokens_per_s") != row.get("tokens_per_s") for row in shown)
    scaling = about["x"]["key"] == "num_processes"
    header = [*places.values(), "arm", "tokens/s", "vs HF", "spread", *(["with padding"] if padding else [])]
    header += [*(["scaling"] if scaling else []), "peak GiB", "vs HF", "above static GiB", "above state GiB", "vs HF"]
    header += ["reserved GiB", "first loss", "last loss", "last grad norm", "rounds"]
    base, lines = by_place(shown, "hf"), []
    for row in shown:
        hf = base.get(place_of(row))
        line = [*(row[key] for key in places), PEERS[row["arm"]].label]
        if row["status"] not in ("ok", "inexact"):
            lines.append([*line, row["status"].upper(), *[None] * (len(header) - len(line) - 2), counts_text(row)])
            continue
        peak, static = row["peak_allocated_gib"], row["static_gib"]
        line += [rate(row), percent_and_range(row, hf, "tokens_per_s")]
        line += [f"{row['spread']:.1%}" if row["spread"] is not None and len(row["rounds"]) > 1 else None]
        line += [row["padded_tokens_per_s"]] if padding else []
        line += [efficiency(row, shown)] if scaling else []
        line += [gib(peak), percent(change(row, hf, "peak_allocated_gib"))]
        line += [None if static is None else gib(peak - static)]
        line += [gib(row["above_static_gib"]), percent(change(row, hf, "above_static_gib"))]
        losses = [f"{row[key]:.4f}" for key in ("first_loss", "last_loss")]
        lines.append([*line, gib(row["peak_reserved_gib"]), *losses, row.get("last_grad_norm"), counts_text(row)])
    absent = sorted({row["arm"] for row in rows if row["status"] == "absent"})
    return with_notes(text_table(header, lines), rows, about, f"absent: {', '.join(absent)}" if absent else "")


def brief_text(rows: list[dict], about: dict) -> str:
    """One line a place, one column an arm: tokens per second, and peak memory in GiB in brackets."""
    places, shown = place_columns(rows, about), in_order(rows, about)
    arms = [arm for arm in TRAIN_ARMS if any(row["arm"] == arm for row in shown if row["status"] != "absent")]
    at = {(place_of(row), row["arm"]): row for row in shown}

    def cell(row: dict | None) -> str | None:
        if row is None or row["status"] not in ("ok", "inexact"):
            return None if row is None else row["status"].upper()
        return f"{rate(row)} ({gib(row['peak_allocated_gib']) or '-'})"

    first = {place_of(row): row for row in reversed(shown)}
    lines = [
        [*(first[place][key] for key in places), *(cell(at.get((place, arm))) for arm in arms)]
        for place in dict.fromkeys(place_of(row) for row in shown)
    ]
    return with_notes(text_table([*places.values(), *labels(arms)], lines), rows, about)


def gains_text(rows: list[dict], about: dict) -> str:
    """Our tokens per second against each other arm's: a line a place. An empty text where ours or all others lack."""
    places, good = place_columns(rows, about), [row for row in in_order(rows, about) if row["status"] == "ok"]
    arms = [arm for arm in TRAIN_ARMS if not arm.startswith("ours") and any(row["arm"] == arm for row in good)]
    others = {arm: by_place(good, arm) for arm in arms}
    lines = []
    for place, row in by_place(good, "ours").items():
        gains = (percent_and_range(row, others[arm].get(place), "tokens_per_s") for arm in arms)
        lines.append([*(row[key] for key in places), *gains])
    header = [*places.values(), *(f"over {label}" for label in labels(arms))]
    return text_table(header, lines) if lines and arms else ""


def growth_text(rows: list[dict], about: dict) -> str:
    """Each arm's numbers at its smallest x and at its largest. An empty text where x is no quantity."""

    def cell(first: dict, last: dict, metric: str) -> str | None:
        growth = change(last, first, metric)
        if growth is None:
            return None
        factor = percent(growth) if growth < 9 else f"{1 + growth:.0f}x"
        return f"{format_number(first[metric])} to {format_number(last[metric])} ({factor})"

    if about["x"]["key"] in ("name", "num_processes"):
        return ""
    places, lines = place_columns(rows, about), []
    label = places.pop("x")
    series: dict[tuple, list[dict]] = {}
    for row in (row for row in in_order(rows, about) if row["status"] == "ok"):
        series.setdefault((*(row[key] for key in places), row["arm"]), []).append(row)
    for (*place, arm), own in series.items():
        first, last = (choose(own, key=lambda row: row["x"]) for choose in (min, max))
        if first is not last:
            cells = (cell(first, last, metric) for metric in COMPARED)
            lines.append([*place, PEERS[arm].label, f"{first['x']} to {last['x']}", *cells])
    speed, *memory = COMPARED.values()
    header = [*places.values(), "arm", label, speed, *(f"{name}, GiB" for name in memory)]
    return text_table(header, lines) if lines else ""


def not_measured(rows: list[dict], about: dict) -> str:
    """What of the suite has no row: arms that are at no place, places without any arm, arms at the other places."""
    arms, places = about.get("arms", []), [tuple(place) for place in about["places"]]
    measured = {(place_of(row), row["arm"]) for row in rows}
    never = [arm for arm in arms if not any((place, arm) in measured for place in places)]
    parts = labels(never)
    several = len({place[1:] for place in places}) > 1
    for place in places:
        point, launch, processes = place
        where = f"{point}, {launch} x {processes}" if several else point
        lacking = [arm for arm in arms if arm not in never and (place, arm) not in measured]
        if not any(place == other for other, _ in measured):
            parts.append(where)
        elif lacking:
            parts.append(f"{where}: {', '.join(labels(lacking))}")
    return f"not measured: {'; '.join(parts)}" if parts else ""


def average_text(rows: list[dict], about: dict) -> str:
    """Mean changes of each arm against HF, and of ours against liger-kernel, a launch at a time.

    They are over the places where every arm that ran at all has a result, so that all lines are of the same places. An
    empty text where no two arms have one in common. Launches are apart because what counts as state differs between
    engines.
    """
    good = [row for row in in_order(rows, about) if row["status"] == "ok"]
    several = len({launch for _, launch, _ in about["places"]}) > 1
    lines = []
    for launch in dict.fromkeys(row["launch"] for row in good):
        here = [row for row in good if row["launch"] == launch]
        arms = list(dict.fromkeys(row["arm"] for row in here))
        main = [arm for arm in arms if not arm.startswith("ours_")]  # variants of ours may be at some places only
        common = set.intersection(*({place_of(row) for row in here if row["arm"] == arm} for arm in main or arms))
        for arm in arms:
            for other in ("hf", "liger") if arm.startswith("ours") else ("hf",):
                if other not in arms or arm == other or not common:
                    continue
                own, theirs = (by_place([r for r in here if place_of(r) in common], one) for one in (arm, other))
                means = []
                for metric in COMPARED:
                    changes = [c for place in own if (c := change(own[place], theirs[place], metric)) is not None]
                    means.append(percent(statistics.mean(changes)) if changes else None)
                lines.append([*([launch] if several else []), *labels([arm, other]), *means, len(own)])
    header = [*(["launch"] if several else []), "arm", "against", *COMPARED.values(), "places"]
    return text_table(header, lines) if lines else ""


def profile_text(rows: list[dict]) -> str:
    """Device time of a step by group, and the largest kernels."""
    parts = []
    for row in (row for row in rows if "profile_groups" in row["rounds"][-1]):
        profile = row["rounds"][-1]
        total = sum(profile["profile_groups"].values())
        parts.append(
            f"{row['point']}, {row['launch']}, {row['arm']}: device busy {total:.2f} of {row['step_ms']:.2f} ms a step"
        )
        groups = [[group, ms, f"{ms / total:.1%}"] for group, ms in profile["profile_groups"].items()]
        kernels = [[k["name"][:70], k["group"], k["ms"], k["calls"]] for k in profile["profile_kernels"][:20]]
        parts.append(text_table(["group", "ms", "share"], groups))
        parts.append(text_table(["kernel", "group", "ms", "calls"], kernels))
    return "\n\n".join(parts)
