"""What patching did: records for programs, and a table for people."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO


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
    """The result of ``apply_liger``. ``str(report)`` is a table."""

    applied: list[Applied] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Number of replacements by kind."""
        return dict(Counter(record.kind for record in self.applied))

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title="liger_trainer", title_justify="left", pad_edge=False)
        for column in ("kind", "count", "module", "class", "applied as / why not"):
            table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for row in _grouped(self.applied, "variant"):
            table.add_row(*row)
        for kind, count, module, cls, reason in _grouped(self.skipped, "reason"):
            table.add_row(kind, count, module, cls, f"skipped: {reason}")
        if not table.row_count:
            table.add_row("-", "0", "-", "-", "nothing to replace was found")
        out = StringIO()
        Console(file=out, width=120, color_system=None).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def _grouped(records: Sequence[Applied | Skipped], text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows (kind, count, module pattern, class, text). Layers that differ only in their index share a row."""
    groups: dict[tuple, int] = Counter(
        (r.kind, ".".join("*" if part.isdigit() else part for part in r.module.split(".")), r.cls, getattr(r, text))
        for r in records
    )
    for (kind, module, cls, what), count in groups.items():
        yield kind, str(count), module, cls, what
