"""What happens if memory runs out in a micro-batch all the same: it runs again with all layers recomputed."""

import copy
import functools
import gc
import logging
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ..probing.probe import submodules
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
        recompute.last = None
        before = _Before(self, model)
        try:
            return original(self, model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            obstacle = _obstacle(self, model, before) or _nothing_to_give_up(recompute)
            if obstacle is not None:
                error.add_note(f"liger_trainer: this micro-batch cannot run again: {obstacle}.")
                error.add_note(ADVICE)
                raise
        # Outside of the handler, whose error holds the failed forward's tensors.
        before.restore(self, model)
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("liger_trainer: out of memory; this micro-batch runs again with all layers recomputed.")
        try:
            return original(self, model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            error.add_note("liger_trainer: this micro-batch needs too much even with all layers recomputed.")
            error.add_note(ADVICE)
            raise

    training_step.__dict__["_retries_out_of_memory"] = True
    Trainer.training_step = training_step


def _obstacle(trainer: Trainer, model: Any, before: "_Before") -> str | None:
    """Why a failed micro-batch must not run again."""
    if trainer.args.world_size > 1:
        return "the other processes would wait for this one"
    wrapped = isinstance(model, DistributedDataParallel) or any(isinstance(p, DTensor) for p in model.parameters())
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or wrapped:  # DTensors do not tell writes either
        return "the engine is in the middle of it"
    if type(trainer)._prepare_inputs is not Trainer._prepare_inputs:
        return f"{type(trainer).__name__} makes its inputs anew in each step"
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if any(name in optimizer for name in STEPS_IN_BACKWARD):
        return f"{optimizer} takes a part of the step in backward"
    if before.added_gradients(model):
        return "its backward has added to the gradients of earlier micro-batches"
    return None


def _nothing_to_give_up(recompute: Recompute) -> str | None:
    """Why running again would need as much; shrinks the budget if it would not."""
    if recompute.last is None and recompute.left is not None:
        return f"its layers are left as they are: {recompute.left}"
    if recompute.last is None:
        return "it failed outside of the layers that can recompute"
    return None if recompute.give_up_more() else "no further layer can recompute"


class _Before:
    """What a micro-batch may change before it fails: gradients, random numbers, and the trainer's own counts."""

    def __init__(self, trainer: Trainer, model: nn.Module):
        device = trainer.args.device
        self.gradients = _versions(model)
        self.random = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self.on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # TRL's compute_loss counts tokens and collects metrics.
        self.counts = {
            name: _copied(value)
            for name, value in vars(trainer).items()
            if name.startswith("_") and (type(value) in (int, float) or (isinstance(value, dict) and "metrics" in name))
        }

    def added_gradients(self, model: nn.Module) -> bool:
        """Whether there were gradients, and a backward has added to them."""
        return bool(self.gradients) and _versions(model) != self.gradients

    def restore(self, trainer: Trainer, model: nn.Module) -> None:
        """Put back what the failed micro-batch has changed, so that dropout drops the same."""
        if not self.gradients:
            for parameter in model.parameters():
                parameter.grad = None
        torch.set_rng_state(self.random[0])
        random.setstate(self.random[1])
        np.random.set_state(self.random[2])
        if self.on_gpu is not None:
            torch.cuda.set_rng_state(self.on_gpu, trainer.args.device)
        vars(trainer).update(self.counts)


def _versions(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Which gradients there are, and how often each was written."""
    parameters = (p for module in submodules(model) for p in module._parameters.values() if p is not None)
    gradients = ((p, p.grad) for p in parameters if p.requires_grad and p.is_leaf)
    return {id(p): (id(gradient), gradient._version) for p, gradient in gradients if gradient is not None}


def _copied(value: Any) -> Any:
    """A copy of lists and dicts in each other; what they hold is the same."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # may be a defaultdict
        copied.update((key, _copied(part)) for key, part in value.items())
        return copied
    return copy.copy(value) if isinstance(value, list) else value
