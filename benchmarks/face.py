"""The picture of the README: real tokens per second and peak memory of the arms that people compare, from results."""

import json
import re
from pathlib import Path

from benchmarks import tables
from benchmarks.peers import PEERS

SUITES = ("padded_rows", "step_1b")  # the first that has results; both measure whole training steps on one GPU
ARMS = ("hf", "liger", "unsloth", "ours")
PANELS = {"tokens_per_s": "real tokens per second", "peak_allocated_gib": "peak memory, GiB"}
MODELS = 2  # the first ones that both HF and ours have


def chosen(folder: Path) -> tuple[dict, dict[str, dict[str, dict]]] | None:
    """The result file, and its rows by model and arm; ``None`` if no suite has both HF and ours for a model."""
    for suite in SUITES:
        for file in sorted(folder.glob(f"train-{suite}-*.json")):
            data = json.loads(file.read_text())
            models: dict[str, dict[str, dict]] = {}
            for row in tables.Training(data["results"], data["suite"]).rows:
                if row["status"] in ("ok", "oom") and row["arm"] in ARMS:
                    models.setdefault(row["point"], {})[row["arm"]] = row
            full = {name: r for name, r in models.items() if "hf" in r and r.get("ours", {}).get("status") == "ok"}
            if full:
                return data, dict(list(full.items())[:MODELS])
    return None


def draw(folder: Path, path: Path) -> bool:
    """Draw horizontal bars with their numbers, at the width of a README. False without results."""
    from matplotlib.figure import Figure

    found = chosen(folder)
    if found is None:
        return False
    data, models = found
    arms = [arm for arm in ARMS if any(arm in rows for rows in models.values())]
    figure = Figure(figsize=(8.4, 0.9 + 0.36 * len(models) * (len(arms) + 1)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        most = max(row[metric] for rows in models.values() for row in rows.values() if row["status"] == "ok")
        marks: list[float] = []
        for group, rows in enumerate(models.values()):
            for index, arm in enumerate(arms):
                place = group * (len(arms) + 1) + index
                if arm in rows and rows[arm]["status"] == "oom":
                    axis.text(most / 60, place, "out of memory", va="center", fontsize=10, color=PEERS[arm].color)
                elif arm in rows:
                    value = rows[arm][metric]
                    axis.barh(place, value, 0.82, color=PEERS[arm].color)
                    text = f"{value:,.0f}" if metric == "tokens_per_s" else f"{value:.1f}"
                    axis.text(value + most / 60, place, text, va="center", fontsize=10)
            marks.append(group * (len(arms) + 1) + (len(arms) - 1) / 2)
        axis.set_xlim(0, 1.17 * most)
        axis.set_xticks([])
        axis.set_yticks(marks, [name.replace(" ", "\n", 1) for name in models], fontsize=10)
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_title(title, fontsize=11, loc="left")
    axes[0].invert_yaxis()
    handles = [axes[0].barh(0, 0, color=PEERS[arm].color, label=PEERS[arm].label) for arm in arms]
    device = re.sub(r"^NVIDIA ", "", data["runs"][-1]["device"])
    title = f"{data['suite']['title']}, one {device}"
    figure.legend(handles=handles, loc="outside lower center", ncols=len(arms), fontsize=10, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=160)
    return True
