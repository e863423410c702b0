"""``linear_splade`` in a SparseEncoder of sentence-transformers: the logits of its masked language model are not built.

The vocabulary projection of the language model hands its hidden states on while the encoder's Transformer module runs,
and the SpladePooling module computes the pooled scores from them. Everything else is sentence-transformers' own.
"""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .head.fused_head import is_plain
from .head.per_thread import PerThread
from .kernels.linear_splade import linear_splade
from .patching import core_model
from .probing.rebinding import ModuleRef

_STATE = "_liger_splade"


class HiddenProjection:
    """Makes vocabulary projections return their input where that is wanted. It holds no module."""

    def __init__(self) -> None:
        self._active = PerThread()

    def replace(self, projection: nn.Linear) -> None:
        """Let ``project`` take the place of the forward of ``projection``."""
        projection.forward = functools.partial(self.project, ModuleRef(projection))

    def before(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a module in which it is wanted."""
        self._active.slot.value = True

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of that module."""
        self._active.slot.value = None

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """Return hidden states in this context."""
        self._active.slot.value = True
        try:
            yield
        finally:
            self._active.slot.value = None

    def project(self, projection: ModuleRef, input: Tensor) -> Tensor:
        """The projection's forward."""
        return input if self._active.slot.value else nn.Linear.forward(projection(), input)


class _Head(HiddenProjection):
    """The settings of one encoder; its methods are hooks and replacements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls_fused = 0

    def pool(self, projection_ref: ModuleRef, pooling_ref: ModuleRef, features: dict[str, Any]) -> dict[str, Any]:
        """SpladePooling's forward, of hidden states."""
        projection, pooling = projection_ref(), pooling_ref()
        hidden, mask = features["token_embeddings"], features.get("attention_mask")
        if "cu_seq_lens_q" in features:  # sequences in one row
            bounds = features["cu_seq_lens_q"].tolist()
            rows = [hidden[0, start:end] for start, end in itertools.pairwise(bounds)]
            hidden = pad_sequence(rows, batch_first=True)
            mask = pad_sequence([torch.ones_like(row[:, 0]) for row in rows], batch_first=True)
        self.calls_fused += 1
        scores = linear_splade(
            hidden, projection.weight, projection.bias, mask, pooling=pooling.pooling_strategy,
            activation=pooling.activation_function,
        )  # fmt: skip
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if pooling.embedding_dimension is None:
            pooling.embedding_dimension = scores.shape[1]
        return features | {"sentence_embedding": scores.to(dtype)}


def apply_splade(model: nn.Module) -> None:
    """Let a SparseEncoder compute its embeddings without logits; nothing else in the process changes.

    Call it before training, on the model that ``SparseEncoderTrainer`` gets. ``apply_liger`` replaces the layers of the
    same model. Calling it twice has no further effect.

    Args:
        model: A ``SparseEncoder`` of a Transformer module with the task ``fill-mask`` and a SpladePooling module.

    Raises:
        ValueError: It has another structure, or does more with its logits than pool them. It is left as it was.
    """
    if hasattr(model, _STATE):
        return
    transformer, pooling, projection = _parts(model)
    expected = _embeddings(transformer, pooling)
    head = _Head()
    handles = [
        transformer.register_forward_pre_hook(head.before),
        transformer.register_forward_hook(head.after, always_call=True),
    ]
    head.replace(projection)
    pooling.forward = functools.partial(head.pool, ModuleRef(projection), ModuleRef(pooling))
    setattr(model, _STATE, (head, handles, projection, pooling))
    try:
        error = (_embeddings(transformer, pooling) - expected).abs().max()
        if not error <= 0.02 * expected.abs().max() + 1e-3:
            raise ValueError(f"model: got embeddings that differ by {error:.2g}; must be those of the pooled logits")
    except BaseException:
        revert_splade(model)
        raise
    head.calls_fused = 0


def revert_splade(model: nn.Module) -> None:
    """Undo ``apply_splade``; no-op if it was not called."""
    if not hasattr(model, _STATE):
        return
    _, handles, projection, pooling = getattr(model, _STATE)
    for handle in handles:
        handle.remove()
    del projection.forward, pooling.forward
    delattr(model, _STATE)


def _parts(model: nn.Module) -> tuple[nn.Module, Any, nn.Linear]:
    """``(Transformer, SpladePooling, vocabulary projection)``."""
    children = list(model.children())
    names = [type(child).__name__ for child in children]
    core = core_model(model)
    if len(children) != 2 or names[1] != "SpladePooling" or not isinstance(core, PreTrainedModel):
        raise ValueError(f"model: got modules {', '.join(names)}; must be a Transformer and a SpladePooling")
    return children[0], children[1], projection_of(core)


def projection_of(model: PreTrainedModel) -> nn.Linear:
    """The vocabulary projection of a masked language model.

    Raises:
        ValueError: It is not a plain ``nn.Linear``.
    """
    projection: Any = model.get_output_embeddings()
    if type(projection) is not nn.Linear or "forward" in vars(projection):
        raise ValueError(f"model: got output embeddings {type(projection).__name__}; must be a plain nn.Linear")
    if not is_plain(projection.weight):
        raise ValueError(f"model: got a weight of type {type(projection.weight).__name__}; must be a plain tensor")
    return projection


def _embeddings(transformer: nn.Module, pooling: nn.Module) -> Tensor:
    """What the encoder makes of two short rows, one of them padded."""
    device = next(transformer.parameters()).device
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=device)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]], device=device)
    modes = [(module, module.training) for module in (*transformer.modules(), *pooling.modules())]
    try:
        transformer.eval()
        pooling.eval()
        with torch.no_grad():
            return pooling(transformer({"input_ids": ids, "attention_mask": mask}))["sentence_embedding"].float()
    finally:
        for module, training in modes:
            module.training = training
