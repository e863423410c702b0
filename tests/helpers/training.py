"""Runs of the real Trainer on tiny models, with and without the flag, for comparison."""

import torch
from tiny_models import VOCAB, tiny_model
from transformers import Trainer

from liger_trainer import LigerTrainingArguments


class Rows(torch.utils.data.Dataset):
    """Random token rows, padded on the right to one length.

    ``held(i)`` says how many tokens row ``i`` has, and ``valid(i)`` how many of its leading labels count.
    """

    def __init__(self, rows=24, tokens=12, valid=lambda i: 12, held=lambda i: 12):
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for i in range(rows):
            ids = torch.randint(3, VOCAB, (tokens,), generator=generator)
            labels = ids.clone()
            labels[min(valid(i), held(i)) :] = -100
            mask = (torch.arange(tokens) < held(i)).long()
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def arguments(output_dir, cls=LigerTrainingArguments, **overrides):
    """Five fp32 CPU steps, logged one by one, nothing saved."""
    settings = {
        "max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "seed": 7,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return cls(str(output_dir), **{**settings, **overrides})


def train(output_dir, use_liger, model_type="llama", dataset=None, model=None, trainer_kwargs=None, **overrides):
    """Train a tiny model; returns the Trainer after ``train()``."""
    trainer = Trainer(
        model=model if model is not None else tiny_model(model_type),
        args=arguments(output_dir, use_liger=use_liger, **overrides),
        train_dataset=dataset or Rows(),
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return trainer


def losses(trainer):
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_run(theirs, ours, tolerance=1e-5):
    """Losses and final weights of two Trainers agree."""
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(theirs)), rtol=tolerance, atol=1e-7)
    expected = theirs.model.state_dict()
    actual = ours.model.state_dict()
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        error = (actual[name] - weight).norm() / weight.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


def assert_same_tensors(actual, expected, name, tolerance=1e-5, all_names=True):
    assert actual.keys() == expected.keys() if all_names else actual.keys() >= expected.keys(), name
    for key, theirs in expected.items():
        error = (actual[key] - theirs).norm() / theirs.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}, {key}: {error:.2e}"
