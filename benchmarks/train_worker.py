"""One rank of one arm of the training benchmark: the recipe's own Trainer, timed.

``python -m benchmarks.train_worker --hello DEVICE`` says what the device is; ``accelerate launch ... -m
benchmarks.train_worker JOB`` waits for the job's gate and trains. The first rank writes a row beside the gate, and so
does every rank that fails, which then ends at once so that no other waits for it in a collective.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

from benchmarks.common import emit, write_whole
from benchmarks.measure import describe_device
from benchmarks.train_arms import ARMS

# Needed to train, slow to import, and harmless to the device.
SLOW_IMPORTS = ("liger_trainer.train", "transformers.models.auto.modeling_auto", "benchmarks.step_meter")


def flags(overrides: dict) -> list[str]:
    """Overrides as a recipe's command line, on which ``None`` unsets a key."""
    from liger_trainer.training.recipe import as_flags

    return [*as_flags(overrides), *(word for k, v in overrides.items() if v is None for word in (f"--{k}", "null"))]


def overrides_of(job: dict, folder: str) -> dict:
    """All overrides of a job: the suite's, those of the measurement, the arm's."""
    measured = {
        "max_steps": job["warmup"] + job["steps"],
        "logging_strategy": "steps",
        "logging_steps": job["window"],  # a log reads the loss, and so waits for the device
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": folder,
    }
    return {**job["overrides"], **measured, **ARMS[job["arm"]].overrides}


def train(job: dict) -> dict:
    """Build the recipe's Trainer, train, and return the row: times, tokens and memory over all ranks."""
    from transformers.trainer_callback import PrinterCallback

    from benchmarks.step_meter import Memory, StepTimes, TokenCount
    from liger_trainer.training.recipe import parse_recipe
    from liger_trainer.training.throughput import ThroughputCallback
    from liger_trainer.training.train import build_trainer

    warmup, steps = job["warmup"], job["steps"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe([job["recipe"], *flags(overrides_of(job, folder))])
        args = recipe.training
        for name, value in ARMS[job["arm"]].arguments.items():
            setattr(args, name, value)
        recipe.run.synthetic_examples = (  # no more rows than the steps take
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * args.max_steps
        )
        trainer = build_trainer(recipe)
        evidence = ARMS[job["arm"]].prepare(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ThroughputCallback)  # its log entries are device work and collectives of every arm
        device = args.device.type
        timer, memory = StepTimes(device, warmup, job["window"]), Memory(device, warmup + steps)
        tokens = TokenCount(trainer)
        callbacks = [timer, memory]
        if job["profile"] and args.process_index == 0:
            from benchmarks.profile_step import KernelProfile

            callbacks.append(KernelProfile(device, warmup, steps))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
    row = over_ranks(timer.step_ms(), tokens.after(warmup), memory.bytes(trainer), job["window"], args.device)
    row |= {"status": "ok", **timer.first_and_last(), "evidence": shown(job["arm"], evidence())}
    return row | (callbacks[2].summary() if len(callbacks) == 3 else {})


def shown(arm: str, evidence: dict) -> dict:
    """``evidence`` that ``arm`` was active.

    Raises:
        RuntimeError: there is some that it was not, so that the numbers are those of another arm.
    """
    if not all(evidence.values()):
        raise RuntimeError(f"arm {arm} was not active in this run: {evidence}")
    return evidence


def over_ranks(windows_ms: list[float], tokens: tuple[int, int], memory: dict | None, window: int, device) -> dict:
    """The numbers of all ranks: the slowest one's windows, the sum of tokens, the largest memory.

    Args:
        windows_ms: mean milliseconds of a step, one number a window.
        tokens: real and padded tokens of the timed steps.
        memory: bytes by kind, or None.
        window: steps of a window.
        device: where collectives run.
    """
    from liger_trainer.training.throughput import reduce_over_ranks

    windows_ms = reduce_over_ranks(windows_ms, "max", device)
    real, padded = reduce_over_ranks([float(n) for n in tokens], "sum", device)
    seconds = sum(windows_ms) * window / 1e3
    row = {
        "step_ms": statistics.mean(windows_ms),
        "windows_ms": [round(t, 3) for t in windows_ms],
        "tokens_per_s": real / seconds,
        "padded_tokens_per_s": padded / seconds,
        "tokens": int(real),
        "padded_tokens": int(padded),
    }
    names = ("peak_allocated", "peak_reserved", "static", "gradients", "above_static")
    if memory is None:
        return row | dict.fromkeys(f"{name}_gib" for name in names)
    memory["above_static"] = memory["peak_allocated"] - memory["static"] - memory["gradients"]
    largest = reduce_over_ranks([float(memory[name]) for name in names], "max", device)
    return row | {f"{name}_gib": value / (1 << 30) for name, value in zip(names, largest, strict=True)}


def end_with(owner: int) -> None:
    """End this rank when the benchmark or the launcher that started it is gone, whatever it is waiting for."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            try:
                os.kill(owner, 0)
            except ProcessLookupError:
                break
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stand_by(job: dict) -> bool:
    """Do the slow imports, say so, then wait for the word: the workers before this one have the device until then."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    if importlib.util.find_spec("deepspeed"):  # accelerate imports it in every run
        importlib.import_module("deepspeed")
    ARMS[job["arm"]].import_packages()
    gate = Path(job["gate"])
    gate.with_name(f"ready{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    while not gate.exists():
        time.sleep(0.02)
    return gate.read_text() == "go"


def failure(error: Exception) -> dict:
    """The row of a run that failed: out of memory, which is a result, or anything else."""
    from liger_trainer.training.failures import is_out_of_memory

    status = "oom" if is_out_of_memory(error) else "error"
    return {"status": status, "note": f"{type(error).__name__}: {error}"[:400]}


def run(job: dict) -> None:
    """Train and write the row; ends the process."""
    end_with(job["owner"])
    try:
        if not stand_by(job):
            return
        row = train(job)
    except Exception as error:
        write(job, failure(error) | {"traceback": traceback.format_exc()})
        end(1)
    if os.environ.get("RANK", "0") == "0":
        write(job, row)
    if torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank that is through it may be gone before this one is
            torch.distributed.barrier()
    end(0)


def write(job: dict, row: dict) -> None:
    """Leave this rank's row, whole or not at all, in a file of its own: in one log, those of two ranks can mix."""
    write_whole(Path(job["gate"]).with_name(f"row{os.environ.get('RANK', '0')}"), json.dumps(row))


def end(status: int) -> None:
    """Leave at once: freeing a large model in order, or ending a group whose other ranks wait, takes time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--hello":
        emit(describe_device(sys.argv[2]) | {"devices": torch.cuda.device_count() if sys.argv[2] == "cuda" else None})
    else:
        run(json.loads(sys.argv[1]))
