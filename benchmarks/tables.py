"""Result rows as Markdown tables, for the terminal and for the documents: ops and training."""

import statistics

from benchmarks.common import format_number, text_table
from benchmarks.peers import PEERS, TRAIN_ARMS
from benchmarks.rows import GRAD_NORM_TOLERANCE, change, counts_text, judge, percent, percent_and_range, place_of
from liger_trainer.config import KINDS

# The metrics that averages over points are made of.
COMPARED = {
    "tokens_per_s": "tokens/s",
    "peak_allocated_gib": "peak",
    "above_static_gib": "peak above weights, gradients and optimizer state",
}


def labels(arms: list[str]) -> list[str]:
    """The names of arms in tables."""
    return [PEERS[arm].label for arm in arms]


def op_arms(rows: list[dict]) -> list[str]:
    """Arms with at least one measurement, in the order of the table of peers."""
    present = {row["arm"] for row in rows if row["status"] in ("ok", "inexact", "oom")}
    return [arm for arm in PEERS if arm in present]


def pivot(rows: list[dict], metric: str, floor: str | None = None) -> str:
    """One line per shape, one column per arm; in brackets the multiple of the floor. ``~``: inaccurate."""
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


def kernel_tables(rows: list[dict]) -> dict[str, str]:
    """The tables of a kernel benchmark by name: times in ms, extra peak memory in MiB, host time in us."""
    made = {name.replace("_", "-"): pivot(rows, f"{name}_us")
            for name in ("host", "host_launch", "host_autograd", "host_full")}  # fmt: skip
    timed = [row for row in rows if not row["shape"].endswith(" host")]
    made |= {name: pivot(timed, f"{name}_ms", f"floor_{name}_ms") for name in ("full", "fwd", "bwd")}
    made["memory"] = pivot(timed, "extra_mib")
    return {name: table for name, table in made.items() if table}


def survey_tables(name: str, rows: list[dict]) -> dict[str, str]:
    """The tables of the survey of models by name: every model, and a summary in one sentence."""
    rows = sorted(rows, key=lambda row: row["model_type"])
    built = [row for row in rows if row["status"] != "not built"]
    same = sum(row["status"] == "same" for row in rows)
    fused, unpadded = (sum(kind in row.get("applied", {}) for row in rows) for kind in ("fused_loss", "unpad"))
    counts = f"{same} with the same numbers, {fused} with the fused loss, {unpadded} un-padded"
    summary = f"{len(rows)} model types, {len(built)} built: {counts}."
    lines, left = [], {}
    kinds = [kind for kind in KINDS if any(kind in row.get("applied", {}) for row in built)]  # a file may be older
    for row in built:
        counts = [row.get("applied", {}).get(kind, "-") for kind in kinds]
        differ = f"{row['gradient']:.0e}" if "gradient" in row else row["note"]
        lines.append([row["model_type"], row["status"], *counts, differ])
        for skipped in row.get("skipped", []):
            left.setdefault(f"{skipped['kind']}: {skipped['reason']}", []).append(row["model_type"])
    table = text_table(["model type", "numbers", *kinds, "gradients differ by"], lines)
    kept = "\n".join(f"- {what} ({', '.join(models)})" for what, models in sorted(left.items()))
    failed = (f"- {row['model_type']}: {row['note']}" for row in rows if row["status"] == "not built")
    parts = (summary, table, "Left as they are:", kept, "Not built in this size:", "\n".join(failed))
    return {name: "\n\n".join(parts) + "\n", f"{name}-summary": f"{summary}\n"}


def convergence_table(rows: list[dict]) -> str:
    """One line per model: the last loss of each arm, and how far curves are apart.

    The distance of two curves is the largest difference of their losses in one window. The spread is the smallest one
    between two of HF's seeds; an arm's distance is that from HF with the same seed.
    """
    places: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["status"] == "ok":
            places.setdefault(row["point"], {})[row["arm"]] = row["rounds"][-1]["losses"]
    arms = [arm for arm in TRAIN_ARMS if any(arm in curves for curves in places.values())]
    others = [arm for arm in arms if not arm.startswith("hf")]
    lines = []
    for point, curves in places.items():
        seeds = [curve for arm, curve in curves.items() if arm.startswith("hf")]
        pairs = [(a, b) for i, a in enumerate(seeds) for b in seeds[i + 1 :]]
        apart = [min((largest_difference(*pair) for pair in pairs), default=None)]
        apart += [
            largest_difference(curves[arm], curves["hf"]) if {arm, "hf"} <= curves.keys() else None for arm in others
        ]
        lines.append([point, *(f"{curves[arm][-1]:.4f}" if arm in curves else None for arm in arms), *apart])
    header = ["model", *labels(arms), "spread of seeds", *(f"{label}, distance from HF" for label in labels(others))]
    return text_table(header, lines) if lines else ""


def largest_difference(a: list[float], b: list[float]) -> float:
    """The largest difference between two curves at the same window."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


class Training:
    """The tables of one result file of the training benchmark.

    Args:
        rows: all or some of the file's.
        about: its suite, or the part of it that the rows are about.
    """

    def __init__(self, rows: list[dict], about: dict):
        self.about, self.x = about, about["x"]["key"]
        places = [tuple(place) for place in about["places"]]
        places += [place for place in map(place_of, rows) if place not in places]  # of an earlier form of the suite
        self.all = sorted(judge(rows), key=lambda row: (places.index(place_of(row)), TRAIN_ARMS.index(row["arm"])))
        self.rows = [row for row in self.all if row["status"] != "absent"]
        self.good = [row for row in self.rows if row["status"] == "ok"]
        self.columns = {"group": "model"} | ({} if self.x == "name" else {"x": about["x"]["label"]})
        self.columns |= {"launch": "launch"} if len({row["launch"] for row in self.rows}) > 1 else {}

    def at(self, row: dict) -> list:
        """The first cells of a line: the row's place."""
        return [row[key] for key in self.columns]

    def arms(self, rows: list[dict]) -> list[str]:
        """The arms of ``rows``, in order."""
        return [arm for arm in TRAIN_ARMS if any(row["arm"] == arm for row in rows)]

    def by_place(self, arm: str) -> dict[tuple, dict]:
        """The good row of ``arm`` at each place where it ran."""
        return {place_of(row): row for row in self.good if row["arm"] == arm}

    def full(self) -> str:
        """One line per place and arm: medians over the rounds, their spread, and changes against HF by round."""
        padding = any(row.get("padded_tokens_per_s") != row.get("tokens_per_s") for row in self.rows)
        scaling = self.x == "num_processes"
        header = [*self.columns.values(), "arm", "tokens/s", "vs HF", "spread", *(["with padding"] if padding else [])]
        header += [*(["scaling"] if scaling else []), "peak GiB", "vs HF", "above static GiB", "above state GiB"]
        header += ["vs HF", "reserved GiB", "first loss", "last loss", "last grad norm", "rounds"]
        base, lines = self.by_place("hf"), []
        for row in self.rows:
            hf, line = base.get(place_of(row)), [*self.at(row), PEERS[row["arm"]].label]
            if row["status"] not in ("ok", "inexact"):
                lines.append([*line, row["status"].upper(), *[None] * (len(header) - len(line) - 2), counts_text(row)])
                continue
            peak, static = row["peak_allocated_gib"], row["static_gib"]
            line += [rate(row), percent_and_range(row, hf, "tokens_per_s")]
            line += [f"{row['spread']:.1%}" if row["spread"] is not None and len(row["rounds"]) > 1 else None]
            line += [row["padded_tokens_per_s"]] if padding else []
            line += [self.efficiency(row)] if scaling else []
            line += [gib(peak), percent(change(row, hf, "peak_allocated_gib")), gib(static and peak - static)]
            line += [gib(row["above_static_gib"]), percent(change(row, hf, "above_static_gib"))]
            line += [gib(row["peak_reserved_gib"]), *(f"{row[key]:.4f}" for key in ("first_loss", "last_loss"))]
            lines.append([*line, row.get("last_grad_norm"), counts_text(row)])
        absent = sorted({row["arm"] for row in self.all if row["status"] == "absent"})
        return self.with_notes(text_table(header, lines), f"absent: {', '.join(absent)}" if absent else "")

    def efficiency(self, row: dict) -> str:
        """Tokens per second and process, relative to the same arm on the fewest processes it ran on."""
        same = [r for r in self.rows if r["status"] in ("ok", "inexact")
                and all(r[key] == row[key] for key in ("group", "launch", "arm"))]  # fmt: skip
        fewest = min(same, key=lambda r: r["processes"])
        return f"{row['tokens_per_s'] / row['processes'] / (fewest['tokens_per_s'] / fewest['processes']):.1%}"

    def brief(self) -> str:
        """One line per place, one column per arm: tokens per second, and peak memory in GiB in brackets."""
        arms, lines = self.arms(self.rows), {}
        for row in self.all:
            cell = f"{rate(row)} ({gib(row['peak_allocated_gib']) or '-'})" if "tokens_per_s" in row else None
            cells = lines.setdefault(place_of(row), (self.at(row), {}))[1]
            cells[row["arm"]] = row["status"].upper() if cell is None else cell
        table = [[*place, *(cells.get(arm) for arm in arms)] for place, cells in lines.values()]
        return self.with_notes(text_table([*self.columns.values(), *labels(arms)], table))

    def gains(self) -> str:
        """Our tokens per second against each other arm's, one line per place. Empty without ours or any other."""
        arms = [arm for arm in self.arms(self.good) if not arm.startswith("ours")]
        lines = [
            [*self.at(row), *(percent_and_range(row, self.by_place(arm).get(place), "tokens_per_s") for arm in arms)]
            for place, row in self.by_place("ours").items()
        ]
        header = [*self.columns.values(), *(f"over {label}" for label in labels(arms))]
        return text_table(header, lines) if lines and arms else ""

    def growth(self) -> str:
        """Each arm's numbers at its smallest and largest x. Empty if x is not a quantity."""
        if self.x in ("name", "num_processes"):
            return ""
        columns = {key: heading for key, heading in self.columns.items() if key != "x"}
        series: dict[tuple, list[dict]] = {}
        for row in self.good:
            series.setdefault((*(row[key] for key in columns), row["arm"]), []).append(row)
        lines = []
        for (*place, arm), own in series.items():
            first, last = (choose(own, key=lambda row: row["x"]) for choose in (min, max))
            line = [*place, PEERS[arm].label, f"{first['x']} to {last['x']}"]
            for metric in COMPARED:
                growth = change(last, first, metric)
                factor = percent(growth) if growth is None or growth < 9 else f"{1 + growth:.0f}x"
                ends = " to ".join(format_number(row[metric]) for row in (first, last))
                line.append(None if growth is None else f"{ends} ({factor})")
            lines += [line] if first is not last else []
        speed, *memory = COMPARED.values()
        header = [*columns.values(), "arm", self.columns["x"], speed, *(f"{name}, GiB" for name in memory)]
        return text_table(header, lines) if lines else ""

    def average(self) -> str:
        """Mean changes of each arm against HF, and of ours against liger-kernel, a launch at a time.

        The means are over the places where every arm that ran at all has a result, so that all lines cover the same
        places. Empty if no two arms share a place. Launches are separate because engines differ in what is state.
        """
        several = len({launch for _, launch, _ in self.about["places"]}) > 1
        lines = []
        for launch in dict.fromkeys(row["launch"] for row in self.good):
            arms = list(dict.fromkeys(row["arm"] for row in self.good if row["launch"] == launch))
            rows = {arm: {p: row for p, row in self.by_place(arm).items() if row["launch"] == launch} for arm in arms}
            main = [arm for arm in arms if not arm.startswith("ours_")]  # variants of ours may be at some places only
            common = [place for place in rows[arms[0]] if all(place in rows[arm] for arm in main or arms)]
            pairs = [(arm, other) for arm in arms for other in (("hf", "liger") if arm.startswith("ours") else ("hf",))]
            for arm, other in ((a, b) for a, b in pairs if b in arms and a != b and common):
                places = [place for place in common if place in rows[arm]]
                means = []
                for metric in COMPARED:
                    changes = [change(rows[arm][place], rows[other].get(place), metric) for place in places]
                    known = [each for each in changes if each is not None]
                    means.append(percent(statistics.mean(known)) if known else None)
                lines.append([*([launch] if several else []), *labels([arm, other]), *means, len(places)])
        header = [*(["launch"] if several else []), "arm", "against", *COMPARED.values(), "places"]
        return text_table(header, lines) if lines else ""

    def with_notes(self, table: str, absent: str = "") -> str:
        """The table, the meaning of its mark if a row has it, and the parts of the suite that have no row.

        These are arms without any row, places without any row, and arms that are missing at the other places.
        """
        arms, places = self.about.get("arms", []), [tuple(place) for place in self.about["places"]]
        measured = {(place_of(row), row["arm"]) for row in self.all}
        never = [arm for arm in arms if not any((place, arm) in measured for place in places)]
        parts, several = labels(never), len({place[1:] for place in places}) > 1
        for place in places:
            where = "{}, {} x {}".format(*place) if several else place[0]
            lacking = [arm for arm in arms if arm not in never and (place, arm) not in measured]
            if not any(place == other for other, _ in measured):
                parts.append(where)
            elif lacking:
                parts.append(f"{where}: {', '.join(labels(lacking))}")
        inexact = any(row["status"] == "inexact" for row in self.rows)
        mark = f"~: first gradient norm more than {GRAD_NORM_TOLERANCE:.0%} from HF's" if inexact else ""
        missing = f"not measured: {'; '.join(parts)}" if parts else ""
        return "\n\n".join(part for part in (table, absent, mark, missing) if part)


def gib(value: float | None) -> str | None:
    """With one decimal."""
    return None if value is None else f"{value:.1f}"


def rate(row: dict) -> str:
    """Tokens per second, marked if the row is inexact."""
    return format_number(row["tokens_per_s"]) + ("~" if row["status"] == "inexact" else "")


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
