"""Draw the plots (PNG) and write the tables (Markdown) of every result file in a folder.

    liger-trainer plot
    liger-trainer plot --update README.md docs/paper.md docs/models.md

``--update`` replaces the text between ``<!-- table:NAME -->`` and ``<!-- /table -->`` in the given files. The headings
in the Markdown files beside the results are names of tables.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import cases, common, models, tables
from benchmarks.peers import PEERS, TRAIN_ARMS

MARKER = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
SETS = tuple(name for name in cases.SETS if name != "host")  # host times have tables of their own
CUT = 8.0  # multiples of the floor: bars beyond are cut and carry their number
METRICS = {
    "tokens_per_s": "tokens / s",
    "peak_allocated_gib": "peak allocated, GiB",
    "above_static_gib": "peak above weights, gradients\nand optimizer state, GiB",
}
Axis = Any  # matplotlib's, which is imported only to draw


@dataclass(frozen=True)
class Panel:
    """One set of axes with grouped bars, one colour an arm.

    Args:
        title: over the axes.
        label: of the values.
        groups: names under the bars.
        series: by arm, one value a group: a number, None for a gap, or ``"oom"``, drawn as an x on the axis.
        spreads: by arm, one (below, above) or None a group: error bars.
        floor: values are multiples of a floor, which gets a dashed line; higher ones are cut and carry their number.
    """

    title: str
    label: str
    groups: list[str]
    series: dict[str, list]
    spreads: dict[str, list] = field(default_factory=dict)
    floor: bool = False

    def draw(self, axis: Axis) -> None:
        """Put it on matplotlib's ``axis``."""
        width = 0.8 / max(len(self.series), 1)
        for index, (arm, values) in enumerate(self.series.items()):
            for group, value in enumerate(values):
                x, color = group + (index - (len(self.series) - 1) / 2) * width, PEERS[arm].color
                if value == "oom":
                    axis.plot(x, 0, "x", color=color, markersize=8, markeredgewidth=2, clip_on=False, zorder=5)
                elif value is not None:
                    shown = min(value, CUT) if self.floor else value
                    axis.bar(x, shown, width * 0.92, color=color)
                    if shown < value:
                        axis.annotate(f"{value:.0f}", (x, shown), ha="center", va="bottom", fontsize=6)
                    if self.spreads and self.spreads[arm][group]:
                        ends = [[part] for part in self.spreads[arm][group]]
                        axis.errorbar(x, shown, ends, color="black", linewidth=0.8, capsize=2)
        slanted = {"rotation": 20, "ha": "right"} if max(map(len, self.groups)) > 6 and len(self.groups) > 2 else {}
        axis.set_xticks(range(len(self.groups)), self.groups, fontsize=7, **slanted)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        axis.set_axisbelow(True)
        axis.set_title(self.title, fontsize=9)
        axis.set_ylabel(self.label, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        if self.floor:
            axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")


def draw_sheet(panels: list[Panel], title: str, path: Path, columns: int = 3) -> None:
    """Draw panels over a common legend and save them as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel.draw(axis)
    drawn = {arm: values for panel in panels for arm, values in panel.series.items()}
    legend: list[Any] = [Patch(color=PEERS[a].color, label=PEERS[a].label) for a in PEERS if a in drawn]
    if any("oom" in values for panel in panels for values in panel.series.values()):
        legend.append(Line2D([], [], marker="x", color="black", linestyle="", label="out of memory"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 6), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


# Ops


def in_set(rows: list[dict], name: str) -> list[dict]:
    """The rows of one set of shapes, in its order."""
    specs = cases.select([name])
    order = {(spec["op"], spec["shape"]): index for index, spec in enumerate(specs)}
    chosen = [row for row in rows if (row["op"], row["shape"]) in order]
    return sorted(chosen, key=lambda row: order[row["op"], row["shape"]])


def kernel_tables(stem: str, data: dict) -> dict[str, str]:
    """Every table of a result file of the kernel benchmark, by name."""
    made: dict[str, str] = {}
    for metric in ("host_us", "host_launch_us", "host_autograd_us", "host_full_us"):
        made[f"{stem}-{metric.removesuffix('_us').replace('_', '-')}"] = tables.pivot(data["results"], metric)
    rows = on_device(data)
    for suffix, chosen in {"": rows, **{f"-{name}": in_set(rows, name) for name in SETS}}.items():
        for metric in ("full", "fwd", "bwd"):
            made[f"{stem}-{metric}{suffix}"] = tables.pivot(chosen, f"{metric}_ms", f"floor_{metric}_ms")
        made[f"{stem}-memory{suffix}"] = tables.pivot(chosen, "extra_mib")
    return made


def on_device(data: dict) -> list[dict]:
    """Rows with device times, without those of ``--host``."""
    return [row for row in data["results"] if not row["shape"].endswith(" host")]


def plot_kernels(stem: str, data: dict, out: Path) -> list[Path]:
    """Time over the floor, and extra memory, of the anchor shapes (of all where none of them was measured)."""
    rows = in_set(on_device(data), "anchors") or on_device(data)
    title, made = data["runs"][-1]["device"], []
    for metric, floor, label, name, heading in (
        ("full_ms", "floor_full_ms", "time / floor", "time", "forward + backward over the floor (lower is better)"),
        ("extra_mib", None, "extra peak MiB", "memory", "peak memory over inputs and gradients"),
    ):
        panels = []
        for op in dict.fromkeys(row["op"] for row in rows):
            own = [row for row in rows if row["op"] == op and row.get(metric) is not None]
            at = {(r["shape"], r["arm"]): r[metric] / (r[floor] if floor else 1) for r in own}
            groups = list(dict.fromkeys(row["shape"] for row in rows if row["op"] == op))
            arms = [arm for arm in tables.op_arms(rows) if any((group, arm) in at for group in groups)]
            series = {arm: [at.get((group, arm)) for group in groups] for arm in arms}
            panels += [Panel(op, label, groups, series, floor=bool(floor))] if series else []
        if panels:
            made.append(out / f"{stem}-{name}.png")
            draw_sheet(panels, f"{heading}, {title}", made[-1])
    return made


def plot_curve(data: dict, path: Path) -> None:
    """Time over the three GEMMs against extra memory of the fused loss: one line a shape, a point a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5))
    axis = figure.subplots()
    for shape in data["shapes"]:
        points = list(tables.curve_points(shape).values())
        at = [point["extra_mib"] for point in points]
        axis.plot(at, [point["ratio"] for point in points], marker="o", label=tables.curve_shape(shape))
    axis.axhline(1.0, color="black", linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("MiB over the gradients (low_memory, then logits budgets of 256, 512, 1024, 2048 MiB)")
    axis.set_ylabel("forward + backward / three GEMMs")
    axis.set_title(f"linear_cross_entropy, {data['device']}")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# Training


def spread_of(row: dict, metric: str) -> tuple[float, float] | None:
    """How far the rounds lie below and above the median."""
    values = [r[metric] for r in row["rounds"] if r["status"] == "ok" and r[metric] is not None]
    return (row[metric] - min(values), max(values) - row[metric]) if len(values) > 1 else None


def train_panels(rows: list[dict], by_name: bool) -> list[Panel]:
    """A panel a metric, and where x is a number a row of them a model; the groups are the points and launches."""
    launches = {row["launch"] for row in rows}

    def place(row: dict) -> str:
        name = row["point"].replace(" ", "\n", 1) if by_name else str(row["x"])
        return f"{name}\n{row['launch']}" if len(launches) > 1 else name

    panels = []
    for group in dict.fromkeys("" if by_name else row["group"] for row in rows):
        own = [row for row in rows if by_name or row["group"] == group]
        places = list(dict.fromkeys(place(row) for row in own))
        for metric, label in METRICS.items():
            series, spreads = {}, {}
            for arm in TRAIN_ARMS:
                at = {place(row): row for row in own if row["arm"] == arm}
                here = [at.get(one) for one in places]
                values = [row and ("oom" if row["status"] == "oom" else row.get(metric)) for row in here]
                if any(value is not None for value in values):
                    series[arm], spreads[arm] = values, [row and spread_of(row, metric) for row in here]
            if any(isinstance(value, float) for values in series.values() for value in values):
                panels.append(Panel(group or label, label, places, series, spreads))
    return panels


def plot_train(stem: str, data: dict, out: Path) -> list[Path]:
    """Draw ``stem.png`` into ``out``. No data, no file."""
    about = data["suite"]
    rows = [row for row in tables.Training(data["results"], about).rows if row["status"] in ("ok", "oom")]
    by_name = about["x"]["key"] == "name"
    panels = train_panels(rows, by_name)
    if not panels:
        return []
    device, most = re.sub(r"^NVIDIA ", "", data["runs"][-1]["device"]), max(row["processes"] for row in rows)
    title = about["title"] + ("" if by_name else f", by {about['x']['label']}")
    path, on = out / f"{stem}.png", device if most == 1 else f"{most} x {device}"
    draw_sheet(panels, f"{title}\n{on}", path, len({panel.label for panel in panels}))
    return [path]


# Files


def provenance_line(data: dict) -> str:
    """Where the numbers come from; where runs differ, all there is."""
    runs = data["runs"]

    def differing(values: list[str | None]) -> str:
        known = list(dict.fromkeys(values))
        return "" if known == [None] else " and ".join(value or "none" for value in known)

    versions = {
        name: differing([run["packages"][name] for run in runs if name in run["packages"]])
        for name in dict.fromkeys(name for run in runs for name in run["packages"])
    }
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    dates = sorted(run["date"][:10] for run in runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    commits = sorted({r["commit"][:12] + ("+uncommitted" if "+" in r["commit"] else "") for r in runs})
    most = max((row.get("processes", 1) for row in data["results"]), default=1)
    devices = f"up to {most} x " * (most > 1) + differing([run["device"] for run in runs])
    driver = differing([run["driver"] for run in runs])
    return f"{devices}, {f'driver {driver}, ' * bool(driver)}{packages}; {when}; commit {', '.join(commits)}"


def update(path: Path, made: dict[str, str]) -> None:
    """Replace the marked tables of one file.

    Raises:
        ValueError: a marker whose table does not exist, or that is not closed.
    """

    def replace(match: re.Match) -> str:
        if match[2] not in made:
            raise ValueError(f"{path}: got table {match[2]!r}; must be of {', '.join(sorted(made)) or 'none'}")
        return match[1] + made[match[2]] + match[3]

    text = path.read_text()
    opened, closed = text.count("<!-- table:"), len(MARKER.findall(text))
    if opened != closed:
        raise ValueError(f"{path}: got {opened} table markers, {closed} of them closed by <!-- /table -->; must be all")
    path.write_text(MARKER.sub(replace, text))


def main(argv: list[str] | None = None) -> int:
    """Draw and write everything; 1 where there are no results."""
    parser = argparse.ArgumentParser(
        prog="liger-trainer plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the result files")
    parser.add_argument("--update", type=Path, nargs="*", default=[], metavar="FILE", help="files with markers")
    args = parser.parse_args(argv)
    files = sorted([*args.results.glob("kernels-*.json"), *args.results.glob("train-*.json")])
    if not files:
        print(f"no result files in {args.results}", file=sys.stderr)
        return 1
    made: dict[str, str] = {}
    written: list[Path] = []
    for file in files:
        data, stem = json.loads(file.read_text()), file.stem
        if stem.startswith("train"):
            made_of = tables.Training(data["results"], data["suite"])
            own = {stem: made_of.full(), f"{stem}-brief": made_of.brief(), f"{stem}-gains": made_of.gains()}
            own |= {f"{stem}-average": made_of.average(), f"{stem}-growth": made_of.growth()}
        else:
            own = kernel_tables(stem, data)
        own = {name: f"{text}\n\n{provenance_line(data)}\n" for name, text in own.items() if text}
        made |= own
        sections = [f"## {name}\n\n{text}" for name, text in own.items() if not name.endswith(SETS)]
        file.with_suffix(".md").write_text(f"# {stem}\n\n" + "\n".join(sections))
        plot = plot_train if stem.startswith("train") else plot_kernels
        written += [file.with_suffix(".md"), *plot(stem, data, args.results)]
    for file in sorted(args.results.glob("linear-ce-curve-*.json")):
        data = json.loads(file.read_text())
        made[file.stem] = f"{tables.curve_text(data)}\n\n{data['device']}; commit {data['run']['commit']}\n"
        plot_curve(data, file.with_suffix(".png"))
        written.append(file.with_suffix(".png"))
    for file in args.results.glob("models*.json"):
        data = json.loads(file.read_text())
        made[file.stem] = f"{models.make_table(data['results'])}\n{provenance_line(data)}\n"
        made[f"{file.stem}-summary"] = f"{models.summary(data['results'])}\n"
    for path in args.update:
        update(path, made)
    print("\n".join(str(path) for path in [*written, *args.update]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
