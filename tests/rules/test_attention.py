"""Grouped-query attention under a padding mask: SDPA gets keys and values as they are, and nothing else changes."""

import inspect

import pytest
import torch
from tiny_models import assert_same_training, loss_and_gradients, padded_batch, sdpa_model, tiny_model
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface

from liger_trainer import apply_liger, revert_liger
from liger_trainer.rules import attention

GROUPED = ("llama", "mistral", "qwen3", "gemma3_text", "mixtral", "cohere", "glm4", "smollm3")
ON = {"attention": True, "padding_mask": False, "unpad": False}  # with a mask, also where it is on the right
HEADS, KV_HEADS = 4, 2  # of the tiny models


@pytest.fixture
def heads(monkeypatch):
    """The number of key heads of each call of SDPA, and whether it was told to group them."""
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        assert key.shape[1] == value.shape[1]
        seen.append((key.shape[1], kwargs.get("enable_gqa", False)))
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


REPEATED, AS_THEY_ARE = [(HEADS, False)] * 2, [(KV_HEADS, True)] * 2  # in two layers


def padded(side="right"):
    """A batch whose second row has padding on one side."""
    return padded_batch(lambda mask: mask[1, slice(-3, None) if side == "right" else slice(3)].zero_())


@pytest.mark.parametrize("model_type", GROUPED)
@pytest.mark.parametrize("side", ["right", "left"])
def test_same_numbers_without_copies(model_type, side, heads):
    model = sdpa_model(model_type)
    inputs = padded(side)
    theirs = loss_and_gradients(model, inputs)
    assert heads == REPEATED
    report = apply_liger(model, {**ON, "strict": True})
    assert report.counts["attention"] == report.counts["rope"] == 2
    heads.clear()  # the probe's
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert heads == AS_THEY_ARE
    revert_liger(model)
    assert all("forward" not in vars(module) for module in model.modules())
    heads.clear()
    loss_and_gradients(model, inputs)
    assert heads == REPEATED


def test_by_itself_and_turned_off(heads):
    model = sdpa_model()
    assert "attention" not in apply_liger(model, {"attention": False}).counts
    revert_liger(model)
    others = dict.fromkeys(("rms_norm", "glu", "rope", "fused_loss"), False)
    assert apply_liger(model, {**ON, **others}).counts == {"attention": 2}
    heads.clear()
    loss_and_gradients(model, padded())
    assert heads == AS_THEY_ARE


def test_under_autocast_the_kernel_is_that_of_the_narrow_dtype(heads):
    model = sdpa_model()
    inputs = padded()
    results = []
    for patched in (False, True):
        if patched:
            apply_liger(model, {**ON, "fused_loss": False, "glu": False, "rms_norm": False})
            heads.clear()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(loss_and_gradients(model, inputs))
    assert heads == AS_THEY_ARE
    assert_same_training(*results, tolerance=3e-2)


def no_kernel(*args, **kwargs):
    raise RuntimeError("No available kernel. Aborting execution.")


@pytest.mark.parametrize(
    "choice", [lambda *a, **k: SDPBackend.MATH.value, lambda *a, **k: SDPBackend.ERROR.value, no_kernel]
)
def test_where_no_fused_kernel_takes_groups_keys_are_repeated(choice, heads, monkeypatch):
    model = sdpa_model()
    inputs = padded()
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model, ON)
    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    heads.clear()
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert heads == REPEATED


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_is_unchanged(implementation):
    model = tiny_model("llama", attn_implementation=implementation).eval()
    inputs = padded("left")
    inputs.pop("labels")
    options = {"max_new_tokens": 4, "do_sample": False}
    theirs = model.generate(**inputs, **options)
    apply_liger(model, ON)
    assert torch.equal(model.generate(**inputs, **options), theirs)


def test_what_is_no_candidate():
    assert "attention" in apply_liger(sdpa_model(num_key_value_heads=HEADS), {**ON, "strict": True}).none_here
    eager = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(ValueError, match="its attn_implementation is eager, not sdpa"):
        apply_liger(eager, {**ON, "strict": True})
    assert {s.kind for s in apply_liger(eager, ON).skipped} == {"attention"}


@pytest.fixture
def table():
    """Llama's table of attention functions, put back as it was afterwards."""
    forward = inspect.unwrap(type(sdpa_model().model.layers[0].self_attn).forward)  # decorated since transformers 5.24
    table = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    shared, own = dict(AttentionInterface._global_mapping), dict(table._local_mapping)
    yield table
    for mapping, before in ((AttentionInterface._global_mapping, shared), (table._local_mapping, own)):
        mapping.clear()
        mapping.update(before)


def test_an_attention_function_that_is_not_transformers_own_is_left_alone(table):
    table["sdpa"] = lambda *args, **kwargs: None
    report = apply_liger(sdpa_model(), ON)
    assert "attention" not in report.counts
    reasons = [s.reason for s in report.skipped if s.kind == "attention"]
    assert reasons == ["its sdpa is not the one of transformers"] * 2


@pytest.mark.parametrize("how", ["in the table", "in all tables", "by a name of its own"])
def test_attention_functions_that_come_later_are_used(how, table):
    model = sdpa_model()
    apply_liger(model, ON)
    calls = []

    def later(*args, **kwargs):
        calls.append(kwargs)
        return attention.sdpa_attention_forward(*args, **kwargs)

    if how == "in the table":
        table["sdpa"] = later
    elif how == "in all tables":
        AttentionInterface.register("sdpa", later)
    else:
        table["mine"] = later
        model.config._attn_implementation = "mine"
    loss_and_gradients(model, padded())
    assert len(calls) == 2
