"""Computes the per-token log-probabilities of TRL's fused LM head with our op, for models that ``use_liger`` patched.

TRL's trainers call ``model(..., fused_lm_head=True)``, whose forward ends in ``_ChunkedLogProbFunction.apply``. That
name in ``trl.trainer.utils`` is replaced by a dispatcher. While the forward of a patched model runs, the dispatcher
calls ``linear_logprobs``; otherwise it calls TRL's own function. Nothing else changes: TRL computes the loss and the
metrics, and other models keep TRL's function.
"""

import functools
import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LigerConfig
from ..head.fused_head import is_plain
from ..head.per_thread import PerThread, Reading, set_reading
from ..head.sharded_weights import check_materialized, gathered_again_in_backward
from ..kernels.linear_logprobs import Speculation, linear_logprobs
from ..patching import apply_with, is_stale, patch_state, revert_liger
from ..probing.rule import Acted, Match
from ..report import LigerReport
from . import methods


@dataclass
class _Head:
    """The settings of one patched model; its methods are that model's forward hooks."""

    options: dict[str, Any]
    speculation: Speculation = field(default_factory=Speculation)
    calls_fused: int = 0
    acted: Acted = field(default_factory=Acted)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Activate this head for a forward with ``fused_lm_head=True``."""
        _ACTIVE.slot.value = self if kwargs.get("fused_lm_head") else None
        set_reading(None if _ACTIVE.slot.value is None else Reading())

    def after_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        """Deactivate this head."""
        _ACTIVE.slot.value = None
        set_reading(None)


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
        head.acted.note()
        check_materialized("lm_head.weight", weight)
        with gathered_again_in_backward(weight, bias):
            out = linear_logprobs(
                hidden, weight, targets, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                speculation=head.speculation, **head.options,
            )  # fmt: skip
        optional = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return out.log_probs, *(getattr(out, name) if name in outputs else None for name in optional)


class _Policy(threading.local):
    """How this thread's last flagged trainer patches further models that it gives a fused head: its references."""

    apply: Callable[[nn.Module], object] | None = None


_POLICY = _Policy()


class _AddsHead:
    """Takes the place of ``add_fused_lm_head`` in a TRL trainer's module: reference models get what the policy has."""

    def __init__(self, original: Callable[..., None]):
        self.original = original

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        state = patch_state(model)
        if _POLICY.apply is not None and (state is None or state.trl_head is None):
            _POLICY.apply(model)
        self.original(model, *args, **kwargs)


def patch_references(args: object, apply: Callable[[nn.Module], object] | None) -> None:
    """Use ``apply`` for the reference models of the TRL trainer of ``args``; ``None``: leave them as they are."""
    _POLICY.apply = apply
    for module in _fused_trainers(args) if apply else ():
        if not isinstance(module.add_fused_lm_head, _AddsHead):
            module.add_fused_lm_head = _AddsHead(module.add_fused_lm_head)


def _fused_trainers(args: object) -> list[Any]:
    """The modules of the TRL trainers of ``args`` that compute the loss with TRL's fused head.

    TRL keeps each trainer beside its arguments (``sft_trainer.py``, ``sft_config.py``), and the trainers that use the
    fused head import ``add_fused_lm_head``.
    """
    modules = [cls.__module__ for cls in type(args).__mro__ if cls.__module__.startswith("trl.trainer.")]
    names = [name.replace("_config", "_trainer") for name in modules]
    found = [importlib.import_module(name) for name in names if find_spec(name)]
    return [module for module in found if hasattr(module, "add_fused_lm_head")]


def uses_fused_head(args: object) -> bool:
    """Whether the trainer of ``args`` computes the loss with TRL's fused head."""
    return bool(_fused_trainers(args))


def apply_for(args: object, model: nn.Module, config: LigerConfig, reasons: Mapping[str, str]) -> LigerReport:
    """``apply_liger`` for the trainer of ``args``. Where that one computes its loss, it gets our op for it.

    Args:
        args: The trainer's arguments.
        model: The model to patch.
        config: The options.
        reasons: Why kinds cannot be used with ``args``.
    """
    trainer = methods.trainer_of(args)
    wanted = config.fused_loss and "fused_loss" not in reasons
    purpose = trainer or ("TRL's fused head" if wanted and uses_fused_head(args) else "")
    state = patch_state(model)
    if state is not None and state.config == config:
        if state.purpose == purpose and not is_stale(model, state):
            return apply_with(model, config, reasons)
        revert_liger(model)  # patched for another trainer, or changed since then
    head, known = None, dict[str, Match | str](reasons)
    if trainer:
        methods.install(args, functools.partial(apply_for, reasons={}))
        head, of_trainer = methods.known_for(args, model, config)
        known = of_trainer | known
    elif purpose:
        head = _fused_head(config)
        known["fused_loss"] = Match(
            "fused_loss", f"linear_logprobs, behind {purpose}", before=head.before_forward, after=head.after_forward,
            acted=head.acted,
        )  # fmt: skip
    report = apply_with(model, config, known)
    state = patch_state(model)
    assert state is not None
    state.purpose = purpose
    if head is not None and any(acted is head.acted for acted in state.acted.get("fused_loss", [])):
        state.trl_head = head
    return report


def _fused_head(config: LigerConfig) -> _Head:
    """The head of a model under TRL's fused head, for which the dispatcher is installed."""
    trl_utils: Any = importlib.import_module("trl.trainer.utils")
    if not isinstance(trl_utils._ChunkedLogProbFunction, _Dispatcher):
        trl_utils._ChunkedLogProbFunction = _Dispatcher(trl_utils._ChunkedLogProbFunction)
    return _Head(config.options_of("fused_loss"))
