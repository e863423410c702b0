"""What a GPU's memory holds at this moment. Nothing here waits for the GPU."""

from typing import NamedTuple, Protocol

import torch


class Reading(NamedTuple):
    """The memory of one device, in bytes.

    Args:
        allocated: In tensors of this process.
        reserved: Taken by this process's allocator; tensors and what they have left.
        free: What the allocator could still take.
        total: The size of the device.
        retries: How often the allocator had to give its unused memory back to get a block.
    """

    allocated: int
    reserved: int
    free: int
    total: int
    retries: int = 0


class Card(Protocol):
    """A device whose memory can be read."""

    def read(self) -> Reading:
        """All of it."""
        ...

    def allocated(self) -> int:
        """Bytes in tensors now."""
        ...

    def peak(self) -> int:
        """The most bytes that were in tensors at once."""
        ...


class CudaCard:
    """A CUDA device, as PyTorch's allocator and the driver see it."""

    def __init__(self, device: torch.device):
        self.device = device

    def read(self) -> Reading:
        """All of it. ``torch.cuda.set_per_process_memory_fraction`` makes the device smaller."""
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = stats["reserved_bytes"]["all"]["current"]
        allowed = int(torch.cuda.get_per_process_memory_fraction(self.device) * total)
        allocated = stats["allocated_bytes"]["all"]["current"]
        free, total = min(free, allowed - reserved), min(total, allowed)
        return Reading(allocated, reserved, free, total, stats["num_alloc_retries"])

    def allocated(self) -> int:
        """Bytes in tensors now."""
        return torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]["current"]

    def peak(self) -> int:
        """The most bytes that were in tensors at once, since training or someone else reset the count."""
        return torch.cuda.max_memory_allocated(self.device)


def card_of(device: torch.device) -> Card | None:
    """The device's memory; ``None`` if it is not a GPU's."""
    return CudaCard(device) if device.type == "cuda" else None


def has_cards() -> bool:
    """Whether any device of this process has a memory that can be read."""
    return torch.cuda.is_available()
