"""One rank of a timed run: the stock Trainer on a Llama 3 8B of random weights, activation checkpointing, bf16.

Started by ``distributed_gpu.py`` as ``JOB RESULT_FILE``. Peak memory is that of the steps after the first: making and
sharding the model is left out.
"""

import importlib.util
import json
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from distributed.worker import init_deepspeed, settings
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.models import make_config
from benchmarks.train_worker import GIB, RandomTokens, StepTimes
from liger_trainer import LigerTrainingArguments

CUDA = torch.cuda.is_available()
WARMUP, WINDOW, WINDOWS = 3, 2, 3


class PeakOfLaterSteps(TrainerCallback):
    """Forgets the peak of building the model and of the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        """Reset after the first step."""
        if state.global_step == 1 and CUDA:
            torch.cuda.reset_peak_memory_stats()


def train(job: dict, folder: str) -> dict:
    """Step time, tokens per second of all ranks, largest peak of any rank."""
    partitioned = job["engine"] == "zero3"  # while it is made, by DeepSpeed
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if job["engine"].startswith("zero"):
        init_deepspeed()
    options = {} if job["arm"] == "hf" else {"use_liger": True}
    args = (TrainingArguments if job["arm"] == "hf" else LigerTrainingArguments)(
        folder, per_device_train_batch_size=job["batch"], max_steps=WARMUP + WINDOW * WINDOWS, learning_rate=1e-5,
        lr_scheduler_type="constant", optim="adamw_torch_fused", bf16=True, activation_checkpointing=True,
        logging_steps=WINDOW, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        remove_unused_columns=False, use_cpu=not CUDA, **settings(job["engine"]), **options,
    )  # fmt: skip
    config = make_config(job["model"])
    torch.manual_seed(0)
    with nullcontext() if partitioned else args.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    rows = RandomTokens(job["batch"] * args.world_size * args.max_steps, job["seq"], config.vocab_size)
    timer = StepTimes(args.device.type, WARMUP, WINDOW)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[timer, PeakOfLaterSteps()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    step = torch.tensor([statistics.median(timer.step_ms())], device=args.device)
    peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if CUDA else [0, 0]
    peaks = torch.tensor(peaks, device=args.device) / GIB
    for values in (step, peaks):
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return {
        "status": "ok",
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "step_ms": step.item(),
        "tokens_per_s": job["batch"] * job["seq"] * args.world_size / step.item() * 1e3,
        "peak_allocated_gib": peaks[0].item(),
        "peak_reserved_gib": peaks[1].item(),
        "losses": timer.losses,
    }


def main(job: str, result: str) -> None:
    """Train once; the first rank, or the one that runs out of memory, writes the row."""
    job = json.loads(job)
    if job["engine"].startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        row = {"status": "absent"}
    else:
        try:
            with tempfile.TemporaryDirectory() as folder:
                row = train(job, folder)
        except torch.OutOfMemoryError as error:
            Path(result).write_text(json.dumps({"status": "oom", "note": str(error)[:200]}))
            raise  # ends the other ranks as well, which wait for this one
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(result).write_text(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
