"""What ``recompute="auto"`` does on a GPU: ``python tests/helpers/memory_on_gpu.py steps|budgets [SHARE ...]``.

``steps``: a model of Llama-3.2-1B's shape, 32 full rows of 1024 tokens in a stock Trainer that asks for activation
checkpointing: as asked, by memory, and without. ``budgets``: 300 steps of random lengths with the longest batch last,
while another process holds a part of the card; and lengths that grow fourfold in the middle. Nothing may run out of
memory, and the peak stays under the budget.
"""

import contextlib
import gc
import logging
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback

from liger_trainer import LigerTrainingArguments
from liger_trainer.memory import recompute as recompute_module
from liger_trainer.memory.plan import peak
from liger_trainer.memory.recompute import recompute_of
from liger_trainer.patching import patch_state

GIB = 2**30
DEVICE = "cuda"
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
# Narrow, so that it fills memory with little work: 0.4 MB a token.
NARROW = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
HOLD = (
    "import sys, torch; x = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda'); "
    "print('held', flush=True); input()"
)


class Rows(torch.utils.data.Dataset):
    """Rows of the given lengths."""

    def __init__(self, lengths, vocabulary):
        self.lengths, self.vocabulary = lengths, vocabulary

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(3, self.vocabulary, (self.lengths[index],), generator=generator)


def padded(rows):
    """A batch padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Watch(TrainerCallback):
    """Times of the steps, and how far the plans were from the peaks."""

    def __init__(self):
        self.times, self.peaks, self.ratios, self.recomputed, self.tokens = [], [], [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        found = recompute_of(model)
        if found is not None and found.last is not None and found.last.recomputed is not None:
            planned = peak(found._costs(found.last), found.last.recomputed)
            self.ratios.append(torch.cuda.max_memory_allocated() / planned)
            self.recomputed.append(len(found.last.recomputed))
            self.tokens.append(found.last.tokens)

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.start)
        self.peaks.append(torch.cuda.max_memory_allocated() / GIB)


def train(shape, lengths, rows, checkpointing, config):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**shape, max_position_embeddings=16384), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        args = LigerTrainingArguments(
            folder, use_liger=True, liger_config=config, per_device_train_batch_size=rows,
            max_steps=len(lengths) // rows, remove_unused_columns=False,
            activation_checkpointing=checkpointing, bf16=True, logging_steps=1, report_to="none", disable_tqdm=True,
            save_strategy="no", train_sampling_strategy="sequential", dataloader_num_workers=2,
        )  # fmt: skip
        trainer = Trainer(
            model, args, train_dataset=Rows(lengths, shape["vocab_size"]), data_collator=padded, callbacks=[watch]
        )
        trainer.train()
    stats = torch.cuda.memory_stats()
    watch.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    watch.report = [a.variant for a in patch_state(model).report.applied if a.kind == "recompute"]
    watch.retries, watch.ooms, watch.reserved = (
        stats["num_alloc_retries"],
        stats["num_ooms"],
        stats["reserved_bytes.all.peak"],
    )
    del trainer, model
    gc.collect()
    torch.cuda.empty_cache()
    return watch


def steps(shape=LLAMA_1B, rows=32, tokens=1024, number=9):
    """Step time and peak of the three settings, and the first losses, which must agree."""
    arms = {"all": (True, {"recompute": "all"}), "auto": (True, {}), "none": (False, {"recompute": "all"})}
    for name in ("all", "auto", "none", "auto", "all"):
        watch = train(shape, [tokens] * rows * number, rows, *arms[name])
        print(
            f"{name:<5} {1000 * statistics.median(watch.times[3:]):7.1f} ms  peak {max(watch.peaks):5.1f} GiB  "
            f"recomputed {watch.recomputed[-1:]}  peak / planned {[round(r, 3) for r in watch.ratios[-2:]]}  "
            f"losses {[round(loss, 4) for loss in watch.losses[:3]]}  {watch.report}",
            flush=True,
        )


@contextlib.contextmanager
def held(size):
    """Another process that holds ``size`` bytes of the card."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()
        yield
    finally:
        process.communicate("\n")


def budgets(*shares, number=300, rows=24, longest=4096):
    """Peaks against budgets, which are these shares of the card."""
    torch.zeros(1, device=DEVICE)
    total = torch.cuda.mem_get_info()[1]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(64, longest, ((number - 1) * rows,), generator=generator).tolist()
    runs = {
        f"{share:.0%}, random lengths, longest last": (share, [*random, *[2 * longest] * rows])
        for share in shares or (0.4, 0.6, 0.9)
    }
    runs["60%, fourfold in the middle"] = (0.6, [longest // 4] * rows * 30 + [longest] * rows * 30)
    for name, (share, lengths) in runs.items():
        torch.cuda.reset_accumulated_memory_stats()
        with held(int((1 - share) * total)):
            budget = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            watch = train(NARROW, lengths, rows, True, {})
        print(
            f"{name}: {len(watch.times)} steps, budget {budget / GIB:.1f} GiB, peak {max(watch.peaks):.1f} GiB, "
            f"of the last step {watch.peaks[-1]:.1f} GiB with {watch.tokens[-1]} tokens and {watch.recomputed[-1]} "
            f"of 24 layers recomputed; mean {statistics.mean(watch.recomputed):.1f}; peak / planned "
            f"{min(watch.ratios):.3f} to {max(watch.ratios):.3f}; reserved {watch.reserved / GIB:.1f} GiB, "
            f"{watch.retries} retries of the allocator, {watch.ooms} out of memory; "
            f"{1000 * statistics.median(watch.times):.0f} ms a step, {sum(watch.times):.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    logging.getLogger(recompute_module.__name__).setLevel(logging.WARNING)
    {"steps": steps, "budgets": budgets}[sys.argv[1]](*map(float, sys.argv[2:]))
