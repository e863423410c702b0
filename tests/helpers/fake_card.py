"""A GPU's memory on the CPU: it counts the bytes of all living tensors and runs out of memory as a GPU does."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_trainer.memory import card
from liger_trainer.memory.card import Reading


class FakeCard(TorchDispatchMode):
    """Counts what is allocated while it is entered.

    Args:
        total: bytes of the card.
        others: bytes that other processes hold.
        resident: tensors that are there before, such as parameters.
    """

    def __init__(self, total: int, others: int = 0, resident=()):
        super().__init__()
        self.total, self.others = total, others
        self.live = self.most = 0
        self.seen = {}
        self.failures = 0
        for tensor in resident:
            self._hold(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        if self.live + size > self.total - self.others:
            self.failures += 1
            raise torch.OutOfMemoryError(f"fake card: {size} bytes do not fit")
        self.seen[key] = weakref.finalize(storage, self._free, key, size)
        self.seen[key].atexit = False
        self.live += size
        self.most = max(self.most, self.live)

    def _free(self, key, size):
        self.seen.pop(key, None)
        self.live -= size

    def read(self):
        return Reading(self.live, self.live, self.total - self.others - self.live, self.total)

    def allocated(self):
        return self.live

    def peak(self):
        return self.most


@pytest.fixture
def put_card(monkeypatch):
    """Let models believe that the CPU is this card; must be called before they are patched."""

    def put(fake):
        monkeypatch.setattr(card, "has_cards", lambda: True)
        monkeypatch.setattr(card, "card_of", lambda device: fake)
        return fake

    return put
