"""How much one row of the training benchmark is above or below another one at the same place."""

import statistics


def change(row: dict, base: dict | None, metric: str) -> float | None:
    """``row``'s metric over that of ``base``, minus one; None where one of them has none or both are the same row.

    The median over the rounds that both have, so that a machine that was slower in one round changes nothing; of the
    rows' medians where they have none in common.
    """
    if base is None or base is row or not row.get(metric) or not base.get(metric):
        return None
    changes = changes_by_round(row, base, metric)
    return statistics.median(changes) if changes else row[metric] / base[metric] - 1


def changes_by_round(row: dict, base: dict, metric: str) -> list[float]:
    """``change`` of each round that the two rows have side by side: the first of one run with the first of it, ..."""
    runs = [round_.get("run") for round_ in row["rounds"]]
    pairs = []
    for run in (run for i, run in enumerate(runs) if run not in runs[:i]):
        own, theirs = ([r.get(metric) for r in each["rounds"] if r.get("run") == run] for each in (row, base))
        pairs += [(a, b) for a, b in zip(own, theirs, strict=False) if a and b]  # None: out of memory
    return [a / b - 1 for a, b in pairs]


def percent(value: float | None) -> str | None:
    """A change with its sign."""
    return None if value is None else f"{value:+.1%}"


def percent_and_range(row: dict, base: dict | None, metric: str) -> str | None:
    """``change``, and the smallest and the largest one of a round."""
    value = percent(change(row, base, metric))
    rounds = [] if value is None else changes_by_round(row, base, metric)
    return f"{value} ({100 * min(rounds):+.1f} to {100 * max(rounds):+.1f})" if len(rounds) > 1 else value
