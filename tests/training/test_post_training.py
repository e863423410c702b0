"""The quickstarts of DPO, GRPO and distillation, in short: the recipes themselves, on few pairs."""

import pytest
import torch
from transformers import AutoModelForMaskedLM

from liger_trainer.patching import patch_state
from liger_trainer.training import data
from liger_trainer.training.build import build_trainer, planned_report
from liger_trainer.training.post_training import load_reward
from liger_trainer.training.recipe import parse_recipe
from liger_trainer.training.recipe_arguments import RecipeError
from liger_trainer.training.rewards import short_words

SHORT = "--max_steps 2 --logging_steps 1 --dataset_split train --per_device_train_batch_size 4 --disable_tqdm true"
SHORT = [*SHORT.split(), "--use_cpu", "true", "--sample_prompt", "null", "--optim", "sgd"]


@pytest.fixture
def pairs(monkeypatch):
    """Few pairs in place of the docstrings, which take seconds to read."""
    words = ["make", "a", "list", "of", "numbers", "from", "text", "and", "sort", "it"]
    rows = [
        {"prompt": f"What does `f{i}` do?", "completion": " ".join(words[i % 7 :] * (1 + i % 3))} for i in range(24)
    ]
    monkeypatch.setattr(data, "embedded_pairs", lambda show_progress: rows)


def run(name, folder, *overrides):
    argv = [name, *SHORT, "--output_dir", str(folder), *overrides]
    planned = str(planned_report(argv))
    trainer = build_trainer(parse_recipe(argv))
    assert str(patch_state(trainer.model).report) == planned
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    state = patch_state(trainer.model)
    assert state.trl_head.calls_fused > 0
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def test_dpo(pairs, tmp_path):
    trainer, logs = run("dpo_quickstart", tmp_path)
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # policy and reference are equal
    assert patch_state(trainer.ref_model).trl_head.calls_fused > 0
    row = trainer.train_dataset[0]
    assert row["chosen_ids"] != row["rejected_ids"]


def test_grpo(pairs, tmp_path):
    overrides = ["--num_generations", "4", "--max_completion_length", "6"]
    _, logs = run("grpo_quickstart", tmp_path, *overrides)
    assert all(0.0 <= entry["reward"] <= 1.0 for entry in logs)


def test_distillation_from_the_quickstarts_model(pairs, tmp_path):
    teacher = str(tmp_path / "teacher")
    first = build_trainer(parse_recipe(["quickstart", *SHORT, "--max_steps", "1", "--output_dir", teacher]))
    first.train()
    first.save_model()
    names = ["--teacher_model_name_or_path", teacher, "--tokenizer", teacher]
    trainer, logs = run("distill_quickstart", tmp_path / "student", *names)
    assert 0 < logs[0]["loss"] < 1
    assert patch_state(trainer.teacher_model).trl_head.calls_fused > 0


def test_splade(pairs, tmp_path):
    runs = []
    for flag in ("false", "true"):
        argv = ["splade_quickstart", *SHORT, "--output_dir", str(tmp_path), "--use_liger", flag]
        trainer = build_trainer(parse_recipe(argv))
        trainer.train()
        runs.append([(e["loss"], e["accuracy"], e["active_entries"]) for e in trainer.state.log_history if "loss" in e])
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-5, atol=1e-6)
    assert trainer.model.get_output_embeddings().forward.func == trainer.hidden.project
    assert patch_state(trainer.model).report.counts["layer_norm"] > 0
    trainer.save_model()
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.model_type == "bert"


def test_rewards(tmp_path):
    assert short_words(["a list of numbers", "", [{"content": "numbers"}]]) == [0.75, 0.0, 0.0]
    (tmp_path / "mine.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]"
    )
    assert load_reward(f"{tmp_path}/mine.py:length")(["ab"]) == [2.0]
    assert load_reward("liger_trainer.training.rewards:short_words") is short_words
    for name in ("nothing", f"{tmp_path}/other.py:length", f"{tmp_path}/mine.py:width", "no.such.module:f"):
        with pytest.raises(RecipeError, match=f"reward: got '{name}'; must be module:function or file.py:function"):
            load_reward(name)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dpo_quickstart", ["--dataset", "synthetic"], "dataset: got 'synthetic'; must be another one"),
        ("dpo_quickstart", ["--auto_batch_size", "true"], "auto_batch_size: got True; must be false"),
        ("dpo_quickstart", ["--eval_examples", "2"], "eval_examples: got 2; must be 0"),
        ("dpo_quickstart", ["--reward", "a:b"], "reward: got 'a:b'; must be a function with trainer: grpo"),
        ("grpo_quickstart", ["--reward", "null"], "reward: got None; must be a function with trainer: grpo"),
        ("distill_quickstart", ["--teacher_model_name_or_path", "null"], "teacher_model_name_or_path: got None"),
        ("splade_quickstart", ["--dataset", "synthetic"], "dataset: got 'synthetic'; must be another one"),
    ],
)
def test_mistakes_are_named(name, overrides, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe([name, *overrides])
