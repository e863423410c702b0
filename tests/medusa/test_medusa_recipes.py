"""Recipes with Medusa heads: what they make, and combinations that cannot run."""

import json
from pathlib import Path

import pytest
import torch

from liger_trainer import MedusaConfig
from liger_trainer.patching import patch_state
from liger_trainer.training.build import build_trainer
from liger_trainer.training.recipe import parse_recipe

RECIPE = str(Path(__file__).parents[2] / "recipes" / "paper" / "medusa_stage2.yaml")


def test_a_recipe_makes_heads(tmp_path):
    tiny = {"model_type": "llama", "vocab_size": 131, "hidden_size": 32, "intermediate_size": 64}
    tiny |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    flags = ["--offline", "true", "--use_cpu", "true", "--model_config", json.dumps(tiny), "--max_length", "16"]
    flags += ["--synthetic_examples", "8", "--output_dir", str(tmp_path), "--max_steps", "2", "--save_strategy", "no"]
    flags += ["--disable_tqdm", "true"]
    trainer = build_trainer(parse_recipe([RECIPE, *flags, "--medusa_heads", "2", "--medusa_decay", "0.5"]))
    assert trainer.model.medusa == MedusaConfig(heads=2, layers=1, coefficient=0.2, decay=0.5, stage=2)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    trainer.train()
    assert patch_state(trainer.model).fused.calls_fused == 2
    assert parse_recipe([RECIPE, *flags, "--medusa_heads", "0"]).medusa is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--medusa_heads -1", "medusa_heads: got -1; must be at least 1"),
        ("--medusa_stage 3", "medusa_stage: got 3; must be 1"),
        ("--medusa_head 3", r"unknown key 'medusa_head' \(did you mean 'medusa_heads'\?\)"),
        ("--trainer sft", "trainer: got 'sft'; must be trainer with medusa_heads 5"),
        ("--use_peft true", "use_peft: got True; must be false with medusa_heads 5"),
        ("--label_smoothing_factor 0.1", r"label_smoothing_factor: got 0\.1; must be 0"),
        ("--sample_prompt Why?", r"sample_prompt: got 'Why\?'; must be null"),
    ],
)
def test_recipes_that_cannot_make_heads(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_recipe([RECIPE, *flags.split(), "--use_cpu", "true", "--output_dir", str(tmp_path)])
