"""What happens to a patched model afterwards: copies, changes, wrappers, errors, other people's hooks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_config, tiny_model
from torch import nn

from liger_trainer import AutoLigerModelForCausalLM, apply_liger, revert_liger
from liger_trainer.patching import patch_state


def test_a_clamp_is_seen():
    """DeepSeek-V4 clamps gate and up at swiglu_limit, far beyond ordinary activations."""
    report = apply_liger(tiny_model("deepseek_v4"))
    assert ("DeepseekV4MLP", "glu") in {(s.cls, s.kind) for s in report.skipped}
    assert {a.variant for a in report.applied if a.cls == "DeepseekV4Experts"} == {"swiglu, clamped, packed"}


def test_settings_changed_later_are_followed():
    model, inputs = tiny_model("llama"), batch()
    plain = copy.deepcopy(model)
    apply_liger(model)
    for each in (model, plain):
        each.model.norm.variance_epsilon = 1.0
    assert_same_training(loss_and_gradients(plain, inputs), loss_and_gradients(model, inputs))


def test_code_and_attributes_are_told_apart():
    class Gated(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act = act

        def forward(self, x):
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

    model, x = nn.Sequential(Gated(nn.functional.silu), Gated(nn.functional.gelu)), torch.randn(3, 8)
    expected = model(x)
    assert [a.variant for a in apply_liger(model).applied] == ["swiglu", "geglu, exact"]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[0](x=x), model[0](x))  # the original's parameter name still works


@pytest.mark.parametrize("labels_from", ["ignore_index", "changed labels", "hook on the head"])
def test_what_the_fused_loss_would_get_wrong(labels_from):
    model, inputs = tiny_model("llama"), batch()
    if labels_from == "hook on the head":
        model.lm_head.register_forward_hook(lambda module, args, out: out * 20)
        theirs = loss_and_gradients(model, inputs)
        assert "hooks on its output" in apply_liger(model).skipped[0].reason
        assert_same_training(theirs, loss_and_gradients(model, inputs))
    elif labels_from == "ignore_index":
        inputs = batch(ignored=0.0)
        inputs["ignore_index"] = int(inputs["labels"][0, 3])
        theirs = loss_and_gradients(model, inputs)
        apply_liger(model)
        assert_same_training(theirs, loss_and_gradients(model, inputs))
    else:
        apply_liger(model)
        replace = lambda module, args, kwargs: (args, kwargs | {"labels": kwargs["input_ids"]})  # noqa: E731
        model.register_forward_pre_hook(replace, with_kwargs=True)
        with pytest.raises(ValueError, match="other labels than those that reach its loss"):
            loss_and_gradients(model, inputs)


@pytest.mark.parametrize("change", ["resized", "lora on the head", "saved head", "unpickled"])
def test_applying_again_after_the_model_changed(change, caplog):
    model, inputs = tiny_model("llama"), batch()
    apply_liger(model)
    if change == "resized":
        model.resize_token_embeddings(140)
    elif change == "unpickled":
        model = pickle.loads(pickle.dumps(model))
    else:
        lora = {"target_modules": ["q_proj", "lm_head"]} if "lora" in change else {"target_modules": ["q_proj"]}
        lora |= {"modules_to_save": ["lm_head"]} if "saved" in change else {}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora))
    fresh = copy.deepcopy(model)
    revert_liger(fresh)
    theirs = loss_and_gradients(fresh, inputs)
    assert_same_training(theirs, loss_and_gradients(model, inputs))  # right before, on whichever path
    report = apply_liger(model)
    assert report.counts["rope"] == 2
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert ("fused_loss" in report.counts) == (change != "lora on the head")
    assert (patch_state(model).fused is None) == (change == "lora on the head")
    if patch_state(model).fused is not None:
        assert patch_state(model).fused.calls_fused == 1


def test_copying_the_head_alone_does_not_copy_the_model():
    model = tiny_model("llama")
    apply_liger(model)
    assert copy.deepcopy(model.lm_head).forward.__self__.fused.model is model


def test_an_error_in_forward_leaves_nothing_behind():
    model, inputs = tiny_model("llama").train(), batch()
    apply_liger(model)
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": inputs["input_ids"] + 1000})
    assert model.lm_head(torch.randn(2, 11, 64)).shape[-1] == model.config.vocab_size


def test_lazy_logits_are_not_read_from_changed_weights():
    model, inputs = tiny_model("llama").eval(), batch()
    apply_liger(model)
    with torch.no_grad():
        early, late = model(**inputs).logits, model(**inputs).logits
        values = np.asarray(early)
        assert values.shape == (2, 11, model.config.vocab_size)
        assert torch.equal(copy.deepcopy(early), torch.as_tensor(values))
        model.lm_head.weight.zero_()
        with pytest.raises(RuntimeError, match="has changed"):
            late.sum()


def test_revert_leaves_what_others_put_on_top():
    model = tiny_model("llama")
    apply_liger(model)
    own = lambda logits, labels, **kwargs: logits.sum()  # noqa: E731
    model.loss_function = own
    model.model.norm.forward = own
    revert_liger(model)
    assert model.loss_function is own
    assert model.model.norm.forward is own
    assert "forward" not in vars(model.lm_head)


def test_other_normalisations_are_no_candidates():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.LayerNorm(8))
    report = apply_liger(model, {"strict": True, "fused_loss": False})
    assert report.counts == {"layer_norm": 1}


def test_auto_class(tmp_path):
    model, inputs = tiny_model("qwen2"), batch()
    theirs = loss_and_gradients(model, inputs)
    model.save_pretrained(tmp_path)
    ours, info = AutoLigerModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_training(theirs, loss_and_gradients(ours, inputs))
    made = AutoLigerModelForCausalLM.from_config(tiny_config("llama"), liger_config={"rope": False})
    assert "rope" not in patch_state(made).report.counts
    with pytest.raises(ValueError, match="unknown key"):
        AutoLigerModelForCausalLM.from_pretrained("no/such-model", liger_config={"x": 1})
