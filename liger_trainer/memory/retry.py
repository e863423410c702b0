"""What happens if memory runs out in a micro-batch all the same: it runs again with all layers recomputed."""

import functools
import gc
import logging
from typing import Any

import torch
from transformers import Trainer

from .recompute import Recompute, recompute_of

logger = logging.getLogger(__name__)

ADVICE = (
    "liger_trainer: to need less memory, lower per_device_train_batch_size (and raise gradient_accumulation_steps), or "
    "set liger_config.low_memory. If other programs use the GPU, raise liger_config.memory_margin. docs/memory.md"
)
# These optimizers step within backward, so that a part of the step is taken when it fails.
STEPS_IN_BACKWARD = ("lomo", "adalomo", "layerwise")


def retry_out_of_memory() -> None:
    """Let ``Trainer.training_step`` run a micro-batch again that ran out of memory, where nothing is lost by it."""
    original = Trainer.training_step
    if hasattr(original, "_retries_out_of_memory"):
        return

    @functools.wraps(original)
    def training_step(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        recompute = recompute_of(model)
        if recompute is None:
            return original(self, model, inputs, *args, **kwargs)
        random = _random_states(self.args.device)
        try:
            return original(self, model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            obstacle = _obstacle(self, recompute)
            if obstacle is not None:
                error.add_note(f"liger_trainer: this micro-batch cannot run again: {obstacle}.")
                error.add_note(ADVICE)
                raise
        # Outside of the handler, whose error holds the failed forward's tensors.
        if not recompute.had_gradients:
            for parameter in model.parameters():
                parameter.grad = None
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        _restore(random, self.args.device)
        logger.warning("liger_trainer: out of memory; this micro-batch runs again with all layers recomputed.")
        try:
            return original(self, model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            error.add_note("liger_trainer: this micro-batch needs too much even with all layers recomputed.")
            error.add_note(ADVICE)
            raise

    training_step.__dict__["_retries_out_of_memory"] = True
    Trainer.training_step = training_step


def _obstacle(trainer: Trainer, recompute: Recompute) -> str | None:
    """Why a failed micro-batch must not or need not run again; shrinks the budget if it may."""
    if trainer.args.world_size > 1:
        return "the other processes would wait for this one"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "the engine is in the middle of it"
    if type(trainer)._prepare_inputs is not Trainer._prepare_inputs:
        return f"{type(trainer).__name__} makes its inputs anew in each step"
    if recompute.forward_ended and recompute.had_gradients:
        return "its backward has added to the gradients of earlier micro-batches"
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if recompute.forward_ended and any(name in optimizer for name in STEPS_IN_BACKWARD):
        return f"{optimizer} has taken a part of the step in backward"
    if not recompute.give_up_more():
        return "no further layer can recompute"
    return None


def _random_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(states: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    """The random numbers of the first try, so that dropout drops the same."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
