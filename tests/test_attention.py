"""Grouped-query attention under a padding mask: keys and values are not repeated, and nothing else changes."""

import pytest
import torch
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model
from torch.nn.attention import SDPBackend
from transformers.integrations import sdpa_attention

from liger_trainer import apply_liger, attention, revert_liger

GROUPED = ("llama", "mistral", "qwen3", "gemma3_text", "mixtral", "cohere", "glm4", "smollm3")
ON = {"attention": True}


@pytest.fixture
def copies(monkeypatch):
    """Counts how often the original function repeats keys or values."""
    calls = []
    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, n: calls.append(n) or repeat(x, n))
    return calls


def padded(mask_side="right", **sizes):
    """A batch whose second row has padding on one side."""
    inputs = batch(**sizes)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, slice(-3, None) if mask_side == "right" else slice(3)] = 0
    labels = inputs["labels"].masked_fill(mask == 0, -100)
    return {**inputs, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("model_type", GROUPED)
@pytest.mark.parametrize("mask_side", ["right", "left"])
def test_same_numbers_without_copies(model_type, mask_side, copies):
    model = tiny_model(model_type, attn_implementation="sdpa")
    inputs = padded(mask_side)
    theirs = loss_and_gradients(model, inputs)
    assert len(copies) == 4  # keys and values of two layers
    report = apply_liger(model, ON)
    assert report.counts["attention"] == report.counts["rope"] == 2
    copies.clear()  # the probe makes some
    ours = loss_and_gradients(model, inputs)
    assert not copies
    assert_same_training(theirs, ours)
    revert_liger(model)
    assert all("forward" not in vars(module) for module in model.modules())
    loss_and_gradients(model, inputs)
    assert len(copies) == 4


def test_off_by_default_and_each_by_itself(copies):
    model = tiny_model("llama", attn_implementation="sdpa")
    assert "attention" not in apply_liger(model).counts
    revert_liger(model)
    only = dict.fromkeys(("rms_norm", "glu", "rope", "fused_loss"), False)
    assert apply_liger(model, {**ON, **only}).counts == {"attention": 2}
    copies.clear()
    loss_and_gradients(model, padded())
    assert not copies


def test_where_no_fused_kernel_takes_groups_keys_are_repeated(copies, monkeypatch):
    model = tiny_model("llama", attn_implementation="sdpa")
    inputs = padded()
    theirs = loss_and_gradients(model, inputs)
    asked = []

    def choice(*args, **kwargs):
        asked.append(kwargs)
        return SDPBackend.MATH.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    apply_liger(model, ON)
    copies.clear()
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert len(copies) == 4
    assert len(asked) == 2
    assert all(kwargs["enable_gqa"] for kwargs in asked)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_and_other_implementations_are_unchanged(implementation):
    model = tiny_model("llama", attn_implementation=implementation).eval()
    inputs = padded("left")
    inputs.pop("labels")
    options = {"max_new_tokens": 4, "do_sample": False}
    theirs = model.generate(**inputs, **options)
    apply_liger(model, ON)
    assert torch.equal(model.generate(**inputs, **options), theirs)


def test_an_attention_function_of_the_model_s_own_is_left_alone(monkeypatch):
    model = tiny_model("llama", attn_implementation="sdpa")
    table = type(model.model.layers[0].self_attn).forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    monkeypatch.setitem(table._local_mapping, "sdpa", lambda *args, **kwargs: None)
    report = apply_liger(model, ON)
    assert "attention" not in report.counts
    assert [s.reason for s in report.skipped if s.kind == "attention"] == [
        "its sdpa is not the one of transformers"
    ] * 2


def test_heads_that_are_not_shared_are_no_candidates():
    model = tiny_model("llama", num_key_value_heads=4)
    report = apply_liger(model, {**ON, "strict": True})
    assert "attention" not in report.counts


def test_functions_that_were_registered_later_are_found():
    model = tiny_model("llama", attn_implementation="sdpa")
    apply_liger(model, ON)
    forward = vars(model.model.layers[0].self_attn)["forward"].__func__
    table = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    assert table["sdpa"] is attention.grouped_sdpa
    assert "flex_attention" in table
