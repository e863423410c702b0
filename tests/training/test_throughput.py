"""ThroughputCallback, on a clock that the model's own forwards move: every number is known beforehand."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from liger_trainer import apply_liger
from liger_trainer.training import data, throughput
from liger_trainer.training.throughput import FlopCount, ThroughputCallback

LENGTHS = [4, 8, 6, 8, 3, 8, 2, 8, 7, 8, 5, 8, 8, 8, 1, 8]  # 16 examples, in batches of 2
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
}


def small_model(model_type="llama", **changes):
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**SMALL, "num_key_value_heads": 1, "pad_token_id": 0, **changes})
    )


class Clock(TrainerCallback):
    """One second a training forward, a thousand an evaluation forward or a save."""

    def __init__(self, model, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: self.now))
        model.register_forward_pre_hook(self.forward)

    def forward(self, module, args):
        self.now += 1 if module.training else 1000

    def on_save(self, args, state, control, **kwargs):
        self.now += 1000


@pytest.fixture
def tokenizer():
    return data.train_tokenizer(iter(["a"]), 261)


def arguments(tmp_path, cls=TrainingArguments, **changes):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return cls(**{**defaults, **changes})


@pytest.mark.parametrize("kind", ["trainer", "sft"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_logs_tokens_and_time_of_each_interval(tmp_path, monkeypatch, tokenizer, kind, accumulation):
    model = small_model()
    clock = Clock(model, monkeypatch)
    # Evaluation and saving fall inside intervals (after step 3) as well as on their borders.
    changes = {"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 3}
    changes |= {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in LENGTHS]
    dataset = Dataset.from_list(rows)
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        args = arguments(tmp_path, SFTConfig, activation_checkpointing=False, max_length=None, **changes)
        common = {"processing_class": tokenizer, "train_dataset": dataset.remove_columns(["attention_mask", "labels"])}
        trainer = SFTTrainer(model, args, eval_dataset=common["train_dataset"].select(range(4)), **common)
    else:
        args = arguments(tmp_path, **changes)
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(model, args, collator, train_dataset=dataset, eval_dataset=dataset.select(range(4)))
    trainer.add_callback(clock)
    meter = ThroughputCallback()
    trainer.add_callback(meter)
    trainer.train()

    pairs = [LENGTHS[i : i + 2 * accumulation] for i in range(0, len(LENGTHS), 2 * accumulation)]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == list(range(2, len(pairs) + 1, 2))
    assert "tokens_per_second" not in history[0]  # the first two steps warm up
    for entry in history[1:]:
        steps = pairs[entry["step"] - 2 : entry["step"]]
        seconds = 2 * accumulation
        assert entry["tokens_per_second"] == pytest.approx(sum(map(sum, steps)) / seconds)
        padded = sum(2 * max(step[i : i + 2]) for step in steps for i in range(0, len(step), 2))
        assert entry["padded_tokens_per_second"] == pytest.approx(padded / seconds)
        assert entry["step_seconds"] == pytest.approx(accumulation)
    assert [interval.last_step for interval in meter.intervals] == [entry["step"] for entry in history[1:]]
    for interval, entry in zip(meter.intervals, history[1:], strict=True):
        assert interval.real_tokens / interval.seconds == entry["tokens_per_second"]
        assert interval.padded_tokens / interval.seconds == entry["padded_tokens_per_second"]
        assert interval.peak_gib["rss"] == entry["peak_memory_rss_gib"]
    assert all(entry["peak_memory_rss_gib"] > 0.05 and "mfu" not in entry for entry in history)
    final = trainer.state.log_history[-1]
    total = sum(map(sum, pairs[2:])) / ((len(pairs) - 2) * accumulation)
    assert final["tokens_per_second"] == pytest.approx(total)
    assert not any("tokens_per_second" in entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert not [hook for hook in model._forward_pre_hooks.values() if hook != clock.forward]


@pytest.mark.parametrize(("strategy", "mask"), [("epoch", "given"), ("no", "given"), ("epoch", "left out")])
def test_intervals_closed_by_an_epoch_or_the_end(tmp_path, monkeypatch, tokenizer, strategy, mask):
    model = small_model()
    if mask == "left out":
        assert apply_liger(model, {"padding_mask": True}).counts["padding_mask"] == 1
    Clock(model, monkeypatch)
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in LENGTHS]
    args = arguments(tmp_path, logging_strategy=strategy, save_strategy="no", num_train_epochs=2)
    trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), Dataset.from_list(rows))
    trainer.callback_handler.callbacks.insert(0, ThroughputCallback())  # before the flow callback asks for logs
    result = trainer.train()
    epochs = [entry for entry in trainer.state.log_history if "loss" in entry]
    if strategy == "epoch":
        first, second = (entry["tokens_per_second"] for entry in epochs)
        assert first == pytest.approx(sum(LENGTHS[4:]) / 6)
        assert second == pytest.approx(sum(LENGTHS) / 8)
    else:
        assert not epochs
    assert result.metrics["tokens_per_second"] == pytest.approx((sum(LENGTHS[4:]) + sum(LENGTHS)) / 14)


def test_intervals_of_single_steps(tmp_path, monkeypatch, tokenizer):
    """What a benchmark reads: every step on its own after a warm-up of its choice, and nothing of an earlier run."""
    model = small_model()
    Clock(model, monkeypatch)
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in LENGTHS]
    args = arguments(tmp_path, logging_steps=1, save_strategy="no")
    meter = ThroughputCallback(warmup_steps=3)
    trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), Dataset.from_list(rows), callbacks=[meter])
    for _ in range(2):
        trainer.train()
        assert [(i.last_step, i.steps, i.seconds) for i in meter.intervals] == [(n, 1, 1.0) for n in range(4, 9)]
        assert [i.real_tokens for i in meter.intervals] == [
            a + b for a, b in zip(LENGTHS[6::2], LENGTHS[7::2], strict=True)
        ]


def test_mfu_counts_flops_of_real_tokens_and_causal_pairs(tmp_path, monkeypatch, tokenizer):
    model = small_model()
    Clock(model, monkeypatch)
    monkeypatch.setattr(throughput, "peak_tflops", lambda device: 1e-6)
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in LENGTHS[:8]]
    args = arguments(tmp_path, logging_steps=4, save_strategy="no")
    trainer = Trainer(
        model, args, DataCollatorForSeq2Seq(tokenizer), Dataset.from_list(rows), callbacks=[ThroughputCallback]
    )
    trainer.train()
    flops = FlopCount.of(model)
    work = sum(n * flops.per_token + n * (n + 1) / 2 * flops.per_pair for n in LENGTHS[4:8])
    assert trainer.state.log_history[-1]["mfu"] == pytest.approx(work / 2 / 1e6)


def test_token_counts_of_each_input_form():
    model = small_model()
    callback = ThroughputCallback()
    args = SimpleNamespace(device=torch.device("cpu"), parallelism_config=None)
    callback.on_train_begin(args, None, None, model=model)
    ids = torch.full((2, 6), 5)
    restarted = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    forms = [
        ({"input_ids": ids}, (12, 12, 42)),
        ({"inputs_embeds": torch.randn(2, 6, 16)}, (12, 12, 42)),
        ({"input_ids": ids, "position_ids": restarted}, (12, 12, 6 + 6 + 21)),
        ({"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 2 + [0] * 4])}, (8, 12, 21 + 3)),
    ]
    for inputs, expected in forms:
        callback.counts = {}
        model.train()(**inputs)
        model.eval()(**inputs)
        assert callback.counts[torch.device("cpu")].tolist() == list(expected)
    callback.on_train_begin(args, None, None, model=model)  # a second run after one that broke off
    model.train()(input_ids=ids)
    assert callback.counts[torch.device("cpu")].tolist() == [12, 12, 42]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peak_of_known_devices(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.peak_tflops(torch.device("cuda")) == peak
    assert throughput.peak_tflops(torch.device("cpu")) is None


def test_flop_count():
    norms = (2 * 2 + 1) * 16
    for tied in (False, True):
        model = small_model(tie_word_embeddings=tied)
        weights = sum(p.numel() for p in model.parameters()) - norms - (0 if tied else 300 * 16)
        assert FlopCount.of(model) == FlopCount(6.0 * weights, 12.0 * 2 * 16)
    model.requires_grad_(False)
    assert FlopCount.of(model).per_token == 4 * weights

    model = small_model("mixtral", num_local_experts=4, num_experts_per_tok=1)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    weights = sum(p.numel() for p in model.parameters()) - norms - 300 * 16 - experts
    assert experts
    assert FlopCount.of(model).per_token == 6 * (weights + experts / 4)

    assert FlopCount.of(torch.nn.Linear(2, 2)).per_token is None
