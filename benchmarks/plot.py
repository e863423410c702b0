"""Draw the plots (PNG) and write the tables (Markdown) of every result file in a folder.

    liger-trainer plot
    liger-trainer plot --update README.md docs/*.md

``--update`` replaces the text between ``<!-- table:NAME -->`` and ``<!-- /table -->`` in the given files. The headings
in the Markdown files beside the results are names of tables.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import cases, common, face, tables
from benchmarks.peers import PEERS, TRAIN_ARMS

MARKER = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
SETS = tuple(name for name in cases.SETS if name != "host")  # host times have tables of their own
METRICS = {
    "tokens_per_s": "tokens / s",
    "peak_allocated_gib": "peak allocated, GiB",
    "above_static_gib": "peak above weights, gradients\nand optimizer state, GiB",
}
Axis = Any  # matplotlib's, which is imported only to draw


# Tables


def kernel_tables(stem: str, data: dict) -> dict[str, str]:
    """Every table of a result file of the kernel benchmark, by name."""
    made = {f"{stem}-{name}": text for name, text in tables.kernel_tables(data["results"]).items()}
    for group in SETS:
        chosen = tables.kernel_tables(in_set(data["results"], group))
        made |= {f"{stem}-{name}-{group}": text for name, text in chosen.items()}
    return made


def in_set(rows: list[dict], name: str) -> list[dict]:
    """The rows of one set of shapes, in its order."""
    order = {(spec["op"], spec["shape"]): index for index, spec in enumerate(cases.select([name]))}
    chosen = [row for row in rows if (row["op"], row["shape"]) in order]
    return sorted(chosen, key=lambda row: order[row["op"], row["shape"]])


def train_tables(stem: str, data: dict) -> dict[str, str]:
    """Every table of a result file of the training benchmark, by name."""
    if data["suite"].get("curves"):
        return {stem: tables.convergence_table(data["results"])}
    made = tables.Training(data["results"], data["suite"])
    parts = {part: getattr(made, part)() for part in ("brief", "gains", "average", "growth")}
    return {stem: made.full(), **{f"{stem}-{part}": text for part, text in parts.items()}}


# The plot of a suite


def height(row: dict | None, metric: str) -> float | str | None:
    """The value of a bar, ``oom``, or None for a gap."""
    return row and ("oom" if row["status"] == "oom" else row.get(metric))


def draw_bars(axis: Axis, rows: dict[tuple[str, str], dict], places: list[str], metric: str) -> None:
    """Draw one panel: grouped bars with the range of the rounds, and an x where an arm ran out of memory.

    Args:
        axis: matplotlib's.
        rows: by place and arm.
        places: the groups of bars, by the names under them.
        metric: what the bars show.
    """
    arms = [arm for arm in TRAIN_ARMS if any(height(rows.get((place, arm)), metric) is not None for place in places)]
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        for group, place in enumerate(places):
            row = rows.get((place, arm), {"status": "absent"})
            x, value = group + (index - (len(arms) - 1) / 2) * width, height(row, metric)
            if value == "oom":
                style = {"color": PEERS[arm].color, "markersize": 8, "markeredgewidth": 2}
                axis.plot(x, 0, "x", clip_on=False, zorder=5, **style)
            elif value is not None:
                axis.bar(x, value, width * 0.92, color=PEERS[arm].color)
                rounds = [r[metric] for r in row["rounds"] if r["status"] == "ok" and r[metric] is not None]
                if len(rounds) > 1:
                    ends = [[value - min(rounds)], [max(rounds) - value]]
                    axis.errorbar(x, value, ends, color="black", linewidth=0.8, capsize=2)
    slanted = {"rotation": 20, "ha": "right"} if max(map(len, places)) > 6 and len(places) > 2 else {}
    axis.set_xticks(range(len(places)), places, fontsize=7, **slanted)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)
    axis.set_ylabel(METRICS[metric], fontsize=8)
    axis.tick_params(axis="y", labelsize=7)


def plot_train(data: dict, path: Path) -> bool:
    """Draw a panel for each metric, and a row of them for each model where x is a number. False without data."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    about = data["suite"]
    rows = [row for row in tables.Training(data["results"], about).rows if row["status"] in ("ok", "oom")]
    metrics = [metric for metric in METRICS if any(isinstance(height(row, metric), float) for row in rows)]
    if not metrics:
        return False
    by_name, several = about["x"]["key"] == "name", len({row["launch"] for row in rows}) > 1
    groups: dict[str, dict[tuple[str, str], dict]] = {}
    for row in rows:
        place = row["point"].replace(" ", "\n", 1) if by_name else str(row["x"])
        place += f"\n{row['launch']}" if several else ""
        groups.setdefault("" if by_name else row["group"], {})[place, row["arm"]] = row
    figure = Figure(figsize=(4.6 * len(metrics), 3.1 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(metrics), squeeze=False)
    for line, (group, own) in zip(axes, groups.items(), strict=True):
        for axis, metric in zip(line, metrics, strict=True):
            axis.set_title(group or METRICS[metric], fontsize=9)
            draw_bars(axis, own, list(dict.fromkeys(place for place, _ in own)), metric)
    drawn = {row["arm"] for row in rows}
    legend: list[Any] = [Patch(color=peer.color, label=peer.label) for arm, peer in PEERS.items() if arm in drawn]
    if any(row["status"] == "oom" for row in rows):
        legend.append(Line2D([], [], marker="x", color="black", linestyle="", label="out of memory"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 6), fontsize=8, frameon=False)
    device, most = re.sub(r"^NVIDIA ", "", data["runs"][-1]["device"]), max(row["processes"] for row in rows)
    title = about["title"] + ("" if by_name else f", by {about['x']['label']}")
    figure.suptitle(f"{title}\n{device if most == 1 else f'{most} x {device}'}", fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def plot_curves(data: dict, path: Path) -> bool:
    """Draw a panel for each model with every arm's loss, and below it the differences from HF. False without data."""
    from matplotlib.figure import Figure

    points: dict[str, dict[str, dict]] = {}
    for row in data["results"]:
        if row["status"] == "ok":
            points.setdefault(row["point"], {})[row["arm"]] = row
    if not points:
        return False
    columns = min(4, len(points))
    height, lines = 2 * -(-len(points) // columns), {}
    figure = Figure(figsize=(3.4 * columns, 1.9 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False)
    for index, (point, rows) in enumerate(points.items()):
        upper, lower = axes[2 * (index // columns)][index % columns], axes[2 * (index // columns) + 1][index % columns]
        upper.set_title(point, fontsize=9)
        for arm in (arm for arm in TRAIN_ARMS if arm in rows):
            losses, steps = rows[arm]["rounds"][-1]["losses"], rows[arm]["window"]
            x = [steps * (window + 1) for window in range(len(losses))]
            style = {"color": PEERS[arm].color, "linestyle": "--" if arm.startswith("ours") else "-", "linewidth": 1.2}
            (lines[arm],) = upper.plot(x, losses, label=PEERS[arm].label, **style)
            if "hf" in rows and arm != "hf":
                base = rows["hf"]["rounds"][-1]["losses"]
                lower.plot(x, [abs(own - other) for own, other in zip(losses, base, strict=True)], **style)
        lower.set_yscale("symlog", linthresh=1e-6)
        for axis, label in ((upper, "loss"), (lower, "difference from HF")):
            axis.set_ylabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(linewidth=0.4, alpha=0.6)
    for empty in (axis for axis in axes.flat if not axis.lines):
        empty.set_visible(False)
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(f"{data['suite']['title']}\n{re.sub('^NVIDIA ', '', data['runs'][-1]['device'])}", fontsize=10)
    figure.savefig(path, dpi=150)
    return True


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
    made: dict[str, str] = {}
    written: list[Path] = []
    for kind, tables_of in (("kernels", kernel_tables), ("train", train_tables)):
        for file in sorted(args.results.glob(f"{kind}-*.json")):
            data = json.loads(file.read_text())
            own = {name: f"{text}\n\n{provenance_line(data)}\n"
                   for name, text in tables_of(file.stem, data).items() if text}  # fmt: skip
            made |= own
            sections = [f"## {name}\n\n{text}" for name, text in own.items() if not name.endswith(SETS)]
            written.append(file.with_suffix(".md"))
            written[-1].write_text(f"# {file.stem}\n\n" + "\n".join(sections))
            draw = plot_curves if data.get("suite", {}).get("curves") else plot_train
            if kind == "train" and draw(data, file.with_suffix(".png")):
                written.append(file.with_suffix(".png"))
    if face.draw(args.results, args.results / "readme.png"):
        written.append(args.results / "readme.png")
    if not written:
        print(f"no result files in {args.results}", file=sys.stderr)
        return 1
    for file in args.results.glob("models*.json"):
        data = json.loads(file.read_text())
        made |= tables.survey_tables(file.stem, data["results"])
        made[file.stem] += f"\n{provenance_line(data)}\n"
    for path in args.update:
        update(path, made)
    print("\n".join(str(path) for path in [*written, *args.update]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
