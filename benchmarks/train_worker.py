"""One rank of one arm of the training benchmark: the recipe's own Trainer, timed.

``python -m benchmarks.train_worker --hello DEVICE`` reports the device. ``accelerate launch ... -m
benchmarks.train_worker JOBS`` trains; the first rank sends a row for each job, and so does every rank that fails, which
then ends at once so that no other rank waits for it in a collective.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import traceback
from typing import Any, NoReturn

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.op_worker import describe_device, release_memory
from benchmarks.peers import PEERS
from benchmarks.rows import MEMORY
from benchmarks.workers import emit
from liger_trainer.training import data
from liger_trainer.training.build import build_trainer
from liger_trainer.training.failures import is_out_of_memory
from liger_trainer.training.recipe import as_flags, parse_recipe
from liger_trainer.training.throughput import GIB, Interval, ThroughputCallback, reduce_over_ranks


def flags(overrides: dict) -> list[str]:
    """Overrides as a recipe's command line, on which ``None`` unsets a key."""
    return [*as_flags(overrides), *(word for k, v in overrides.items() if v is None for word in (f"--{k}", "null"))]


def overrides_of(job: dict, folder: str) -> dict:
    """All overrides of a job: the suite's, the measurement's, the arm's."""
    measured = {
        "max_steps": job["warmup"] + job["steps"],
        "logging_strategy": "steps",
        "logging_steps": job["window"],  # a log drains the device and ends an interval of the throughput callback
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": folder,
    }
    return {**job["overrides"], **measured, **(PEERS[job["arm"]].overrides or {})}


class Memory(TrainerCallback):
    """CUDA memory of this rank: the peaks after the first step, and what is left once gradients are freed.

    Creating and sharding the model, and creating the optimizer's state, happen before the second step and are left out.
    """

    def __init__(self, device: str, steps: int):
        self.device, self.on_gpu, self.steps, self.static = device, device == "cuda", steps, 0

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """Release cached memory left by creating and sharding the model, or it would count as reserved."""
        release_memory(self.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reset the peak after the first step; after the last, with gradients freed, record what is left."""
        if self.on_gpu and state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()
        elif self.on_gpu and state.global_step == self.steps:
            self.static = torch.cuda.memory_allocated()

    def gib(self, trainer: Trainer) -> dict[str, float | None]:
        """The largest rank's numbers; ``static`` is weights and optimizer state. None on the CPU."""
        if not self.on_gpu:
            return dict.fromkeys(MEMORY)
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        gradients = gradient_bytes(trainer)
        values = [float(n) for n in (peak, reserved, self.static, gradients, peak - self.static - gradients)]
        largest = reduce_over_ranks(values, "max", trainer.args.device)
        return {name: value / GIB for name, value in zip(MEMORY, largest, strict=True)}


def gradient_bytes(trainer: Trainer) -> int:
    """This rank's gradients of all trained parameters.

    Under DeepSpeed: its shard in ZeRO-1 and ZeRO-2, which free it after the step; 0 in ZeRO-3, whose gradient buffers
    are never freed and so count as static.
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


def train(job: dict) -> dict:
    """Build the recipe's Trainer, train, and return the row: times, tokens and memory over all ranks."""
    peer, warmup, steps = PEERS[job["arm"]], job["warmup"], job["steps"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe([job["recipe"], *flags(overrides_of(job, folder))])
        args = recipe.training
        for name, value in peer.arguments.items():
            setattr(args, name, value)
        recipe.run.synthetic_examples = (  # no more rows than the steps take
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * args.max_steps
        )
        trainer = build_trainer(recipe)
        evidence = [prepare(trainer) for prepare in peer.prepare]
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ThroughputCallback)  # replaced by one with the job's warm-up
        meter, memory = ThroughputCallback(warmup), Memory(args.device.type, warmup + steps)
        trainer.add_callback(meter)
        trainer.add_callback(memory)
        profile = None
        if job["profile"] and args.process_index == 0:
            from benchmarks.profile_step import KernelProfile

            profile = KernelProfile(args.device.type, warmup, steps)
            trainer.add_callback(profile)
        trainer.train()
    row = {"status": "ok", **speed(meter.intervals), **memory.gib(trainer), **first_and_last(trainer.state.log_history)}
    if wrong := [f"{key} {row[key]}" for key in ("last_grad_norm", "last_loss") if math.isnan(row[key] or 0)]:
        raise RuntimeError(f"arm {job['arm']} computed {', '.join(wrong)}")
    row["evidence"] = {key: value for part in evidence for key, value in part().items()}
    if not all(row["evidence"].values()):
        raise RuntimeError(f"arm {job['arm']} was not active in this run: {row['evidence']}")
    return row | (profile.summary() if profile else {})


def speed(intervals: list[Interval]) -> dict:
    """Times and tokens of the timed windows, over all ranks."""
    windows_ms = [1e3 * interval.seconds / interval.steps for interval in intervals]
    seconds = sum(interval.seconds for interval in intervals)
    real, padded = (sum(getattr(i, name) for i in intervals) for name in ("real_tokens", "padded_tokens"))
    return {
        "step_ms": statistics.mean(windows_ms),
        "windows_ms": [round(ms, 3) for ms in windows_ms],
        "tokens_per_s": real / seconds,
        "padded_tokens_per_s": padded / seconds,
        "tokens": real,
        "padded_tokens": padded,
    }


def first_and_last(log_history: list[dict]) -> dict[str, Any]:
    """The mean loss of each window, of the first and the last one, and the gradient norm (unclipped) of these two."""
    found: dict[str, Any] = {"losses": [round(entry["loss"], 6) for entry in log_history if "loss" in entry]}
    for name in ("loss", "grad_norm"):
        values = [float(entry[name]) for entry in log_history if name in entry]
        found |= {f"first_{name}": values[0] if values else None, f"last_{name}": values[-1] if values else None}
    return found


def main(jobs: list[dict]) -> NoReturn:
    """Train each job and send its row; ends the process, at the first failure."""
    data.embedded_pairs = functools.cache(data.embedded_pairs)  # reading all docstrings takes longer than a short run
    for job in jobs:
        try:
            row = train(job)
        except Exception as error:
            status = "oom" if is_out_of_memory(error) else "error"
            traceback.print_exc()
            emit({"kind": "row", "status": status, "note": f"{type(error).__name__}: {error}"[:400]})
            end(1)
        if os.environ.get("RANK", "0") == "0":
            emit({"kind": "row", **row})
    if torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # another rank may pass the barrier and exit first
            torch.distributed.barrier()
    end(0)


def end(status: int) -> NoReturn:
    """Exit at once: freeing a large model in order, or ending a group whose other ranks wait, takes time."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--hello":
        emit(describe_device(sys.argv[2]) | {"devices": torch.cuda.device_count() if sys.argv[2] == "cuda" else None})
    else:
        main(json.loads(sys.argv[1]))
