"""TRL's trainers that build logits: each method that reads them runs as it is, on stand-ins made by a ``ScoreHead``.

A method of the trainer's class is replaced by one that says what will be read, and calls the original. The functions of
the trainer's module that take log-probabilities from logits are replaced by ones that know stand-ins. For a model that
``use_liger`` did not patch, all of them call the original and nothing else.
"""

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LigerConfig
from ..kernels.reference import IGNORE_INDEX
from ..patching import core_model, patch_state
from ..probing.rule import Match, Skip, errors_skip
from ..rules.fused_loss import probe_places
from ..unpadding.stack import is_sharded
from . import stand_ins
from .divergence import (
    DivergenceDispatcher,
    DivergenceHead,
    dispatched_divergence,
    pair_divergence,
    projecting,
)
from .score_head import Request, ScoreHead

Apply = Callable[[Any, nn.Module, LigerConfig], object]  # patches a model for the trainer of some arguments
Scope = Callable[[Apply, Any, tuple, dict[str, Any]], AbstractContextManager]


@dataclass(frozen=True)
class Integration:
    """How one trainer's logits are replaced.

    Args:
        cls: Name of the trainer.
        method: Name of its method that calls the model and reads the logits.
        scope: What to enter around that method, from its arguments.
        reads: Functions of its module that take stand-ins, by name.
        reads_padding: Its metrics are means over padding too, so batches keep it.
        op: What computes its loss, as the report shows it.
    """

    cls: str
    method: str
    scope: Scope
    reads: tuple[str, ...] = ()
    reads_padding: bool = False
    op: str = "linear_logprobs"

    @property
    def variant(self) -> str:
        """The form of the fused loss, as the report shows it."""
        return f"{self.op}, behind {self.cls}"


class _Reader:
    """Takes the place of one of TRL's functions of logits."""

    def __init__(self, original: Callable[..., Any], read: Callable[..., Any]):
        self.original, self.read = original, read

    def __call__(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        function = self.read if isinstance(logits, stand_ins.TokenScores) else self.original
        return function(logits, *args, **kwargs)


def _head_of(apply: Apply, trainer: Any, model: nn.Module) -> Any:
    """The head that ``known_for`` made for ``model``; ``None`` if there is none, or none for the policy of ``trainer``.

    A reference or a teacher is patched for the policy's trainer, with its own options if ``apply_liger`` patched it.
    """
    policy = patch_state(trainer.model)
    if policy is None or not policy.purpose:
        return None
    state = patch_state(model)
    if state is None or state.purpose != policy.purpose:
        apply(trainer.args, model, (state or policy).config)
        state = patch_state(model)
    return None if state is None or policy.trl_head is None else state.trl_head


def _one_model(apply: Apply, trainer: Any, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager:
    """The scope of a method ``(model, ...)`` that reads every position."""
    head = _head_of(apply, trainer, args[0] if args else kwargs["model"])
    return nullcontext() if head is None else head.scoring(Request())


def _completions(apply: Apply, trainer: Any, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager:
    """The scope of TPO's ``(model, inputs, return_outputs)``; outputs that are returned must have logits."""
    model, inputs, return_outputs = args
    head = None if return_outputs else _head_of(apply, trainer, model)
    if head is None:
        return nullcontext()
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    return head.scoring(Request(labels))


def _student_and_teacher(apply: Apply, trainer: Any, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager:
    """The scope of ``compute_loss(model, inputs, return_outputs, num_items_in_batch)`` of two models."""
    model, inputs, *rest = args
    return_outputs = rest[0] if rest else kwargs.get("return_outputs", False)
    if return_outputs:
        return nullcontext()
    student, teacher = (_head_of(apply, trainer, m) for m in (model, trainer.teacher_model))
    if student is None:
        return nullcontext()
    sharded = any(is_sharded(core_model(m)) for m in (model, trainer.teacher_model))
    if teacher is None or sharded:
        student.acted.refuse("the weights are sharded" if sharded else "the teacher's lm_head cannot be used")
        return nullcontext()
    scope = ExitStack()
    pair = [scope.enter_context(h.scoring(Request(inputs["labels"], hidden_only=True))) for h in (student, teacher)]
    scope.enter_context(pair_divergence(student, teacher, *pair))
    return scope


def _projected(apply: Apply, trainer: Any, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager:
    """The scope of DistillationTrainer's ``(student, inputs, num_items_in_batch)``."""
    model, inputs, *_ = args
    head, _ = _head_of(apply, trainer, model), _head_of(apply, trainer, trainer.teacher_model)
    if head is None:
        return nullcontext()
    completions = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    prompts = torch.full_like(inputs["prompt_ids"], IGNORE_INDEX)
    return projecting(head, torch.cat([prompts, completions], dim=1))


_DIVERGENCE: dict[str, Any] = {"method": "compute_loss", "scope": _student_and_teacher, "op": "linear divergence"}
_PAIRS: dict[str, Any] = {
    "method": "concatenated_forward", "scope": _one_model, "reads": ("selective_log_softmax",), "reads_padding": True
}  # fmt: skip
# By the module of the trainer's arguments.
INTEGRATIONS = {
    "trl.experimental.orpo.orpo_config": Integration("ORPOTrainer", **_PAIRS),
    "trl.experimental.cpo.cpo_config": Integration("CPOTrainer", **_PAIRS),
    "trl.experimental.online_dpo.online_dpo_config": Integration(
        "OnlineDPOTrainer", "_forward", _one_model, reads_padding=True
    ),
    "trl.experimental.tpo.tpo_config": Integration(
        "TPOTrainer", "_compute_loss", _completions, ("selective_log_softmax_and_entropy",)
    ),
    "trl.trainer.distillation_config": Integration(
        "DistillationTrainer", "_compute_loss", _projected, op="linear divergence"
    ),
    "trl.experimental.gkd.gkd_config": Integration("GKDTrainer", **_DIVERGENCE),
    "trl.experimental.gold.gold_config": Integration("GOLDTrainer", **_DIVERGENCE),
}


def module_of(args: object) -> str:
    """The module of TRL's argument class of which ``args`` is; empty if it is none of TRL's."""
    return next((cls.__module__ for cls in type(args).__mro__ if cls.__module__.startswith("trl.")), "")


def trainer_of(args: object) -> str:
    """The name of the trainer of ``args`` if it is one of these; empty otherwise."""
    integration = INTEGRATIONS.get(module_of(args))
    return "" if integration is None else integration.cls


def known_for(
    args: Any, model: nn.Module, config: LigerConfig
) -> tuple[ScoreHead | DivergenceHead | None, dict[str, Match | str]]:
    """The head of ``model`` for the trainer of ``args``, or ``None``; and what ``apply_with`` must know."""
    integration = INTEGRATIONS[module_of(args)]
    known: dict[str, Match | str] = {}
    if integration.reads_padding:
        reason = f"{integration.cls} logs means over all positions, padding's too"
        known = {"unpad": reason, "padding_mask": reason}
    if not config.fused_loss:
        return None, known
    try:
        with errors_skip():
            if integration.scope is _projected:
                head = DivergenceHead()
                return head, {**known, "fused_loss": Match("fused_loss", integration.variant, acted=head.acted)}
            head, attributes = _score_head(args, core_model(model), config)
    except Skip as skip:
        return None, {**known, "fused_loss": str(skip)}
    known["fused_loss"] = Match(
        "fused_loss", integration.variant, attributes=attributes, before=head.before_forward, after=head.after_forward,
        acted=head.acted,
    )  # fmt: skip
    return head, known


def _score_head(args: Any, core: nn.Module, config: LigerConfig) -> tuple[ScoreHead, tuple]:
    """The head of ``core``, and what to bind to its ``lm_head``.

    Raises:
        Skip: It cannot have one.
    """
    if getattr(args, "use_uld_loss", False):
        raise Skip("use_uld_loss sorts the probabilities of the whole vocabulary, which takes the logits")
    causal_lm, form, places = probe_places(core)
    if causal_lm.config.is_encoder_decoder:
        raise Skip("its labels are the decoder's, and input_ids are not")
    head = ScoreHead(causal_lm, form, config.options_of("fused_loss"))
    return head, tuple((linear, place, head.head_forward) for linear, place in places)


def install(args: object, apply: Apply) -> None:
    """Put the dispatchers into the trainer's class and module, once."""
    name = module_of(args)
    integration = INTEGRATIONS[name]
    module: Any = importlib.import_module(name.replace("_config", "_trainer"))
    for read in integration.reads:
        if not isinstance(getattr(module, read), _Reader):
            setattr(module, read, _Reader(getattr(module, read), getattr(stand_ins, read)))
    cls = getattr(module, integration.cls)
    original = getattr(cls, integration.method)
    if hasattr(original, "_liger_scope"):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with integration.scope(apply, self, args, kwargs):
            return original(self, *args, **kwargs)

    method.__dict__["_liger_scope"] = True
    setattr(cls, integration.method, method)
    if integration.scope is _student_and_teacher:
        cls.generalized_jsd_loss = staticmethod(dispatched_divergence(cls.generalized_jsd_loss))
    if integration.scope is _projected:
        module.ChunkedDivergenceFunction = DivergenceDispatcher(module.ChunkedDivergenceFunction)
