"""Runs on data as people have it: streamed, packed, in their chat form, and logged to tensorboard."""

import json

import pytest
from tiny_recipes import write_recipe

from liger_trainer.training import data
from liger_trainer.training.build import build_trainer
from liger_trainer.training.recipe import parse_recipe
from liger_trainer.training.recipe_arguments import RecipeError


@pytest.fixture
def streamed(tmp_path):
    """Settings of a run on a stream of ShareGPT's conversations with a tokenizer of its own."""
    words = [f"word{i}" for i in range(40)]
    data.train_tokenizer(iter(words), 300).save_pretrained(str(tmp_path / "tokenizer"))
    turns = [[{"from": "human", "value": word}, {"from": "gpt", "value": word * 2}] for word in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"conversations": turn}) for turn in turns))
    return {
        "vocab_size": 300, "dataset": str(tmp_path / "rows.jsonl"), "tokenizer": str(tmp_path / "tokenizer"),
        "streaming": True, "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 32, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


@pytest.mark.long
def test_sft_packs_a_stream_of_conversations(tmp_path, streamed):
    sft = {"trainer": "sft", "packing": True, "assistant_only_loss": True, "use_peft": True, "lora_r": 2}
    trainer = build_trainer(parse_recipe([write_recipe(tmp_path, **streamed, **sft, eval_examples=3)]))
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > 2, "rows are packed"
    trained = trainer.processing_class.decode(batch["labels"][batch["labels"] != -100])
    assert "word" in trained.split("<|end|>")[0]
    assert "<|user|>" not in trained
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert trainer.evaluate()["eval_loss"] > 0
    assert any(entry.get("tokens_per_second", 0) > 0 for entry in trainer.state.log_history)


def test_the_trainer_streams_pairs_and_logs_to_tensorboard(tmp_path, streamed):
    pytest.importorskip("tensorboard")  # the dev extra has it
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"instruction": f"word{i}", "input": "", "output": f"word{i}" * 2} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = write_recipe(tmp_path, **streamed, report_to="tensorboard")
    trainer = build_trainer(parse_recipe([recipe]))
    assert not trainer.accelerator.dispatch_batches
    answers = [
        trainer.processing_class.decode([i for i in row["labels"] if i != -100]) for row in trainer.train_dataset
    ]
    expected = [f"word{i}word{i}<|end|>" for i in range(40)]
    assert answers != expected == sorted(answers, key=expected.index), "shuffled; only the answers have loss"
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    for name in ("train/loss", "train/tokens_per_second", "train/step_seconds"):
        assert name in events.Tags()["scalars"]
        assert len(events.Scalars(name)) >= 1


def test_a_missing_package_is_named(tmp_path, streamed, monkeypatch):
    monkeypatch.setattr("liger_trainer.training.build.find_spec", lambda name: None)
    for key, package in (("use_peft", "peft"), ("load_in_8bit", "bitsandbytes")):
        recipe = parse_recipe([write_recipe(tmp_path, **streamed)])
        setattr(recipe.model, key, True)
        with pytest.raises(RecipeError, match=f"{key}: got True; must be false unless .*pip install {package}"):
            build_trainer(recipe)


def test_what_a_stream_needs(tmp_path, streamed):
    for changes, message in (
        ({"max_steps": -1}, "max_steps: got -1; must be at least 1 with streaming"),
        ({"tokenizer": None}, "tokenizer: got None; must be named with streaming"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe([write_recipe(tmp_path, **{**streamed, **changes})])
    assert not parse_recipe([write_recipe(tmp_path, **{**streamed, "dataset": "embedded"})]).run.streams
