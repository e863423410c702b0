"""What is read off a Trainer while it trains: step times, losses, gradient norms, tokens, memory. None of it waits for
the device inside a window of timed steps."""

import time
from itertools import pairwise

import torch
from transformers import Trainer, TrainerCallback

from benchmarks.measure import release_memory, synchronize

GIB = 1 << 30


class StepTimes(TrainerCallback):
    """Time of windows of ``window`` steps, the device drained between windows and not inside them.

    Draining at every step would add to each the time the host needs to get ahead of the device again, which users
    do not pay.
    """

    def __init__(self, device: str, warmup: int, window: int):
        self.device, self.warmup, self.window, self.ends = device, warmup, window, []
        self.logged: dict[str, list[float]] = {"loss": [], "grad_norm": []}

    def on_step_end(self, args, state, control, **kwargs):
        """Take the time where a window ends."""
        done = state.global_step - self.warmup
        if done >= 0 and done % self.window == 0:
            synchronize(self.device)
            self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep the mean loss of each window, and the gradient norm before clipping of its last step."""
        for name, values in self.logged.items():
            if name in (logs or {}):
                values.append(float(logs[name]))

    def first_and_last(self) -> dict[str, float | None]:
        """``first_loss``, ``last_loss``, ``first_grad_norm`` and ``last_grad_norm``; None for what was not logged."""
        windows = {"first": 0, "last": -1}
        return {
            f"{at}_{name}": values[i] if values else None
            for name, values in self.logged.items()
            for at, i in windows.items()
        }

    def step_ms(self) -> list[float]:
        """One mean for each window after the warm-up."""
        return [(end - start) * 1e3 / self.window for start, end in pairwise(self.ends)]


class TokenCount:
    """Counts the tokens of every training step: real ones (attention mask 1) and all, padding included."""

    def __init__(self, trainer: Trainer):
        self.real, self.padded, self.steps = [], [], []
        self.trainer, self.step = trainer, trainer.training_step
        trainer.training_step = self

    def __call__(self, model, inputs, *args, **kwargs):
        """The Trainer's own training step, its batch counted; the sum stays on the device."""
        mask, tokens = inputs.get("attention_mask"), inputs["input_ids"]
        two_dimensional = torch.is_tensor(mask) and mask.dim() == 2  # packed rows have none, or a block mask
        self.real.append(mask.sum() if two_dimensional else tokens.numel())
        self.padded.append(tokens.numel())
        self.steps.append(self.trainer.state.global_step)  # steps done before this one
        return self.step(model, inputs, *args, **kwargs)

    def after(self, warmup: int) -> tuple[int, int]:
        """Real and padded tokens of this rank in the steps after ``warmup``."""
        timed = [i for i, step in enumerate(self.steps) if step >= warmup]
        return sum(int(self.real[i]) for i in timed), sum(self.padded[i] for i in timed)


class Memory(TrainerCallback):
    """Memory of this rank: peaks of the steps after the first, and what stays when gradients are freed (CUDA).

    Making and sharding the model, and making the optimizer's state, happen before the second step and are left out.
    """

    def __init__(self, device: str, steps: int):
        self.device, self.on_gpu, self.steps, self.static = device, device == "cuda", steps, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Give back what making and sharding the model has left in the cache, or it would count as reserved."""
        release_memory(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        """Forget the peak of the first step; after the last, gradients freed, note what is left."""
        if self.on_gpu and state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()
        elif self.on_gpu and state.global_step == self.steps:
            self.static = torch.cuda.memory_allocated()

    def bytes(self, trainer: Trainer) -> dict[str, int] | None:
        """``peak_allocated``, ``peak_reserved``, ``static`` (weights, optimizer state), ``gradients``; None on CPU."""
        if not self.on_gpu:
            return None
        return {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "static": self.static,
            "gradients": gradient_bytes(trainer),
        }


def gradient_bytes(trainer: Trainer) -> int:
    """This rank's gradients of all trained parameters.

    Under DeepSpeed: its shard in ZeRO-1 and ZeRO-2, which free it after the step; 0 in ZeRO-3, whose gradient buffers
    are never freed and so are part of what stays.
    """
    stage = trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else 0
    if stage == 3:
        return 0
    total = 0
    for parameter in trainer.model_wrapped.parameters():
        if parameter.requires_grad:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            total += local.numel() * local.element_size()
    return total // trainer.args.world_size if stage else total
