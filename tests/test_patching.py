"""apply_liger and revert_liger: same numbers, this instance only, everything reported, nothing half done."""

import copy
import sys

import pytest
import torch
from tiny_models import (
    MODEL_TYPES,
    assert_same_training,
    batch,
    kernels_skipped,
    loss_and_gradients,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers import AutoModelForCausalLM

from liger_trainer import LigerConfig, apply_liger, revert_liger

# What each architecture has two layers of: (norms, rotary attentions, gated MLPs).
EXPECTED = {
    "llama": (5, 2, 2), "mistral": (5, 2, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2), "gemma": (5, 2, 2),
    "gemma2": (9, 2, 2), "gemma3_text": (13, 2, 2), "phi3": (5, 2, 2), "mixtral": (5, 2, 2), "olmo2": (9, 2, 2),
    "granite": (5, 2, 2), "cohere": (3, 2, 2), "glm4": (9, 2, 2), "gpt_neox": (5, 2, 0), "smollm3": (5, 2, 2),
    "nanochat": (9, 2, 0), "gptj": (3, 2, 0), "codegen": (3, 2, 0), "deepseek_v3": (9, 2, 3), "nemotron": (5, 2, 0),
}  # fmt: skip


def fingerprint(model):
    """What patching must leave alone: the classes' and modules' dictionaries, as identities."""
    places = {type(m) for m in model.modules()}
    namespaces = [vars(c) for c in places] + [vars(sys.modules[c.__module__]) for c in places]
    return [{k: id(v) for k, v in namespace.items()} for namespace in namespaces]


def instance_traces(model):
    """Instance attributes and hooks of every module, by name."""
    return [(sorted(vars(m)), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


TRITON = ("llama", "gemma2", "olmo2", "glm4", "phi3", "gpt_neox", "nanochat", "gptj", "deepseek_v3", "nemotron")


# Every model on the ops' plain definitions; one for each variant of the kernels on Triton (interpreted on a CPU).
@pytest.mark.parametrize(
    "model_type",
    [
        *MODEL_TYPES,
        *(pytest.param(t, marks=pytest.mark.triton, id=f"{t}-triton") for t in TRITON),
    ],
)
def test_same_numbers_and_nothing_skipped(model_type):
    model, bystander = tiny_model(model_type), tiny_model(model_type)
    inputs = batch()
    theirs = loss_and_gradients(model, inputs)
    untouched = fingerprint(bystander)
    bystander.eval(), model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits

    traces = instance_traces(model)
    strict = {"strict": True, "attention": model.config._attn_implementation == "sdpa"}
    report = apply_liger(model, strict)

    norms, ropes, mlps = EXPECTED[model_type]
    counts = report.counts
    assert counts.get("rms_norm", 0) + counts.get("layer_norm", 0) == norms
    assert (counts.get("rope", 0), counts.get("glu", 0), counts["fused_loss"]) == (ropes, mlps, 1)
    assert not kernels_skipped(report)
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert apply_liger(model, strict) is report  # idempotent

    assert fingerprint(bystander) == untouched
    with torch.no_grad():
        assert torch.equal(bystander(**inputs).logits, logits)
        revert_liger(model)
        assert torch.equal(model.eval()(**inputs).logits, logits)
    assert instance_traces(model) == traces
    theirs_again = loss_and_gradients(model, inputs)
    assert torch.equal(theirs_again[0], theirs[0])


def test_logits_and_generation_are_unchanged_without_labels():
    model, inputs = tiny_model("gemma2").eval(), batch()
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        text = model.generate(ids, max_new_tokens=5, do_sample=False)
    apply_liger(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), text)
        kept = model(**inputs, logits_to_keep=inputs["labels"].shape[1]).logits
    assert type(kept) is torch.Tensor
    assert kept.shape[-1] == model.config.vocab_size


def test_kinds_can_be_turned_off_and_the_report_reads_well():
    model = tiny_model("qwen3")
    report = apply_liger(model, LigerConfig(rope=False, fused_loss=False, recompute="all"))
    assert report.counts == {"rms_norm": 9, "glu": 2, "attention": 2, "unpad": 1, "padding_mask": 1}
    text = str(report)
    assert "model.layers.*.self_attn.q_norm" in text
    assert "swiglu" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_meta_device_model_is_patched_without_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    expected = {"rms_norm": 5, "rope": 2, "glu": 2, "attention": 2, "unpad": 1, "padding_mask": 1, "fused_loss": 1}
    assert apply_liger(model, {"recompute": "all"}).counts == expected
    assert all(p.is_meta for p in model.parameters())


def test_deep_copy_is_patched_and_independent():
    model, inputs = tiny_model("llama"), batch()
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model)
    copied = copy.deepcopy(model)
    revert_liger(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_training(theirs, loss_and_gradients(copied, inputs))
    revert_liger(copied)
    assert not any("forward" in vars(m) for m in copied.modules())


class Opaque(nn.Module):
    """Looks like a norm, computes something else."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_what_cannot_be_replaced_is_reported_and_strict_raises():
    model, inputs = tiny_model("llama"), batch()
    model.model.norm = Opaque()
    theirs = loss_and_gradients(model, inputs)
    with pytest.raises(ValueError, match=r"strict=True.*\n.*rms_norm model.norm \(Opaque\).*not an RMS norm"):
        apply_liger(model, LigerConfig(strict=True))
    assert not any("forward" in vars(m) for m in model.modules())
    report = apply_liger(model)
    assert [(s.kind, s.module, s.cls) for s in kernels_skipped(report)] == [("rms_norm", "model.norm", "Opaque")]
    assert "skipped: " in str(report)
    assert_same_training(theirs, loss_and_gradients(model, inputs))


def test_wrong_use():
    model = tiny_model("llama")
    with pytest.raises(TypeError, match=r"model: got str; must be a torch\.nn\.Module"):
        apply_liger("llama")
    with pytest.raises(ValueError, match=r"unknown key 'rms_nrom' \(did you mean 'rms_norm'\?\)"):
        apply_liger(model, {"rms_nrom": True})
    with pytest.raises(TypeError, match="rope: got 1; must be of type bool"):
        apply_liger(model, {"rope": 1})
    with pytest.raises(ValueError, match="logits_budget_mib: got 0; must be at least 1"):
        LigerConfig(logits_budget_mib=0)
    with pytest.raises(TypeError, match="logits_budget_mib: got 'most'; must be of type int or 'auto'"):
        LigerConfig(logits_budget_mib="most")
    with pytest.raises(ValueError, match="must be a JSON object"):
        LigerConfig.parse("{rope")
    apply_liger(model, {"rope": False})
    with pytest.raises(ValueError, match=r"already patched with .*revert_liger"):
        apply_liger(model)
    revert_liger(model)
    revert_liger(model)  # nothing left to revert
