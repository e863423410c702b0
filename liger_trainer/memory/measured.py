"""What is measured of a model's layers, and what tells that it has to be measured again."""

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..probing.probe import full_shape, submodules

USES_OF_WALK = 32  # forwards after which parameters that were added are seen at the latest


@dataclass(frozen=True)
class Size:
    """Bytes, and the number of tokens at which they were measured."""

    size: int
    tokens: int

    def at(self, tokens: int) -> float:
        """The bytes for another number of tokens."""
        return self.size * tokens / self.tokens

    def at_least(self, tokens: int) -> float:
        """The bytes for another number of tokens; not fewer than measured, because a part may not depend on tokens."""
        return self.size * max(1.0, tokens / self.tokens)


@dataclass
class Measured:
    """Sizes of one model's layers. They hold for one ``signature``.

    Args:
        signature: As ``Parameters`` gives it.
        kinds: The kind of each layer, by index. Layers of one kind keep equally many bytes.
        kept: What a layer of a kind adds if it keeps its activations, in the last batch in which one did.
        first: What the first layer, which is measured in nearly every batch, had added until then.
        recomputed: What a layer adds if it recomputes them.
        head: What the model holds at the end of its forward on top of the layers, for the most tokens so far.
        widest: Bytes of the largest layer's parameters, unsharded.
    """

    signature: Hashable = None
    kinds: dict[int, Hashable] = field(default_factory=dict)
    kept: dict[Hashable, Size] = field(default_factory=dict)
    first: dict[Hashable, Size] = field(default_factory=dict)
    recomputed: Size | None = None
    head: Size | None = None
    widest: int = 0

    def knows(self, count: int) -> bool:
        """Whether each of ``count`` layers is of a kind that was measured."""
        return len(self.kinds) == count and all(kind in self.kept for kind in self.kinds.values())

    def note_layer(self, index: int, layer: nn.Module) -> Hashable:
        """The kind of a layer."""
        if index not in self.kinds:
            parts = ((type(m), *map(_description, m._parameters.values())) for m in submodules(layer))
            self.kinds[index] = tuple(parts)
            self.widest = max(self.widest, sum(full_shape(p).numel() * p.element_size() for p in layer.parameters()))
        return self.kinds[index]

    def note_kept(self, kind: Hashable, size: Size) -> None:
        """What a layer of a kind has added."""
        self.kept[kind] = size
        self.first[kind] = self.kept.get(self.kinds[0], size)

    def size_of(self, index: int, tokens: int) -> float:
        """What a layer adds to a batch if it keeps its activations.

        If the first layer keeps more of each token than when this kind was measured, as with longer rows and attention
        that keeps its probabilities, then this one does as well. A kind that is not known is taken for the first.
        """
        own = self.kinds[0]
        kind = self.kinds.get(index, own)
        if kind not in self.kept:
            kind = own
        size = self.kept[kind].at(tokens)
        then = self.first[kind].at(tokens)
        return size * max(1.0, self.kept[own].at(tokens) / then) if kind != own and then else size

    def note_head(self, size: int, tokens: int) -> None:
        """What the model holds on top of its layers."""
        if self.head is None or tokens >= self.head.tokens:
            self.head = Size(size, tokens)


def _description(parameter: Tensor | None) -> Hashable:
    if parameter is None:
        return None
    return full_shape(parameter), parameter.dtype, parameter.requires_grad


class Parameters:
    """One walk over a model's parameters, which takes milliseconds with adapters and so is kept while it ``holds``.

    Attributes:
        signature: Which parameters there are, of which dtype, and which of them are trained.
        trained: Bytes of those that are trained, of which this process holds a shard.
        is_sharded: Whether using them takes all processes (FSDP2, ZeRO-3).
        is_partitioned: Whether ZeRO-3 holds them.
    """

    def __init__(self, model: nn.Module):
        parameters = {p for module in submodules(model) for p in module._parameters.values() if p is not None}
        described = sum(hash(_description(p)) for p in parameters)  # a set has no order
        self.signature = (len(parameters), described)
        self.trained = sum(_bytes_here(p) for p in parameters if p.requires_grad)
        self.is_partitioned = any(hasattr(p, "ds_id") for p in parameters)
        self.is_sharded = self.is_partitioned or any(isinstance(p, DTensor) for p in parameters)
        self._seen = [(weakref.ref(p), p.requires_grad, p.dtype) for p in parameters]
        self._uses = 0

    def holds(self) -> bool:
        """Whether all are still there, trained or frozen as before. A new walk is due now and then for more."""
        self._uses += 1
        if self._uses >= USES_OF_WALK:
            return False
        seen = ((ref(), trained, dtype) for ref, trained, dtype in self._seen)
        return all(p is not None and p.requires_grad == trained and p.dtype == dtype for p, trained, dtype in seen)

    def have_gradients(self) -> bool:
        """Whether any of them has a gradient."""
        trained = (ref() for ref, is_trained, _ in self._seen if is_trained)
        return any(p is not None and p.is_leaf and p.grad is not None for p in trained)  # FSDP1 has views


def _bytes_here(parameter: Tensor) -> int:
    """Bytes of a parameter, or of this process's shard of it."""
    local = getattr(parameter, "ds_tensor", None)
    if local is None:
        local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    return local.numel() * parameter.element_size()


def head_shape(head: nn.Module | None, config: Any) -> tuple[int, int]:
    """Rows and columns of a model's head. Several heads, a flat shard (FSDP1) or a quantised weight do not tell."""
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and len(full_shape(weight)) == 2:
        vocabulary, width = full_shape(weight)
        return vocabulary, width
    config = config.get_text_config()
    return (0, 0) if head is None else (getattr(config, "vocab_size", 0), getattr(config, "hidden_size", 0))
