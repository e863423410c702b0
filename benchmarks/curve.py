"""Table and plot of the time and memory curve of ``linear_cross_entropy`` (``experiments/linear_ce_curve.py``)."""

from pathlib import Path

from benchmarks.common import text_table

# What a user can choose; the result file also has the ideas that are not in the product.
SETTINGS = {
    "low_memory": "low_memory",
    "chunks 256": "logits_budget_mib=256",
    "chunks 512": "default (512)",
    "chunks 1024": "logits_budget_mib=1024",
    "chunks 2048": "logits_budget_mib=2048",
}


def shape_name(shape: dict) -> str:
    """As in the other tables."""
    return f"BT{shape['tokens']} H{shape['hidden']} V{shape['vocab']}"


def make_table(data: dict) -> str:
    """Milliseconds, multiple of the three GEMMs alone, and MiB over the gradients, a shape a row."""
    rows = []
    for shape in data["shapes"]:
        known = {v["name"]: v for v in shape["variants"] if "ms" in v}
        cells = [
            f"{v['ms']:.1f} ms ({v['ratio']:.2f}x), {v['extra_mib']:.0f} MiB" if (v := known.get(name)) else "-"
            for name in SETTINGS
        ]
        rows.append([shape_name(shape), f"{shape['floor_ms']['3']:.1f} ms", *cells])
    return text_table(["shape", "3 GEMMs", *SETTINGS.values()], rows, markdown=True)


def plot(data: dict, path: Path) -> None:
    """Time over the three GEMMs against extra memory: one line a shape, a point a setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(11, 5))
    for shape in data["shapes"]:
        known = {v["name"]: v for v in shape["variants"] if "ms" in v}
        points = [known[name] for name in SETTINGS if name in known]
        axis.plot([p["extra_mib"] for p in points], [p["ratio"] for p in points], marker="o", label=shape_name(shape))
    axis.axhline(1.0, color="black", linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("MiB over the gradients (low_memory, then logits budgets of 256, 512, 1024, 2048 MiB)")
    axis.set_ylabel("forward + backward / three GEMMs")
    axis.set_title(f"linear_cross_entropy, {data['device']}")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
