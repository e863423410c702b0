"""Tables and plots of one result file of the kernel benchmark."""

from pathlib import Path

from benchmarks import figures, shapes, tables

SETS = tuple(name for name in shapes.SETS if name != "host")  # host times have tables of their own
WORST_SHOWN = 8.0  # multiples of the floor: bars beyond are cut and carry their number


def device_rows(rows: list[dict]) -> list[dict]:
    """Rows with device times: those of ``--host`` are left out."""
    return [r for r in rows if not r["shape"].endswith(" host")]


def in_set(rows: list[dict], name: str) -> list[dict]:
    """The rows of one set of shapes, in its order."""
    order = {(s["op"], shapes.shape_name(s)): i for i, s in enumerate(shapes.SETS[name])}
    chosen = [r for r in rows if (r["op"], r["shape"]) in order]
    return sorted(chosen, key=lambda r: order[r["op"], r["shape"]])


def make_tables(stem: str, data: dict, source: str) -> dict[str, str]:
    """Every Markdown table of the file, by name; ``source`` is put under each."""
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


def value_of(row: dict | None, metric: str, floor: str | None) -> float | None:
    """A number to draw, or None."""
    if row is None or row.get(metric) is None:
        return None
    return row[metric] / row[floor] if floor else row[metric]


def panel(op: str, rows: list[dict], arms: list[str], metric: str, floor: str | None) -> figures.Panel | None:
    """The bars of one op; None where nothing was measured."""
    groups = list(dict.fromkeys(r["shape"] for r in rows))
    at = {(r["shape"], r["arm"]): r for r in rows}
    series = {arm: [value_of(at.get((group, arm)), metric, floor) for group in groups] for arm in arms}
    series = {arm: values for arm, values in series.items() if any(v is not None for v in values)}
    if not series:
        return None
    label, cut, line = ("time / floor", WORST_SHOWN, 1.0) if floor else ("extra peak MiB", None, None)
    return figures.Panel(op, label, lambda axis: figures.bars(axis, groups, series, cut), line)


def plot(data: dict, stem: str, out: Path) -> list[Path]:
    """Time over the floor, and extra memory, of the anchor shapes (of all where none of them was measured)."""
    rows = device_rows(data["results"])
    rows = in_set(rows, "anchors") or rows
    arms, title, made = tables.arms_of(rows), data["runs"][-1]["device"], []
    for metric, floor, name, heading in (
        ("full_ms", "floor_full_ms", "time", "forward + backward over the floor (lower is better)"),
        ("extra_mib", None, "memory", "peak memory over inputs and gradients"),
    ):
        ops = dict.fromkeys(r["op"] for r in rows)
        panels = [panel(op, [r for r in rows if r["op"] == op], arms, metric, floor) for op in ops]
        panels = [one for one in panels if one is not None]
        if panels:
            path = out / f"{stem}-{name}.png"
            figures.sheet(panels, arms, f"{heading}, {title}", path)
            made.append(path)
    return made
