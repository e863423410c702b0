"""One arm of the training benchmark: the stock Trainer on random tokens, timed by a callback."""

import importlib.util
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.common import emit
from benchmarks.measure import describe_device, synchronize
from benchmarks.models import make_config
from benchmarks.profile_step import KernelProfile

GIB = 1 << 30
IMPORTS = {"trl": "trl.trainer.utils", "liger_kernel": "liger_kernel.transformers"}
NEEDS = {"liger": ["liger_kernel"], "trl_head": ["trl"], "liger_trl_head": ["trl", "liger_kernel"]}


class RandomTokens(Dataset):
    """``count`` rows of ``seq`` random token ids, every one of them a label; the same in every process."""

    def __init__(self, count: int, seq: int, vocab: int):
        self.tokens = torch.randint(vocab, (count, seq), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class StepTimes(TrainerCallback):
    """Mean step time of windows of ``window`` steps, the device drained between windows and not inside them.

    Draining at every step would add to each the time the host needs to get ahead of the device again, which users
    do not pay.
    """

    def __init__(self, device: str, warmup: int, window: int):
        self.device, self.warmup, self.window, self.ends, self.losses = device, warmup, window, [], []

    def on_step_end(self, args, state, control, **kwargs):
        """Take the time where a window ends."""
        done = state.global_step - self.warmup
        if done >= 0 and done % self.window == 0:
            synchronize(self.device)
            self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep the mean loss of each window."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def step_ms(self) -> list[float]:
        """One mean for each window after the warm-up."""
        return [(end - start) * 1e3 / self.window for start, end in pairwise(self.ends)]


def make_arguments(job: dict, folder: str) -> TrainingArguments:
    """The stock arguments, the same in every arm, and what switches the arm on."""
    arm, options = job["arm"], {}
    cls = TrainingArguments
    if arm == "ours":
        from liger_trainer import LigerTrainingArguments as cls

        options = {"use_liger": True}
    elif arm == "liger":
        options = {"use_liger_kernel": True}
    elif arm == "liger_trl_head":
        off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
        options = {"use_liger_kernel": True, "liger_kernel_config": off}
    elif arm == "compile":
        options = {"torch_compile": True}
    return cls(
        output_dir=folder,
        per_device_train_batch_size=job["batch"],
        max_steps=job["warmup"] + job["steps"],
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        activation_checkpointing=job["checkpointing"],
        logging_steps=job["window"],  # a log reads the loss, and so waits for the device
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=job["device"] == "cpu",
        seed=0,
        **options,
    )


def make_model(job: dict) -> torch.nn.Module:
    """Random weights, made on the device in the training dtype, the same in every arm."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if job["device"] == "cuda" else torch.float32
    with torch.device(job["device"]):
        model = AutoModelForCausalLM.from_config(make_config(job["model"]), dtype=dtype, attn_implementation="sdpa")
    if job["arm"] in ("trl_head", "liger_trl_head"):
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        headed = model.forward
        # TRL's own trainers pass the flag in compute_loss; under the stock Trainer nobody would
        model.forward = lambda *args, **kwargs: headed(*args, fused_lm_head=True, **kwargs)
    return model


def stand_by(job: dict) -> bool:
    """Import what the arm needs, then wait for the word: the worker before this one has the device until then."""
    if job["arm"] == "ours":
        pass
    elif job["arm"] in NEEDS:
        for package in NEEDS[job["arm"]]:
            if importlib.util.find_spec(package):
                importlib.import_module(IMPORTS[package])
    gate = Path(job["gate"])
    while not gate.exists():
        time.sleep(0.05)
    return gate.read_text() == "go"


def main(job: dict) -> None:
    """Train ``warmup + steps`` steps and emit one row."""
    if "gate" in job and not stand_by(job):
        return
    emit(describe_device(job["device"]))
    missing = [p for p in NEEDS.get(job["arm"], []) if importlib.util.find_spec(p) is None]
    if missing:
        emit({"kind": "row", "status": "absent", "note": f"{', '.join(missing)} not installed"})
        return
    try:
        row = train(job)
    except torch.OutOfMemoryError as error:
        row = {"status": "oom", "note": str(error)[:200]}
    emit({"kind": "row", **row})


def train(job: dict) -> dict:
    """Run the Trainer; step times, tokens per second, losses and peak memory."""
    device, steps = job["device"], job["warmup"] + job["steps"]
    timer = StepTimes(device, job["warmup"], job["window"])
    profile = KernelProfile(device, job["warmup"], job["steps"]) if job["profile"] else None
    with tempfile.TemporaryDirectory() as folder:
        arguments = make_arguments(job, folder)
        model = make_model(job)
        data = RandomTokens(job["batch"] * steps, job["seq"], model.config.vocab_size)
        callbacks = [timer] if profile is None else [timer, profile]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    times = timer.step_ms()
    step = statistics.median(times)
    row = {
        "status": "ok",
        "step_ms": step,
        "steps_ms": [round(t, 3) for t in times],
        "tokens_per_s": job["batch"] * job["seq"] / step * 1e3,
        "first_loss": timer.losses[0],
        "last_loss": timer.losses[-1],
        "peak_allocated_gib": None,
        "peak_reserved_gib": None,
    }
    if device == "cuda":
        row["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return row if profile is None else row | profile.summary()
