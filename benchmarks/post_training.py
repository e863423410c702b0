"""Training steps of TRL's trainers on padded pairs: stock, with ours, and with liger-kernel.

``python -m benchmarks.post_training OUT.json [--tasks dpo,grpo] [--tiny] [--seconds 190]`` runs each arm in a process
of its own, on random weights of Qwen2.5-1.5B's shapes in bf16, and writes time of a step, peak memory and losses. GRPO
gets fixed completions. Everything else is TRL's default, activation checkpointing included.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from benchmarks.op_worker import describe_device

ARMS = {"stock TRL": {}, "liger_trainer": {"use_liger": True}, "liger-kernel": {"use_liger_kernel": True}}
WARMUP, STEPS = 3, 6
SIZES: dict[str, Any] = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "vocab_size": 151936,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512
}  # fmt: skip
WORDS = 500


def make_model(tiny: bool, seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights, on the device and in the dtype in which they train."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        **(TINY if tiny else SIZES), num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("cpu" if tiny else "cuda"):
        return Qwen2ForCausalLM._from_config(config, dtype=torch.float32 if tiny else torch.bfloat16)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return tokenizer


def ids(length: int, seed: int) -> list[int]:
    """Random tokens."""
    return torch.randint(3, WORDS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def text(length: int, seed: int) -> str:
    """Random words."""
    return " ".join(f"w{i}" for i in ids(length, seed))


def lengths(count: int, longest: int) -> list[int]:
    """Skewed as answers are: half of them below a third of the longest."""
    return [max(4, int(longest * (((i * 37) % count + 1) / count) ** 2)) for i in range(count)]


class Meter(TrainerCallback):
    """Times of the steps after the warm-up and the peak memory in them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if state.global_step == WARMUP:
                torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note how long it was."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step > WARMUP:
            self.times.append(1e3 * (time.perf_counter() - self.started))


def make_trainer(task: str, flags: dict[str, Any], tiny: bool, folder: str) -> Any:
    """The task's trainer. Batches have 16 rows."""
    pairs, longest, rows = (2, 32, 18) if tiny else (8, 768, 8 * (WARMUP + STEPS))
    settings = {
        "output_dir": folder, "max_steps": WARMUP + STEPS, "per_device_train_batch_size": pairs, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-6, "use_cpu": tiny,
        "bf16": False, "optim": "adamw_torch_fused", **flags,
    }  # fmt: skip
    name = {"dpo": "DPO", "grpo": "GRPO", "sft": "SFT", "kto": "KTO", "orpo": "ORPO", "gkd": "GKD"}[task]
    module = f"trl.experimental.{task}" if task in ("orpo", "gkd") else "trl"
    cls = getattr(importlib.import_module(module), f"{name}Config")
    if flags.get("use_liger"):
        cls = getattr(importlib.import_module("liger_trainer"), f"Liger{name}Config")
    long = lengths(rows, longest)
    common: dict[str, Any] = {"processing_class": make_tokenizer(), "callbacks": [Meter()]}
    data: list[dict[str, Any]]
    if task in ("dpo", "orpo"):
        data = [
            {"prompt": text(longest // 3, i), "chosen": text(n, 1000 + i), "rejected": text(max(4, n // 2), 2000 + i)}
            for i, n in enumerate(long)
        ]
        settings |= {"max_length": 2 * longest}
        common |= {"ref_model": make_model(tiny)} if task == "dpo" else {}
    elif task == "kto":
        settings |= {"max_length": 2 * longest, "per_device_train_batch_size": 2 * pairs}
        data = [
            {"prompt": text(longest // 3, i), "completion": text(n, 1000 + i), "label": i % 2 == 0}
            for i, n in enumerate(lengths(2 * rows, longest))
        ]
        common |= {"ref_model": make_model(tiny)}
    elif task == "grpo":
        settings |= {
            "per_device_train_batch_size": 2 * pairs, "num_generations": pairs, "beta": 0.0,
            "max_completion_length": longest,
        }  # fmt: skip
        data = [{"prompt": text(longest // 3, i)} for i in range(rows)]
        common |= {"reward_funcs": _reward, "rollout_func": _fixed_completions(longest)}
    else:
        settings |= {"max_length": 2 * longest, "per_device_train_batch_size": 2 * pairs}
        roles = ("user", "assistant")
        data = [
            {"messages": [{"role": r, "content": text(n if r == "assistant" else longest // 3, i)} for r in roles]}
            for i, n in enumerate(lengths(2 * rows, longest))
        ]
        if task == "gkd":
            settings |= {"lmbda": 0.0}
            common |= {"teacher_model": make_model(tiny, seed=1)}
    args = cls(**settings)
    trainer_cls = getattr(importlib.import_module(module), f"{name}Trainer")
    return trainer_cls(model=make_model(tiny), args=args, train_dataset=Dataset.from_list(data), **common)


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def _fixed_completions(longest: int) -> Callable[..., dict[str, Any]]:
    """A rollout in which nothing is generated: the same random completions in each arm."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        completions = [ids(n, i) for i, n in enumerate(lengths(len(prompts), longest))]
        tokenized = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": tokenized, "completion_ids": completions, "logprobs": None}

    return rollout


def run_arm(task: str, arm: str, tiny: bool) -> dict[str, Any]:
    """Train one arm."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, ARMS[arm], tiny, folder)
        trainer.train()
    meter = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Meter))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    on_gpu = torch.cuda.is_available()
    return {
        "status": "ok", "step_ms": statistics.median(meter.times), "steps_ms": meter.times,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None, "losses": logged,
        "device": describe_device("cuda" if on_gpu else "cpu"),
    }  # fmt: skip


def main() -> None:
    """Run all arms, or with ``--arm`` one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default="dpo,grpo")
    parser.add_argument("--arm")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=190.0, help="arms that would start later are left out")
    args = parser.parse_args()
    if args.arm:
        args.out.write_text(json.dumps(run_arm(args.tasks, args.arm, args.tiny)))
        return
    end, rows = time.monotonic() + args.seconds, []
    for task in args.tasks.split(","):
        for arm in ARMS:
            left = end - time.monotonic()
            row: dict[str, Any] = {"status": "left out: no time"}
            if left > 0:
                row = _in_a_process(task, arm, args.tiny, left + 30)
            rows.append({"task": task, "arm": arm, **row})
            print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("device", "steps_ms")}), flush=True)
            args.out.write_text(json.dumps(rows, indent=1))


def _in_a_process(task: str, arm: str, tiny: bool, seconds: float) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, "-m", "benchmarks.post_training", out.name, "--tasks", task, "--arm", arm]
        try:
            done = subprocess.run(
                [*command, *(["--tiny"] if tiny else [])], capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"status": "timed out"}
        if done.returncode:
            return {"status": "error", "note": done.stderr[-1500:]}
        return json.loads(Path(out.name).read_text())


if __name__ == "__main__":
    main()
