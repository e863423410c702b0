"""Computes the per-token log-probabilities of TRL's fused LM head with our op, for models that ``use_liger`` patched.

TRL's trainers call ``model(..., fused_lm_head=True)``, whose forward ends in ``_ChunkedLogProbFunction.apply``. That
name in ``trl.trainer.utils`` is replaced by a dispatcher. While the forward of a patched model runs, the dispatcher
calls ``linear_logprobs``; otherwise it calls TRL's own function. Nothing else changes: TRL computes the loss and the
metrics, and other models keep TRL's function.
"""

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..head.fused_head import is_plain
from ..head.per_thread import PerThread
from ..head.sharded_weights import check_materialized, gathered, is_partitioned
from ..kernels.linear_logprobs import Speculation, linear_logprobs
from ..patching import add_hooks, core_model, patch_state
from ..report import Applied


@dataclass
class _Head:
    """The settings of one patched model; its methods are that model's forward hooks."""

    options: dict[str, Any]
    speculation: Speculation = field(default_factory=Speculation)
    calls_fused: int = 0

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Activate this head for a forward with ``fused_lm_head=True``."""
        _ACTIVE.slot.value = self if kwargs.get("fused_lm_head") else None

    def after_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        """Deactivate this head."""
        _ACTIVE.slot.value = None


_ACTIVE = PerThread()  # the ``_Head`` whose model's forward a thread runs


class _Dispatcher:
    """Takes the place of TRL's autograd function."""

    def __init__(self, original: type[torch.autograd.Function]):
        self.original = original

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """TRL's signature and outputs: log-probs, entropy, log-sum-of-squared-probs, mean logits, is-top-1."""
        head: _Head | None = _ACTIVE.slot.value
        if head is None or not (torch.compiler.is_compiling() or all(map(is_plain, (hidden, weight, bias)))):
            return self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        head.calls_fused = 1 if torch.compiler.is_compiling() else head.calls_fused + 1
        check_materialized("lm_head.weight", weight)
        with _gathered_again_in_backward(weight, bias):
            out = linear_logprobs(
                hidden, weight, targets, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                speculation=head.speculation, **head.options,
            )  # fmt: skip
        optional = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return out.log_probs, *(getattr(out, name) if name in outputs else None for name in optional)


def _gathered_again_in_backward(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """A context in which autograd saves a reference to a ZeRO-3 parameter instead of its current values.

    TRL's forward gathers lm_head's weight for this one call. By the time of backward the values are partitioned again,
    so the saved reference gathers them once more.
    """
    managed = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not managed:
        return nullcontext()

    def pack(tensor: Tensor) -> Tensor | int:
        return next((i for i, p in enumerate(managed) if p is tensor), tensor)

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not is_partitioned(managed[packed]):  # DeepSpeed has gathered it for a module that it saw reading it
            return managed[packed]
        with gathered(managed[packed]) as (whole,):
            return whole.detach().clone()

    return saved_tensors_hooks(pack, unpack)


def has_fused_head(args: object) -> bool:
    """Whether ``args`` belong to a TRL trainer that computes its loss with TRL's fused head.

    TRL keeps each trainer beside its arguments (``sft_trainer.py``, ``sft_config.py``), and the trainers that use the
    fused head import ``add_fused_lm_head``. The trainer's module is loaded by the time it has arguments.
    """
    modules = [cls.__module__ for cls in type(args).__mro__ if cls.__module__.startswith("trl.trainer.")]
    trainers = [sys.modules.get(name.replace("_config", "_trainer")) for name in modules]
    return any(hasattr(trainer, "add_fused_lm_head") for trainer in trainers)


def attach(model: nn.Module) -> None:
    """Use ``linear_logprobs`` in TRL's fused head of ``model``.

    Args:
        model: A model that ``apply_liger`` has patched.

    Raises:
        ValueError: ``model`` is not patched.
    """
    state, core = patch_state(model), core_model(model)
    if state is None:
        raise ValueError(f"model: got an unpatched {type(core).__name__}; must be a model patched by apply_liger")
    if state.trl_head is not None:
        return
    trl_utils: Any = importlib.import_module("trl.trainer.utils")
    if not isinstance(trl_utils._ChunkedLogProbFunction, _Dispatcher):
        trl_utils._ChunkedLogProbFunction = _Dispatcher(trl_utils._ChunkedLogProbFunction)
    head = state.trl_head = _Head(state.config.options_of("fused_loss"))
    add_hooks(core, state, head.before_forward, head.after_forward)
    variant = "linear_logprobs, behind TRL's fused head"
    state.report.applied.append(Applied("fused_loss", "", type(core).__name__, variant))
