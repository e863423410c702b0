"""What patching did: records for programs, and a table for people."""

import dataclasses
import html
import logging
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)
COLUMNS = ("kind", "count", "module", "class", "applied as / why not")
WIDTH = 120


@dataclass(frozen=True)
class Applied:
    """One replacement.

    Args:
        kind: One of ``config.KINDS``.
        module: Name of the module; empty for the model itself.
        cls: Name of its class.
        variant: The form of our op that agreed with the module.
    """

    kind: str
    module: str
    cls: str
    variant: str


@dataclass(frozen=True)
class Skipped:
    """One candidate that was left as it is, and the ``reason``; the other fields are those of ``Applied``."""

    kind: str
    module: str
    cls: str
    reason: str


@dataclass
class LigerReport:
    """The result of ``apply_liger``. ``str(report)`` is a table, and so is a report in a notebook.

    Args:
        applied: What was replaced.
        skipped: What was requested and not replaced.
        none_here: Kinds that were requested and of which the model has none.
        ran: After training with the Trainer, in how many of its steps each applied kind did its work. Counted in the
            kernels' own forwards.
    """

    applied: list[Applied] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    none_here: list[str] = field(default_factory=list)
    ran: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of replacements by kind."""
        return dict(Counter(record.kind for record in self.applied))

    def kinds(self) -> set[str]:
        """The kinds of which there is a replacement or a candidate."""
        return {record.kind for record in (*self.applied, *self.skipped)}

    def withdraw(self, applied: Applied, reason: str) -> None:
        """Turn a replacement into a skipped candidate, for what shows only when the model runs."""
        if applied in self.applied:
            self.applied.remove(applied)
            self.skipped.append(Skipped(applied.kind, applied.module, applied.cls, reason))
            logger.warning("liger_trainer: %s of %s does not act: %s", applied.kind, applied.cls, reason)

    def restate(self, applied: Applied, variant: str) -> None:
        """Give a replacement another ``variant``, for what shows only when the model runs."""
        place = (applied.kind, applied.module)
        self.applied[:] = [
            dataclasses.replace(a, variant=variant) if (a.kind, a.module) == place else a for a in self.applied
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts and lists, for JSON."""
        return {**dataclasses.asdict(self), "counts": self.counts}

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield from _grouped(self.applied, "variant")
        for *cells, reason in _grouped(self.skipped, "reason"):
            yield *cells, f"skipped: {reason}"
        for kind in self.none_here:
            yield kind, "0", "", "", "none here"

    def __str__(self) -> str:
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
        wrap = textwrap.TextWrapper(
            width=max(40, WIDTH - sum(widths) - 2 * len(widths)), break_long_words=False, break_on_hyphens=False
        )
        lines = []
        for *cells, last in rows:
            cells = [f"{cell:{'>' if i == 1 else '<'}{widths[i]}}" for i, cell in enumerate(cells)]
            for text in wrap.wrap(last):
                lines.append("  ".join([*cells, text]))
                cells = [" " * w for w in widths]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join(["liger_trainer", *lines])

    def _repr_html_(self) -> str:
        """The table as Jupyter shows it."""
        left = 'style="text-align: left"'  # notebooks align to the right
        rows = ["".join(f"<td {left}>{html.escape(cell)}</td>" for cell in row) for row in self._rows()]
        head = "".join(f"<th {left}>{column}</th>" for column in COLUMNS)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _grouped(records: Sequence[Applied | Skipped], text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows (kind, count, module pattern, class, text). Layers that differ only in their index share a row."""
    groups: dict[tuple, int] = Counter(
        (r.kind, ".".join("*" if part.isdigit() else part for part in r.module.split(".")), r.cls, getattr(r, text))
        for r in records
    )
    for (kind, module, cls, what), count in groups.items():
        yield kind, str(count), module, cls, what
