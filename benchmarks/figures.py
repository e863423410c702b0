"""Bars, lines and the sheet of panels that all plots of results are drawn on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import LABELS

COLORS = {
    "ours": "#d1495b",
    "ours_compile": "#8c1c2e",
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


@dataclass(frozen=True)
class Panel:
    """One set of axes: ``draw`` puts the data on it; ``line`` is the height of a dashed reference line."""

    title: str
    label: str
    draw: Callable
    line: float | None = None


def frame(axis) -> None:
    """A light grid and no box."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)


def bars(axis, groups: list[str], series: dict[str, list], cut: float | None = None, spreads: dict | None = None):
    """Grouped bars, one colour an arm; ``None`` leaves a gap; ``"oom"`` is an x on the axis.

    Args:
        axis: of matplotlib.
        groups: names under the bars.
        series: by arm, one value a group.
        cut: bars over it are cut and carry their number.
        spreads: by arm, one (below, above) or None a group: error bars.
    """
    width = 0.8 / max(len(series), 1)
    for index, (arm, values) in enumerate(series.items()):
        for group, value in enumerate(values):
            x = group + (index - (len(series) - 1) / 2) * width
            if value is None:
                continue
            if value == "oom":
                mark_oom(axis, x, arm)
                continue
            shown = value if cut is None else min(value, cut)
            axis.bar(x, shown, width * 0.92, color=COLORS[arm])
            if shown < value:
                axis.annotate(f"{value:.0f}", (x, shown), ha="center", va="bottom", fontsize=6)
            if spreads and spreads[arm][group]:
                axis.errorbar(
                    x, shown, [[part] for part in spreads[arm][group]], color="black", linewidth=0.8, capsize=2
                )
    slanted = {"rotation": 20, "ha": "right"} if len(groups) > 2 else {}
    axis.set_xticks(range(len(groups)), groups, fontsize=7, **slanted)
    frame(axis)


def lines(axis, label: str, positions: list, series: dict[str, list], spreads: dict) -> None:
    """One line an arm against evenly spaced ``positions``; ``"oom"`` is an x on the axis and ends the line.

    The last lines lie lowest and are the widest, so that those which coincide are all seen.

    Args:
        axis: of matplotlib.
        label: what the positions are.
        positions: the values of x, in order.
        series: by arm, one value, ``"oom"`` or None a position.
        spreads: by arm, one (below, above) or None a position.
    """
    offsets = {arm: (index - (len(series) - 1) / 2) * 0.06 for index, arm in enumerate(series)}  # x marks side by side
    for depth, (arm, values) in enumerate(sorted(series.items(), key=lambda item: not item[0].startswith("ours"))):
        points = [(i, v) for i, v in enumerate(values) if v is not None and v != "oom"]
        around = [spreads[arm][i] or (0, 0) for i, _ in points]
        if points:
            axis.errorbar(*zip(*points, strict=True), yerr=list(zip(*around, strict=True)), color=COLORS[arm],
                          marker="o", markersize=3.5 + 1.3 * depth, linewidth=1.4 + 0.7 * depth, elinewidth=1.2,
                          capsize=2, zorder=3 - 0.1 * depth)  # fmt: skip
        for i, value in enumerate(values):
            if value == "oom":
                mark_oom(axis, i + offsets[arm], arm)
    axis.set_xticks(range(len(positions)), [str(p) for p in positions], fontsize=8)
    axis.set_xlim(-0.4, len(positions) - 0.6)
    axis.set_xlabel(label, fontsize=8)
    tops = [v + (spreads[arm][i] or (0, 0))[1] for arm, values in series.items() for i, v in enumerate(values)
            if isinstance(v, float)]  # fmt: skip
    axis.set_ylim(0, 1.08 * max(tops, default=1.0))
    frame(axis)


def mark_oom(axis, x: float, arm: str) -> None:
    """An x on the axis: out of memory."""
    at_the_bottom = axis.get_xaxis_transform()
    axis.plot([x], [0.0], marker="x", color=COLORS[arm], markersize=8, markeredgewidth=2, transform=at_the_bottom,
              clip_on=False, zorder=5)  # fmt: skip


def sheet(panels: list[Panel], arms: list[str], title: str, path: Path, columns: int = 3, oom: bool = False) -> None:
    """Draw panels over a common legend and save them as PNG; ``oom``: explain the x in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    drawn, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel.draw(axis)
        axis.set_title(panel.title, fontsize=9)
        axis.set_ylabel(panel.label, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        if panel.line is not None:
            axis.axhline(panel.line, color="black", linewidth=0.8, linestyle="--")
    legend = [Patch(color=COLORS[arm], label=LABELS[arm]) for arm in arms]
    if oom:
        legend.append(Line2D([], [], marker="x", color="black", linestyle="", label="out of memory"))
    drawn.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 6), fontsize=8, frameon=False)
    drawn.suptitle(title, fontsize=10)
    drawn.savefig(path, dpi=150)
    pyplot.close(drawn)
