"""Plots (PNG) and tables (Markdown) of every result file in a folder.

    python benchmarks/plot.py
    python benchmarks/plot.py --update README.md

``--update`` replaces what stands between ``<!-- table:NAME -->`` and ``<!-- /table -->`` in the given files; ``--list``
prints the names there are.
"""

import argparse
import json
import re
import sys
from pathlib import Path

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, curve, shapes, tables

COLORS = {
    "ours": "#d1495b",
    "ours_low_memory": "#edae49",
    "hf": "#8d99ae",
    "torch": "#c0c7d3",
    "compile": "#5c677d",
    "liger": "#00798c",
    "liger_fp32": "#66b3bf",
    "trl": "#6a994e",
    "trl_head": "#6a994e",
    "liger_trl_head": "#30638e",
    "cce": "#9b72aa",
}
SETS = tuple(name for name in shapes.SETS if name != "host")  # host times have tables of their own
MARKER = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
WORST_SHOWN = 8.0  # multiples of the floor: bars beyond are cut and carry their number


def device_rows(rows: list[dict]) -> list[dict]:
    """Rows with device times: those of ``--host`` are left out."""
    return [r for r in rows if not r["shape"].endswith(" host")]


def in_set(rows: list[dict], name: str) -> list[dict]:
    """The rows of one set of shapes, in its order."""
    order = {(s["op"], shapes.shape_name(s)): i for i, s in enumerate(shapes.SETS[name])}
    chosen = [r for r in rows if (r["op"], r["shape"]) in order]
    return sorted(chosen, key=lambda r: order[r["op"], r["shape"]])


def provenance_line(data: dict) -> str:
    """Where the numbers come from."""
    run = data["runs"][-1]
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items() if version)
    dates = sorted(r["date"][:10] for r in data["runs"])
    commits = sorted({r["commit"][:12] + ("+uncommitted" if "+" in r["commit"] else "") for r in data["runs"]})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{run['device']}, driver {run['driver']}, {packages}; {when}; commit {', '.join(commits)}"


def make_tables(stem: str, data: dict) -> dict[str, str]:
    """Every Markdown table of one result file, by name."""
    source = f"\n\n{provenance_line(data)}\n"
    if stem.startswith("train"):
        return {stem: tables.train_text(data["results"], markdown=True) + source}
    rows, made = device_rows(data["results"]), {}
    for metric in ("host_us", "host_launch_us", "host_autograd_us", "host_full_us"):
        text = tables.pivot(data["results"], metric, markdown=True)
        if text:
            made[f"{stem}-{metric.removesuffix('_us').replace('_', '-')}"] = text + source
    for name in ("all", *SETS):
        chosen = rows if name == "all" else in_set(rows, name)
        suffix = "" if name == "all" else f"-{name}"
        for metric in ("full", "fwd", "bwd"):
            text = tables.pivot(chosen, f"{metric}_ms", f"floor_{metric}_ms", markdown=True)
            if text:
                made[f"{stem}-{metric}{suffix}"] = text + source
        text = tables.pivot(chosen, "extra_mib", markdown=True)
        if text:
            made[f"{stem}-memory{suffix}"] = text + source
    return made


def update(path: Path, made: dict[str, str]) -> None:
    """Replace the marked tables of one file.

    Raises ``ValueError`` for a marker whose table does not exist, naming both.
    """

    def replace(match: re.Match) -> str:
        if match[2] not in made:
            raise ValueError(f"{path}: no table {match[2]!r}; there are {', '.join(sorted(made)) or 'none'}")
        return match[1] + made[match[2]] + match[3]

    text = path.read_text()
    opened = text.count("<!-- table:")
    if opened != len(MARKER.findall(text)):
        raise ValueError(
            f"{path}: {opened} table markers, {len(MARKER.findall(text))} of them closed by <!-- /table -->"
        )
    path.write_text(MARKER.sub(replace, text))


def bars(axis, groups: list[str], series: dict[str, list[float | None]], cut: float | None = None) -> None:
    """Grouped bars, one colour an arm; ``None`` leaves a gap; bars over ``cut`` are cut and numbered."""
    width = 0.8 / max(len(series), 1)
    for index, (arm, values) in enumerate(series.items()):
        for group, value in enumerate(values):
            if value is None:
                continue
            x = group + (index - (len(series) - 1) / 2) * width
            shown = value if cut is None else min(value, cut)
            axis.bar(x, shown, width * 0.92, color=COLORS[arm])
            if shown < value:
                axis.annotate(f"{value:.0f}", (x, shown), ha="center", va="bottom", fontsize=6)
    slanted = {"rotation": 20, "ha": "right"} if len(groups) > 2 else {}
    axis.set_xticks(range(len(groups)), groups, fontsize=7, **slanted)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)


def value_of(row: dict | None, metric: str, floor: str | None) -> float | None:
    """A number to draw, or None."""
    if row is None or row.get(metric) is None:
        return None
    return row[metric] / row[floor] if floor else row[metric]


def figure(panels: list[tuple], arms: list[str], title: str, path: Path) -> None:
    """Draw ``(title, y label, groups, series, cut, reference line)`` panels over a common legend and save them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawn, axes = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, label, groups, series, cut, line) in zip(axes.flat, panels, strict=False):
        bars(axis, groups, series, cut)
        axis.set_title(name, fontsize=9)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        if line is not None:
            axis.axhline(line, color="black", linewidth=0.8, linestyle="--")
    legend = [Patch(color=COLORS[arm], label=tables.LABELS[arm]) for arm in arms]
    drawn.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 6), fontsize=8, frameon=False)
    drawn.suptitle(title, fontsize=10)
    drawn.savefig(path, dpi=150)
    pyplot.close(drawn)


def panel(rows: list[dict], key: str, arms: list[str], metric: str, floor: str | None) -> tuple[list, dict]:
    """Groups by ``key`` and one series an arm."""
    groups = list(dict.fromkeys(r[key] for r in rows))
    at = {(r[key], r["arm"]): r for r in rows}
    series = {arm: [value_of(at.get((group, arm)), metric, floor) for group in groups] for arm in arms}
    return groups, {arm: values for arm, values in series.items() if any(v is not None for v in values)}


def plot_kernels(data: dict, stem: str, out: Path) -> list[Path]:
    """Time over the floor, and extra memory, of the anchor shapes (of all where none of them was measured)."""
    rows = device_rows(data["results"])
    rows = in_set(rows, "anchors") or rows
    arms, title, made = tables.arms_of(rows), data["runs"][-1]["device"], []
    for metric, floor, name, label in (
        ("full_ms", "floor_full_ms", "time", "time / floor"),
        ("extra_mib", None, "memory", "extra peak MiB"),
    ):
        panels = []
        for op in dict.fromkeys(r["op"] for r in rows):
            groups, series = panel([r for r in rows if r["op"] == op], "shape", arms, metric, floor)
            if series:
                panels.append((op, label, groups, series, WORST_SHOWN if floor else None, 1.0 if floor else None))
        if panels:
            path = out / f"{stem}-{name}.png"
            heading = (
                "forward + backward over the floor (lower is better)"
                if floor
                else "peak memory over inputs and gradients"
            )
            figure(panels, arms, f"{heading}, {title}", path)
            made.append(path)
    return made


def plot_train(data: dict, stem: str, out: Path) -> list[Path]:
    """Tokens per second and peak memory by model and setting."""
    rows = [r | {"group": f"{r['model']}\n{r['setting']}"} for r in data["results"]]
    arms = tables.arms_of(rows)
    panels = []
    for metric, label in (("tokens_per_s", "tokens / s"), ("peak_allocated_gib", "peak allocated GiB")):
        groups, series = panel(rows, "group", arms, metric, None)
        if series:
            panels.append((label, label, groups, series, None, None))
    if not panels:
        return []
    path = out / f"{stem}.png"
    figure(panels, arms, f"training step, {data['runs'][-1]['device']}", path)
    return [path]


def main(argv: list[str] | None = None) -> int:
    """Draw and write everything; 1 where there are no results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the result files")
    parser.add_argument(
        "--update", type=Path, nargs="*", default=[], metavar="FILE", help="Markdown files with markers"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the tables and do nothing else")
    args = parser.parse_args(argv)
    files = sorted([*args.results.glob("kernels-*.json"), *args.results.glob("train-*.json")])
    if not files:
        print(f"no result files in {args.results}", file=sys.stderr)
        return 1
    made: dict[str, str] = {}
    for file in files:
        data, stem = json.loads(file.read_text()), file.stem
        own = make_tables(stem, data)
        made |= own
        if args.list:
            continue
        sections = [f"## {name}\n\n{text}" for name, text in own.items() if not name.endswith(SETS)]
        file.with_suffix(".md").write_text(f"# {stem}\n\n" + "\n".join(sections))
        draw = plot_train if stem.startswith("train") else plot_kernels
        for path in [file.with_suffix(".md"), *draw(data, stem, args.results)]:
            print(path)
    for file in sorted(args.results.glob("linear-ce-curve-*.json")):
        data = json.loads(file.read_text())
        made[file.stem] = f"{curve.make_table(data)}\n\n{data['device']}; commit {data['run']['commit']}\n"
        if not args.list:
            curve.plot(data, file.with_suffix(".png"))
            print(file.with_suffix(".png"))
    if args.list:
        print("\n".join(made))
        return 0
    for path in args.update:
        update(path, made)
        print(f"{path} updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
