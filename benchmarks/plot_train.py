"""Tables and plots of one result file of the training benchmark."""

import re
from pathlib import Path

from benchmarks import figures, train_tables
from benchmarks.train_arms import ARMS

METRICS = {
    "tokens_per_s": "tokens / s",
    "peak_allocated_gib": "peak allocated, GiB",
    "above_static_gib": "peak above weights, gradients\nand optimizer state, GiB",
}
FURTHER = {
    "gains": train_tables.gains_text,
    "average": train_tables.average_text,
    "growth": train_tables.growth_text,
}


def make_tables(stem: str, data: dict, source: str) -> dict[str, str]:
    """The Markdown tables by name.

    Every row (``stem``), a line a place with all arms (``-brief``), and where there is anything to say those of
    ``FURTHER``: what ours gains over each arm, means over the places, each arm's numbers at both ends of x.
    """
    rows, about = data["results"], data["suite"]
    made = {stem: train_tables.train_text(rows, about, markdown=True) + source}
    made[f"{stem}-brief"] = train_tables.brief_text(rows, about, markdown=True) + source
    for name, make in FURTHER.items():
        if text := make(rows, about, markdown=True):
            made[f"{stem}-{name}"] = text + source
    return made


def value_of(row: dict | None, metric: str) -> float | str | None:
    """A number to draw, ``"oom"``, or None."""
    if row is None or row["status"] == "absent":
        return None
    return "oom" if row["status"] == "oom" else row.get(metric)


def spread_of(row: dict | None, metric: str) -> tuple[float, float] | None:
    """How far the rounds lie below and above the median."""
    values = [r[metric] for r in row["rounds"] if r["status"] == "ok" and r[metric] is not None] if row else []
    if len(values) < 2:
        return None
    return row[metric] - min(values), max(values) - row[metric]


def series_of(rows: list[dict], positions: list, place, metric: str) -> tuple[dict, dict]:
    """By arm, values and spreads at ``positions``; ``place`` says which of them a row is at."""
    at = {(row["arm"], place(row)): row for row in rows}
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    values = {arm: [value_of(at.get((arm, p)), metric) for p in positions] for arm in arms}
    spreads = {arm: [spread_of(at.get((arm, p)), metric) for p in positions] for arm in arms}
    drawn = {arm: own for arm, own in values.items() if any(v is not None for v in own)}
    return drawn, {arm: spreads[arm] for arm in drawn}


def bar_panels(rows: list[dict]) -> list[figures.Panel]:
    """A panel a metric; the groups of bars are the points, and the launches where there are several."""
    several = len({row["launch"] for row in rows}) > 1

    def place(row: dict) -> str:
        name = row["point"].replace(" ", "\n", 1)
        return f"{name}\n{row['launch']}" if several else name

    places, panels = list(dict.fromkeys(place(row) for row in rows)), []
    for metric, label in METRICS.items():
        series, spreads = series_of(rows, places, place, metric)
        if has_numbers(series):

            def draw(axis, series=series, spreads=spreads):
                figures.bars(axis, places, series, spreads=spreads)

            panels.append(figures.Panel(label, label, draw))
    return panels


def line_panels(rows: list[dict], label: str) -> list[list[figures.Panel]]:
    """A row of panels for each model: tokens per second and memory against x, a panel a launch, a line an arm."""
    launches = list(dict.fromkeys(row["launch"] for row in rows))
    # With several launches the row would be too long for all metrics.
    metrics = [m for m in METRICS if any(row.get(m) for row in rows)][: 3 if len(launches) == 1 else 2]
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines.append([])
        for metric in metrics:
            for launch in launches:
                here = [row for row in rows if (row["group"], row["launch"]) == (group, launch)]
                positions = sorted({row["x"] for row in here})
                series, spreads = series_of(here, positions, lambda row: row["x"], metric)

                def draw(axis, positions=positions, series=series, spreads=spreads):
                    figures.lines(axis, label, positions, series, spreads)

                lines[-1].append(figures.Panel(f"{group}, {launch}", METRICS[metric], draw))
    return lines


def has_numbers(series: dict[str, list]) -> bool:
    """Whether any value is a number."""
    return any(isinstance(value, float) for values in series.values() for value in values)


def plot(data: dict, stem: str, out: Path) -> list[Path]:
    """Draw ``stem.png`` into ``out``: lines where x is a number, bars where it is a name. No data, no file."""
    about = data["suite"]
    rows = train_tables.in_order([row for row in data["results"] if row["status"] in ("ok", "oom")], about)
    if not rows:
        return []
    by_name = about["x"]["key"] == "name"
    lines = [bar_panels(rows)] if by_name else line_panels(rows, about["x"]["label"])
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    title = f"{about['title']}\n{device_name(data, rows)}"
    path = out / f"{stem}.png"
    panels, oom = [panel for line in lines for panel in line], any(row["status"] == "oom" for row in rows)
    figures.sheet(panels, arms, title, path, len(lines[0]), oom)
    return [path]


def device_name(data: dict, rows: list[dict]) -> str:
    """The device, with their number where there are several."""
    name = re.sub(r"^NVIDIA ", "", data["runs"][-1]["device"])
    most = max(row["processes"] for row in rows)
    return name if most == 1 else f"{most} x {name}"
