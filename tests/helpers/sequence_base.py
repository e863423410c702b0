"""A state machine with an unpatched and a patched model, without rules: how it starts and what is compared."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from model_pair import TOLERANCE, ModelPair, compare, core_of, evaluation, gradients
from tiny_models import tiny_model
from torch import Tensor, nn
from user_batches import EXTRAS, LABELS, PADDINGS, READERS, STYLES, Batch
from user_steps import ZLoss, observations

SMALL = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.1}
MODELS = {"llama": SMALL, "gemma2": {**SMALL, "head_dim": 8}, "qwen2": SMALL, "gpt2": SMALL, "mixtral": SMALL,
          "granite": SMALL}  # fmt: skip
CONFIGS = (
    {}, {"fused_loss": False}, {"padding_mask": False}, {"low_memory": True}, {"recompute_glu": False},
    {"rope": False, "glu": False}, {"rms_norm": False, "attention": False},
)  # fmt: skip
CHECKED = (Batch("right"), Batch(), Batch("left", seed=1), Batch("mixed", seed=2), Batch("none", "none"))
# Errors that only a patched model raises and that are promised: each says what to do.
NO_TRAINING_LOGITS = "set fused_loss: false"
NOT_DIFFERENTIABLE_TWICE = "linear_cross_entropy: its gradients cannot be differentiated again"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
batches = st.builds(
    Batch, padding=st.sampled_from(PADDINGS), labels=st.sampled_from(LABELS), extra=st.sampled_from(EXTRAS),
    style=st.sampled_from(STYLES), seed=st.integers(0, 3),
)  # fmt: skip
simple_batches = st.builds(Batch, padding=st.sampled_from(PADDINGS), seed=st.integers(0, 3))
contexts = st.sampled_from(("no_grad", "inference", "grad", "train mode"))
readers = st.sampled_from(tuple(READERS))


@functools.cache
def prototype(name: str) -> nn.Module:
    return tiny_model(name, **MODELS[name])


class Late(NamedTuple):
    """Logits of an evaluation that were not read yet, and how exact they are."""

    theirs: Tensor
    ours: Tensor
    tolerance: float


class SequenceBase(RuleBasedStateMachine):
    """Holds the pair of models; ``check_*`` run a forward on both and compare everything it gives."""

    compiles: bool = False
    started: int = 0

    @initialize(
        name=st.sampled_from(tuple(MODELS)),
        config=st.sampled_from((None, *CONFIGS)),
        compiles=st.sampled_from((*[False] * 39, True)),  # which takes longer than all other steps of a sequence
    )
    def start(self, name: str, config: dict[str, Any] | None, compiles: bool = False) -> None:
        type(self).started += 1
        self.name = name
        self.pair = ModelPair(copy.deepcopy(prototype(name)))
        self.hooks: list[tuple[Any, Any]] = []
        self.late: list[Late] = []
        self.may_compile = self.compiles and compiles
        self.unchecked = True
        self.graph_lives = False  # PyTorch never frees the graph of a backward that failed
        if config is not None:
            self.pair.apply(config)

    @invariant()
    def agree(self) -> None:
        """After each change an evaluation and a training forward, with another batch each time."""
        if self.unchecked:
            self.unchecked = False
            batch = CHECKED[self.pair.steps % len(CHECKED)]
            self.check_evaluation(batch, "no_grad", "clone")
            self.check_training(batch, "once")

    def change(self, action: Callable[[nn.Module], Any]) -> tuple[Any, Any] | None:
        self.unchecked = True
        return self.pair.both(action)

    def go_on_with(self, action: Callable[[nn.Module], nn.Module]) -> None:
        self.unchecked = True
        self.pair.replace(action)

    def check_training(self, batch: Batch, how: str) -> None:
        def step(model: nn.Module) -> dict[str, Any]:
            model.train()
            if how != "accumulated":
                model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                loss, logits = batch.call(model)
            target = logits.float().square().mean() if loss is None else loss
            (3 * target if how == "scaled" else target).backward(retain_graph=how == "twice")
            if how == "twice":
                target.backward()
            return {"loss": loss, "logits": logits, "gradients": gradients(model), "seen": observations(model)}

        self.compare_training(batch, step, TOLERANCE[torch.bfloat16] if how == "autocast" else None)
        if how == "autocast":
            self.pair.forget_gradients()  # too rough for exact ones to be added to them

    def compare_training(
        self, batch: Batch, step: Callable[[nn.Module], dict[str, Any]], tolerance: float | None = None
    ) -> None:
        if self._has_hook(ZLoss) and batch.padding == "right":
            return  # reads logits at padding, which the documentation says are others
        results = self.pair.both(step, self.promised(True))
        if results is None:
            self.pair.forget_gradients()
            return
        theirs, ours = results
        limit = max(tolerance or 0, self.pair.tolerance)
        if batch.has_no_valid_label and theirs["loss"] is not None and theirs["loss"].isnan():
            self.pair.forget_gradients()  # ours may be 0, docs/limits.md says
            return
        compare("loss", theirs["loss"], ours["loss"], limit)
        their_logits, our_logits = theirs.pop("logits"), ours.pop("logits")
        built = our_logits is not None and (our_logits.shape[-1] > 0 or not batch.has_labels)
        if built and (batch.padding != "right" or not batch.has_labels):
            compare("logits", their_logits, our_logits, limit)
        compare("training", theirs, ours, limit)

    def check_evaluation(self, batch: Batch, context: str, reader: str) -> None:
        def step(model: nn.Module) -> dict[str, Any]:
            model.zero_grad()
            with evaluation(model, context):
                loss, logits = batch.call(model)
                values = READERS[reader](logits) if context != "grad" else READERS["softmax"](logits)
                if context == "grad":
                    (logits.float().square().mean() + (0 if loss is None else loss)).backward()
            return {"loss": loss, "values": values, "gradients": gradients(model), "seen": observations(model)}

        self.compare_evaluation(batch, context, step)

    def compare_evaluation(self, batch: Batch, context: str, step: Callable[[nn.Module], dict[str, Any]]) -> bool:
        training = context == "train mode"
        if training and self._has_hook(ZLoss) and batch.padding == "right":
            return False
        promised = self.promised(training)
        results = self.pair.both(step, promised)
        if results is None:
            return False
        theirs, ours = results
        if batch.has_no_valid_label and theirs["loss"] is not None and theirs["loss"].isnan():
            theirs["loss"] = ours["loss"] = None
            theirs.pop("gradients", None)
            ours.pop("gradients", None)
        if training and batch.padding == "right":
            theirs.pop("values", None)
            ours.pop("values", None)
        compare("evaluation", theirs, ours, self.pair.tolerance)
        self.pair.forget_gradients()
        return True

    def _has_hook(self, cls: type) -> bool:
        core = core_of(self.pair.plain)
        hooks = (*core._forward_hooks.values(), *core._forward_pre_hooks.values())
        return any(isinstance(hook, cls) for hook in hooks)

    def promised(self, training: bool) -> list[str]:
        """Patterns of the errors that the documentation promises for a forward of a patched model as it is now."""
        return [NO_TRAINING_LOGITS] if training and self._has_hook(ZLoss) else []
