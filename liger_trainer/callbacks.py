"""TrainerCallbacks that put the kernels into the Trainer's model."""

import logging
import sys

import transformers.trainer
from transformers import TrainerCallback

from .config import LigerConfig
from .patching import apply_with, patch_state

logger = logging.getLogger(__name__)


class LigerCallback(TrainerCallback):
    """Applies the kernels when the Trainer is made, and again to a model that ``model_init`` makes for ``train()``.

    Add it by hand to a Trainer with stock arguments; ``use_liger=True`` in one of our argument classes adds it by
    itself. The report is printed once, on the main process.

    Args:
        config: as in ``apply_liger``. ``None``: the arguments' ``liger_config``, else the defaults.

    Raises:
        ValueError: when the Trainer is made with several GPUs in one process (``nn.DataParallel``), or as in
            ``apply_liger``.
    """

    def __init__(self, config: LigerConfig | dict | str | None = None):
        self.config = None if config is None else LigerConfig.parse(config)
        self._printed = False
        self._checked = False

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Patch the model before it is wrapped for distributed training."""
        self._apply(args, state, model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Patch a model that ``model_init`` has just made."""
        self._apply(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """After the first step, say so if the fused loss was applied but the Trainer did not go through it."""
        if self._checked:
            return
        self._checked = True
        patched = patch_state(model)
        heads = [] if patched is None else [h for h in (patched.fused, patched.trl_head) if h is not None]
        if heads and not any(head.calls_fused for head in heads):
            logger.warning(
                "liger_trainer: the fused loss was not used in the first step, so the full logits are built: the "
                "Trainer did not pass labels to the model (compute_loss_func, or a compute_loss of its own?), or "
                "lm_head was replaced or wrapped after apply_liger."
            )

    def _apply(self, args, state, model):
        if args.n_gpu > 1:
            raise ValueError(
                f"use_liger: {args.n_gpu} GPUs in one process make the Trainer use nn.DataParallel, whose replicas "
                "would all run the first one's patched modules. Start one process a GPU with `accelerate launch`, or "
                "make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        patched = patch_state(model)
        config = self.config or LigerConfig.parse(getattr(args, "liger_config", None))
        if patched is not None and self.config is None and getattr(args, "liger_config", None) is None:
            config = patched.config  # patched by hand with options of its own: those stand
        report = apply_with(model, config, _why_no_fused_loss(args))
        if config.fused_loss and _is_trl(args):
            from .trl import bridge as trl

            trl.attach(model)
        if not self._printed and state.is_world_process_zero:
            print(report, flush=True)
        self._printed = True


class FlaggedLigerCallback(LigerCallback):
    """The one in transformers' list of default callbacks: acts only where the arguments say ``use_liger=True``."""

    def _apply(self, args, state, model):
        if getattr(args, "use_liger", False):
            super()._apply(args, state, model)


def install_default_callback() -> None:
    """Let every Trainer made from now on have a ``FlaggedLigerCallback``; it does nothing without the flag."""
    if FlaggedLigerCallback not in transformers.trainer.DEFAULT_CALLBACKS:
        transformers.trainer.DEFAULT_CALLBACKS.append(FlaggedLigerCallback)


def _why_no_fused_loss(args) -> str | None:
    if args.label_smoothing_factor > 0:
        return "label_smoothing_factor is set: the Trainer computes the smoothed loss from the logits itself"
    return None


def _is_trl(args) -> bool:
    """Whether ``args`` belong to a TRL trainer with a fused head; TRL is imported already if they do."""
    if "trl" not in sys.modules:
        return False
    import trl

    return isinstance(args, (trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig, trl.RLOOConfig))
