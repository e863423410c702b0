"""Synthetic rows: their ids, lengths and labels, and the offline runs they make possible."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForSeq2Seq

from liger_trainer.training import synthetic
from liger_trainer.training.build import build_dataset, build_trainer
from liger_trainer.training.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
SHAPED = [
    path
    for path in sorted((ROOT / "recipes").glob("**/*.yaml"))
    if "model_config" in (content := yaml.safe_load(path.read_text())) and content.get("dataset") != "embedded"
]
# Parameters in 1e9, as the models' publishers state them or count them on the hub.
PARAMETERS = {
    "llama3_8b": 8.030, "llama3_8b_lengths": 8.030, "llama3_8b_alpaca": 8.030, "llama3_8b_zero3": 8.030,
    "medusa_stage1": 8.030, "medusa_stage2": 8.030, "qwen2_7b": 7.616, "gemma_7b": 8.538, "mistral_7b": 7.242,
    "phi3_mini": 3.821, "qwen3_8b_lora_ddp": 8.191, "llama3.2_1b": 1.236, "llama3.2_3b": 3.213, "qwen2.5_1.5b": 1.544,
}  # fmt: skip
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def config(**changes):
    values = {"vocab_size": 10, "bos_token_id": 3, "eos_token_id": [9, 4], "pad_token_id": None}
    return AutoConfig.for_model("llama", **{**values, **changes})


def test_full_rows():
    dataset = synthetic.rows("full", 200, 50, config(), seed=1)
    ids = np.array(dataset["input_ids"])
    assert ids.shape == (200, 50)
    assert dataset["labels"] == dataset["input_ids"]
    values, counts = np.unique(ids, return_counts=True)
    assert values.tolist() == [0, 1, 2, 4, 5, 6, 7, 8], "special tokens, of a list the first, are left out"
    assert counts.min() > 1250 - 5 * 1250**0.5
    assert synthetic.rows("full", 200, 50, config(), seed=1)["input_ids"] == dataset["input_ids"]
    assert synthetic.rows("full", 200, 50, config(), seed=2)["input_ids"] != dataset["input_ids"]


@pytest.mark.parametrize(("max_length", "shorter"), [(50, 49), (2, 2)])
def test_every_second_ragged_row_lacks_a_token(max_length, shorter):
    dataset = synthetic.rows("ragged", 5, max_length, config(), seed=1)
    assert [len(ids) for ids in dataset["input_ids"]] == [max_length, shorter, max_length, shorter, max_length]
    assert dataset["labels"] == dataset["input_ids"]


def test_alpaca_rows_have_alpacas_lengths():
    dataset = synthetic.rows("alpaca", 20000, 2048, config(vocab_size=1000), seed=0)
    total = np.array([len(ids) for ids in dataset["input_ids"]])
    prompt = np.array([labels.count(-100) for labels in dataset["labels"]])
    for ids, labels, start in zip(dataset["input_ids"][:500], dataset["labels"][:500], prompt[:500], strict=True):
        assert labels == [-100] * start + ids[start:]
    # 369 bytes of instruction, input and answer and a template of 140 or 205 at 4.4 bytes a token, begin and end
    expected = (369 + 0.65 * 140 + 0.35 * 205) / 4.4 + 2
    assert total.mean() == pytest.approx(expected, rel=0.02)
    for tokens, quantiles in ((prompt, synthetic.PROMPT_TOKENS), (total - prompt, synthetic.ANSWER_TOKENS)):
        np.testing.assert_allclose(np.quantile(tokens, synthetic.SHARES[1:-2]), quantiles[1:-2], rtol=0.05, atol=1)
        assert quantiles[0] <= tokens.min() <= tokens.max() <= quantiles[-1]


@pytest.mark.parametrize("max_length", [2, 60])
def test_alpaca_rows_are_cut_and_keep_a_label(max_length):
    dataset = synthetic.rows("alpaca", 1000, max_length, config(), seed=0)
    assert max(len(ids) for ids in dataset["input_ids"]) == max_length
    assert all(labels[-1] != -100 and len(labels) >= 2 for labels in dataset["labels"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("long", 10, 10), "synthetic_lengths: got 'long'; must be one of full, ragged, alpaca"),
        (("full", 10, 1), "max_length: got 1; must be at least 2 "),
        (("full", 10, None), "max_length: got None; must be at least 2 "),
        (("full", 2**20, 2**11), "synthetic_examples: got 1048576, .*2,147,483,648 tokens .* at most 2,147,483,647"),
    ],
)
def test_rows_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic.rows(*arguments, config(), seed=0)


def test_padding_tokenizer_pads():
    for pad, expected in ((None, 9), (5, 5)):
        collate = DataCollatorForSeq2Seq(synthetic.padding_tokenizer(config(pad_token_id=pad)), pad_to_multiple_of=4)
        batch = collate([{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [7, 6, 5], "labels": [7, 6, 5]}])
        assert batch["input_ids"].tolist() == [[1, 2, expected, expected], [7, 6, 5, expected]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
        assert batch["labels"].tolist() == [[-100, 2, -100, -100], [7, 6, 5, -100]]
    bare = DataCollatorForSeq2Seq(synthetic.padding_tokenizer(config(), with_mask=False), pad_to_multiple_of=4)
    assert bare([{"input_ids": [1, 2, 5, 6], "labels": [1, 2, 5, 6]}]).keys() == {"input_ids", "labels"}
    nothing = config(vocab_size=8, bos_token_id=None, eos_token_id=None)
    assert synthetic.padding_tokenizer(nothing).pad_token_id == 0


@pytest.mark.parametrize("path", SHAPED, ids=lambda path: path.stem)
def test_shapes_are_the_published_ones(path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**yaml.safe_load(path.read_text())["model_config"])
        )
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert round(parameters, 3) == PARAMETERS[path.stem]
    special = synthetic.special_ids(model.config)
    assert {"bos", "eos"} <= special.keys(), "ids of special tokens belong to the shape"


@pytest.mark.parametrize("path", SHAPED, ids=lambda path: path.stem)
def test_recipes_train_offline(path, tmp_path):
    """Two steps of every recipe with a shape, at a tiny one of the same kind given on the command line."""
    recipe = yaml.safe_load(path.read_text())
    tiny = {"model_type": recipe["model_config"]["model_type"], **TINY}
    overrides = {
        "offline": "true", "model_config": json.dumps(tiny), "use_cpu": "true", "max_length": "100", "max_steps": "2",
        "synthetic_examples": "8", "per_device_train_batch_size": "2", "gradient_accumulation_steps": "1",
        "output_dir": str(tmp_path), "save_strategy": "no", "disable_tqdm": "true", "logging_steps": "1",
        "use_liger": "false",
    }  # fmt: skip
    trainer = build_trainer(parse_recipe([str(path), *(word for k, v in overrides.items() for word in (f"--{k}", v))]))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % recipe.get("pad_to_multiple_of", 1) == 0
    if recipe["synthetic_lengths"] == "alpaca":
        assert ((batch["labels"] == -100) & (batch["attention_mask"] == 1)).any(), "prompts bear no loss"
    else:
        assert (
            batch["labels"][:, 1:100] == batch["input_ids"][:, 1:100]
        ).all()  # packed rows: TRL leaves the first out
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_pads_on_the_right_whatever_the_tokenizer_does(side, tmp_path, monkeypatch):
    """As TRL's trainers; the tokenizer itself, which a run may save, keeps its side."""
    made, original = [], synthetic.padding_tokenizer

    def tokenizer(*args, **kwargs):
        made.append(original(*args, **kwargs))
        made[0].padding_side = side
        return made[0]

    monkeypatch.setattr(synthetic, "padding_tokenizer", tokenizer)
    content = {
        "model_config": {"model_type": "llama", **TINY}, "dataset": "synthetic", "synthetic_lengths": "ragged",
        "synthetic_examples": 8, "max_length": 13, "pad_to_multiple_of": 8, "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path), "use_cpu": True,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    for batch in build_trainer(parse_recipe([str(path)])).get_train_dataloader():
        assert batch["input_ids"].shape == (4, 16)
        assert batch["attention_mask"][:, :12].all()
        assert not batch["attention_mask"][:, 13:].any()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert made[0].padding_side == side


def test_offline_chooses_shape_and_rows(tmp_path):
    def parse(*overrides, **changes):
        content = {"model_config": {"model_type": "llama"}, "model_name_or_path": "some/model", "dataset": "some/data"}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return parse_recipe([str(path), *overrides])

    online, offline = parse(), parse("--offline", "true")
    assert (online.model.model_name_or_path, online.run.dataset) == ("some/model", "some/data")
    assert online.run.model_config is None
    assert (offline.model.model_name_or_path, offline.run.dataset) == (None, "synthetic")
    assert offline.run.model_config == {"model_type": "llama"}
    for dataset in ("embedded", "rows.jsonl"):  # nothing to download
        assert parse("--offline", "true", dataset=dataset).run.dataset == dataset
    with pytest.raises(ValueError, match=r"'some/model'.*--offline true.*--model_name_or_path null"):
        parse("--model_config", '{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match=r"model_config: got None; must be .*offline"):
        parse("--offline", "true", model_config=None)
    with pytest.raises(ValueError, match=r"synthetic_lengths: got 'alpacca'; .* \(did you mean 'alpaca'\?\)"):
        parse(synthetic_lengths="alpacca")
    with pytest.raises(ValueError, match="synthetic_examples: got 0; must be at least 1"):
        parse(synthetic_examples=0)
    with pytest.raises(ValueError, match=r"sample_prompt: got 'Why'; must be null .*tokenizer"):
        parse("--offline", "true", sample_prompt="Why")
    with pytest.raises(ValueError, match="load_in_8bit quantise pretrained weights"):
        parse("--offline", "true", load_in_8bit=True, trainer="sft", bf16="auto")


def test_response_marker_ends_the_prompt(tmp_path):
    rows = tmp_path / "rows.jsonl"
    path = tmp_path / "recipe.yaml"

    def dataset(text, **changes):
        rows.write_text(json.dumps(text) + "\n")
        content = {"model_config": {"model_type": "llama"}, "dataset": str(rows), "response_marker": "### A:\n"}
        path.write_text(yaml.safe_dump({**content, **changes}))
        return build_dataset(parse_recipe([str(path)]))

    assert list(dataset({"text": "Q\n### A:\nyes\n### A:\nno"})) == [
        {"prompt": "Q\n### A:\n", "completion": "yes\n### A:\nno"}
    ]
    with pytest.raises(ValueError, match=r"response_marker: '### A:\\n' is not in every text, such as 'nothing'"):
        dataset({"text": "nothing"})
    with pytest.raises(ValueError, match="response_marker needs a text column; the dataset has prompt, completion"):
        dataset({"prompt": "Q", "completion": "A"})
