"""A patched model in later use: copies, changes, wrappers, errors, hooks of others."""

import copy
import gc
import pickle
import weakref

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_config, tiny_model

from liger_trainer import AutoLigerModelForCausalLM, apply_liger, revert_liger
from liger_trainer.patching import patch_state


def test_settings_changed_later_are_followed():
    model, inputs = tiny_model("llama"), batch()
    plain = copy.deepcopy(model)
    apply_liger(model)
    for each in (model, plain):
        each.model.norm.variance_epsilon = 1.0
    assert_same_training(loss_and_gradients(plain, inputs), loss_and_gradients(model, inputs))


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


def with_labels(model):
    loss_and_gradients(model, batch())
    return model


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def unpickled_and_patched(model):
    model = unpickled(model)
    apply_liger(model)
    return model


def reverted(model):
    revert_liger(model)
    return model


@pytest.mark.parametrize(
    "life", [lambda model: model, with_labels, copy.deepcopy, unpickled, unpickled_and_patched, reverted]
)
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt_neox"])
def test_a_dropped_model_is_freed_at_once(model_type, life):
    model = tiny_model(model_type)
    apply_liger(model)
    gc.collect()
    gc.disable()
    try:
        model = life(model)
        alive = [weakref.ref(module) for module in model.modules()]
        del model
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


@torch.no_grad()
def test_accelerates_hooks_come_and_go():
    plain, inputs = tiny_model("llama").eval(), batch()
    model = copy.deepcopy(plain)
    apply_liger(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert patch_state(model).fused.calls_fused == 1
    report = patch_state(model).report
    assert apply_liger(model) is report
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert apply_liger(model) is report
    revert_liger(model)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


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
