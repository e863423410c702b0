"""Result rows as tables: plain text for the terminal, Markdown for the README."""

import statistics

from benchmarks.common import format_number, text_table
from benchmarks.shapes import OPS

KERNEL_METRICS = {"full_ms": "forward + backward, ms", "fwd_ms": "forward, ms", "bwd_ms": "backward, ms"}
LABELS = {
    "ours": "liger_trainer",
    "ours_low_memory": "liger_trainer, low_memory",
    "hf": "HF eager",
    "torch": "PyTorch op",
    "compile": "torch.compile",
    "ours_compile": "liger_trainer + torch.compile",
    "liger": "liger-kernel",
    "liger_fp32": "liger-kernel, fp32 dW",
    "trl": "TRL",
    "cce": "CCE",
    "trl_head": "TRL head",
    "liger_trl_head": "liger-kernel + TRL head",
}


def _unique(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def arms_of(rows: list[dict]) -> list[str]:
    """Arms with at least one measurement, in the order of ``LABELS``."""
    present = {row["arm"] for row in rows if row["status"] in ("ok", "inexact", "oom")}
    return [arm for arm in LABELS if arm in present]


def _cell(row: dict | None, metric: str, floor: str | None) -> str:
    if row is None:
        return "-"
    if row["status"] in ("oom", "error", "dropped"):
        return {"oom": "OOM"}.get(row["status"], row["status"])
    value = row.get(metric)
    text = format_number(value)
    if value is not None and floor and row.get(floor):
        text += f" ({value / row[floor]:.2f}x)"
    return text + ("~" if row["status"] == "inexact" else "")


def pivot(rows: list[dict], metric: str, floor: str | None = None, markdown: bool = False) -> str:
    """One line a shape, one column an arm; in brackets the multiple of the floor. ``~``: failed the accuracy check."""
    rows = [r for r in rows if r["status"] not in ("absent", "unsupported")]
    arms = arms_of(rows)
    lines = []
    for op, shape in sorted(dict.fromkeys((r["op"], r["shape"]) for r in rows), key=lambda k: OPS.index(k[0])):
        here = {r["arm"]: r for r in rows if (r["op"], r["shape"]) == (op, shape)}
        if not any(r.get(metric) is not None for r in here.values()):
            continue
        first = [f"{op} {shape}"]
        if floor:
            floors = [r[floor] for r in here.values() if r.get(floor)]
            first.append(statistics.median(floors) if floors else None)
        lines.append(first + [_cell(here.get(arm), metric, floor) for arm in arms])
    header = ["op"] + (["floor"] if floor else []) + [LABELS[a] if markdown else a for a in arms]
    return text_table(header, lines, markdown) if lines else ""


def _absent(rows: list[dict]) -> str:
    names = _unique([r for r in rows if r["status"] == "absent"], "arm")
    return f"absent: {', '.join(names)}" if names else ""


def kernels_text(rows: list[dict]) -> str:
    """What the kernel benchmark prints at its end."""
    if any("host_us" in r for r in rows):
        fields = ("host_us", "host_launch_us", "host_autograd_us", "host_full_us")
        lines = [[f"{r['op']} {r['shape']} {r['arm']}", *(r.get(f) for f in fields)] for r in rows if "host_us" in r]
        return text_table(["host us", "no grad", "bare launches", "autograd", "with backward"], lines)
    parts = []
    for metric, title in KERNEL_METRICS.items():
        table = pivot(rows, metric, f"floor_{metric}")
        parts.append(f"{title} (multiple of the floor)\n{table}" if table else "")
    memory = pivot(rows, "extra_mib")
    parts.append(f"extra peak memory, MiB\n{memory}" if memory else "")
    parts.append(_absent(rows))
    return "\n\n".join(p for p in parts if p)
