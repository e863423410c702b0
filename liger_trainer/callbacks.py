"""TrainerCallbacks that apply the kernels to the Trainer's model."""

import functools
import logging
import os
from typing import Any, cast

import transformers.trainer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import LigerConfig
from .head.per_thread import loss_only
from .memory.recompute import recompute_of
from .memory.retry import retry_out_of_memory
from .patching import PatchState, core_model, patch_state
from .report import LigerReport
from .rules.unpad import unpadded_stack
from .trl import bridge
from .unpadding.stack import Removed

logger = logging.getLogger(__name__)


class LigerCallback(TrainerCallback):
    """Applies the kernels when the Trainer is made, and again to a model that ``model_init`` makes for ``train()``.

    Add it by hand to a Trainer with stock arguments. With ``use_liger=True`` in one of our argument classes the Trainer
    adds it by itself. The report is printed once, on the main process.

    Args:
        config: As in ``apply_liger``. ``None``: the ``liger_config`` of the arguments, or else the defaults.

    Raises:
        ValueError: The Trainer uses several GPUs in one process (``nn.DataParallel``), or as in ``apply_liger``.
    """

    def __init__(self, config: LigerConfig | dict[str, Any] | str | None = None):
        self.config = None if config is None else LigerConfig.parse(config)
        self._printed = False
        self._checked = False
        self._was_there = False  # when the Trainer was made
        announce_loss_only_steps()
        retry_out_of_memory()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Patch the model before it is wrapped for distributed training, and the reference models that follow it."""
        self._was_there = True
        self._apply(args, state, kwargs["model"])
        bridge.patch_references(args, functools.partial(self._apply, args, state) if self.acts(args) else None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Patch a model that ``model_init`` has just made."""
        bridge.patch_references(args, None)
        if self.acts(args) and not self._was_there and bridge.uses_fused_head(args):
            logger.warning(
                "liger_trainer: LigerCallback was added after the trainer was made, so a reference model, if there is "
                "one, is not patched and differs from the policy by roundings. Pass callbacks=[LigerCallback()] to the "
                "trainer."
            )
        self._apply(args, state, kwargs["model"])
        patched = self._patched(args, kwargs["model"])
        if patched is not None:
            patched.report.ran = dict.fromkeys(patched.acted, 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what has acted outside of the step, as in evaluation."""
        patched = self._patched(args, kwargs["model"])
        if patched is not None:
            patched.forget_acted()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count what acted in the step. After the first one, warn if the fused loss was applied but not used."""
        patched = self._patched(args, kwargs["model"])
        if patched is None:
            return
        patched.count_step()
        if not self._checked and patched.report.ran.get("fused_loss") == 0:
            logger.warning(
                "liger_trainer: the fused loss was not used in the first step, so the full logits are built. Either "
                "the Trainer did not pass labels to the model (compute_loss_func, or a compute_loss of its own?), or "
                "lm_head was replaced or wrapped after apply_liger."
            )
        self._checked = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the training logs, and to ``log_history``, what this process's batches since the last log had.

        ``padding_removed`` is the share of the batches' places that the layers did not see. On GPUs,
        ``recomputed_layers`` is the mean number of layers that recomputed their activations, and
        ``memory_headroom_gib`` what was free at the peak.
        """
        model = kwargs.get("model")
        unpadded = unpadded_stack(core_model(model)) if self.acts(args) and model is not None else None
        if unpadded is not None and logs is not None and "loss" in logs:
            share = {"padding_removed": round(unpadded.removed.share(), 4)}
            logs.update(share)
            state.log_history[-1].update(share)
            unpadded.removed = Removed()
        recompute = recompute_of(model) if self.acts(args) and model is not None else None
        if recompute is not None and logs is not None and "loss" in logs:
            entries = recompute.logs()
            logs.update(entries)
            state.log_history[-1].update(entries)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log in how many steps each kind acted."""
        patched = self._patched(args, kwargs["model"])
        if patched is not None and state.is_world_process_zero:
            ran = ", ".join(f"{kind} in {steps}" for kind, steps in patched.report.ran.items())
            logger.warning("liger_trainer: of %d steps, these acted: %s", state.global_step, ran or "none")

    def acts(self, args: TrainingArguments) -> bool:
        """Whether this callback does anything for a Trainer with ``args``."""
        return True

    def _patched(self, args: TrainingArguments, model: nn.Module) -> PatchState | None:
        return patch_state(model) if self.acts(args) else None

    def _apply(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if not self.acts(args):
            return
        if args.n_gpu > 1:
            raise ValueError(
                f"use_liger: got {args.n_gpu} GPUs in one process; must be one GPU per process. The Trainer would use "
                "nn.DataParallel, whose replicas all run the patched modules of the first one. Start one process per "
                "GPU with `accelerate launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        patched = patch_state(model)
        config = self.config or LigerConfig.parse(getattr(args, "liger_config", None))
        if patched is not None and self.config is None and getattr(args, "liger_config", None) is None:
            config = patched.config  # the user has patched the model with options, which stay
        report = apply_for(args, model, config)
        if not self._printed and state.is_world_process_zero:
            print(report, flush=True)
        self._printed = True


class FlaggedLigerCallback(LigerCallback):
    """A ``LigerCallback`` that acts only if the arguments say ``use_liger=True``."""

    def acts(self, args: TrainingArguments) -> bool:
        """Whether the arguments say so."""
        return getattr(args, "use_liger", False)


def install_default_callback() -> None:
    """Add ``FlaggedLigerCallback`` to every Trainer made from now on."""
    defaults = cast(list[type[TrainerCallback]], transformers.trainer.DEFAULT_CALLBACKS)
    if FlaggedLigerCallback not in defaults:
        defaults.append(FlaggedLigerCallback)


def announce_loss_only_steps() -> None:
    """Let ``Trainer.prediction_step`` tell the fused loss when nobody will read the logits. Nothing else changes.

    That is so if only the loss is asked for, and the Trainer computes it itself, from the model's output.
    """
    original = Trainer.prediction_step
    if hasattr(original, "_announces_loss_only"):
        return

    @functools.wraps(original)
    def prediction_step(self: Trainer, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any):
        own_loss = getattr(self.compute_loss, "__func__", None) is not Trainer.compute_loss or self.compute_loss_func
        if not prediction_loss_only or own_loss:
            return original(self, model, inputs, prediction_loss_only, *args, **kwargs)
        with loss_only():
            return original(self, model, inputs, prediction_loss_only, *args, **kwargs)

    prediction_step.__dict__["_announces_loss_only"] = True
    Trainer.prediction_step = prediction_step


def apply_for(args: TrainingArguments, model: nn.Module, config: LigerConfig | None = None) -> LigerReport:
    """``apply_liger`` for the Trainer of ``args``, whose ``liger_config`` is used if ``config`` is ``None``."""
    reasons = {}
    if args.label_smoothing_factor > 0:
        reasons["fused_loss"] = "label_smoothing_factor is set: the Trainer computes the smoothed loss from the logits"
    keeps_checkpointing = _checkpoints_otherwise(args)
    if keeps_checkpointing is not None:
        reasons["recompute"] = keeps_checkpointing
    config = config or LigerConfig.parse(getattr(args, "liger_config", None))
    return bridge.apply_for(args, model, config, reasons)


def _checkpoints_otherwise(args: TrainingArguments) -> str | None:
    """Which argument says itself how activations are kept or recomputed, so that memory must not decide."""
    chosen = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    for name in ("every_n_layers", "offload"):
        if name in chosen:
            return f"the arguments of activation checkpointing set {name}"
    if getattr(args, "activation_offloading", False):
        return "activation_offloading is set"
    launched = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING")  # what `accelerate launch` makes of its config file
    if _is_true(launched) or _is_true(cast(dict, args.fsdp_config or {}).get("activation_checkpointing")):
        return "FSDP checkpoints by itself (activation_checkpointing of fsdp_config)"
    return None


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1")
