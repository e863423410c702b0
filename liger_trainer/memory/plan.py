"""How many layers must recompute their activations so that a batch fits: arithmetic on bytes, nothing else."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What one forward and backward take, in bytes.

    Args:
        allocated: In tensors before the first layer runs: weights, optimizer state, gradients so far, the batch.
        kept: What each layer adds until its backward if it keeps its activations.
        recomputed: What it adds if it recomputes them: its output.
        head: What stands above the layers and is kept until backward, such as the gradient of the hidden states.
        head_transient: The most that the head needs for a moment, such as a chunk of logits.
        gradients: Gradients of parameters that do not exist yet.
        gathered: Sharded weights, and their gradients, that an engine holds whole for a moment.
    """

    allocated: float
    kept: Sequence[float]
    recomputed: Sequence[float]
    head: float = 0
    head_transient: float = 0
    gradients: float = 0
    gathered: float = 0


def peak(costs: Costs, recomputed: Collection[int]) -> float:
    """The most bytes in tensors at once if the layers in ``recomputed`` recompute their activations.

    The peak is in the head or in the backward of a layer. Going backwards, each layer frees what it kept and adds its
    share of the gradients. While its backward runs, it needs once more what it keeps, for the gradients of its
    activations. If it recomputes, its activations are there for that time as well.
    """
    count, layer = len(costs.kept), max(costs.kept)
    held = [costs.recomputed[i] if i in recomputed else costs.kept[i] for i in range(count)]
    live = costs.allocated + sum(held) + costs.head
    most = live + costs.head_transient
    for i in reversed(range(count)):
        again = costs.kept[i] if i in recomputed else 0
        most = max(most, live + layer + again)
        live += costs.gradients / count - held[i]
    return max(most, live) + costs.gathered


def layers_to_recompute(costs: Costs, budget: float, order: Sequence[int]) -> frozenset[int]:
    """The fewest layers, from the start of ``order``, that must recompute so that the peak is within ``budget``.

    All whose recomputation frees anything, if the peak is above the budget even then.
    """
    useful = [i for i in order if costs.kept[i] > costs.recomputed[i]]
    low, high = 0, len(useful)
    while low < high:
        middle = (low + high) // 2
        if peak(costs, frozenset(useful[:middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    return frozenset(useful[:low])
