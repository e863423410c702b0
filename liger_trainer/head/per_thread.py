"""State of a running forward. Each thread has its own, so that several threads can use one model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class _Slot:
    """Holds one value. torch.compile can trace writes to this, but not to a ``threading.local``."""

    def __init__(self) -> None:
        self.value: Any = None


class PerThread(threading.local):
    """A value that each thread has for itself, ``None`` until it is set. Copies and pickles start without one."""

    def __init__(self) -> None:
        self.slot = _Slot()

    def __reduce__(self) -> tuple[type["PerThread"], tuple[()]]:
        return PerThread, ()


_LOSS_ONLY = PerThread()


@contextmanager
def loss_only() -> Iterator[None]:
    """Say that nobody will read the logits of the forwards that this thread runs in this context."""
    before, _LOSS_ONLY.slot.value = _LOSS_ONLY.slot.value, True
    try:
        yield
    finally:
        _LOSS_ONLY.slot.value = before


def wants_loss_only() -> bool:
    """Whether this thread is in ``loss_only``."""
    return _LOSS_ONLY.slot.value is True


@dataclass(frozen=True)
class Reading:
    """What is read of a forward's hidden states: those that predict a labelled token, and none at padding.

    Args:
        labels: ``[batch, tokens]``; ``None`` if they are not known.
        lookahead: How many tokens ahead a hidden state predicts at most.
    """

    labels: Tensor | None = None
    lookahead: int = 1


_READING = PerThread()


def set_reading(reading: Reading | None) -> None:
    """Say what is read of the forwards that this thread runs from now on; ``None``: perhaps everything."""
    _READING.slot.value = reading


def reading() -> Reading | None:
    """What is read of the forward that this thread runs, if it is known that padding is not."""
    return _READING.slot.value or (Reading() if wants_loss_only() else None)
