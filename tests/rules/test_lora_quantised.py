"""LoRA layers over bitsandbytes's quantised bases, on a CPU or a GPU: the numbers of PEFT's own layers."""

import pytest
import torch
from model_pair import ModelPair, gradients
from peft import LoraConfig, get_peft_model
from tiny_models import batch, tiny_model
from torch import nn

from liger_trainer.patching import patch_state

bnb = pytest.importorskip("bitsandbytes")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]


def four_bit(linear, dtype):
    options = {"quant_type": "nf4", "compress_statistics": True}
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=dtype, **options)
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
    return made


def eight_bit(linear, dtype):
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=6.0)
    made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made


def quantised(quantise, flag, dtype, **options):
    """A tiny model whose projections are quantised, with random adapters."""
    model = tiny_model("qwen2", num_hidden_layers=1).to(dtype)
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            made = quantise(module, dtype)
            made.bias = module.bias
            setattr(model.get_submodule(parent), attribute, made)
    setattr(model, flag, True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=TARGETS, init_lora_weights=False, **options)
    return get_peft_model(model.to(DEVICE), lora).train()


def step(model, autocast):
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = model(**{name: value.to(DEVICE) for name, value in batch().items()}).loss
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(
    ("quantise", "flag", "variant"),
    [
        (four_bit, "is_loaded_in_4bit", "lora_linear, over Linear4bit"),
        (eight_bit, "is_loaded_in_8bit", "lora_linear, beside Linear8bitLt"),
    ],
    ids=["nf4", "int8"],
)
def test_quantised_bases(quantise, flag, variant, dtype, autocast, checkpointing):
    pair = ModelPair(quantised(quantise, flag, dtype))
    pair.apply({})
    report = patch_state(pair.ours).report
    variants = {record.variant for record in report.applied if record.kind == "lora"}
    one = {"q_proj, k_proj as one op", "gate_proj, up_proj as one op"} if quantise is four_bit else set()
    assert variants == {variant, *one}
    if checkpointing:
        for model in pair.models:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
    pair.same(lambda model: step(model, autocast), tolerance=1e-5 if dtype == torch.float32 else 6e-2)
    assert any(acted.on for acted in patch_state(pair.ours).acted["lora"])
    pair.both(lambda model: model.set_adapter("default"))
    pair.same(lambda model: step(model, autocast), tolerance=1e-5 if dtype == torch.float32 else 6e-2)


def test_a_four_bit_weight_is_dequantised_once_a_pass(monkeypatch):
    model = quantised(four_bit, "is_loaded_in_4bit", torch.float32, lora_dropout=0.0)
    pair = ModelPair(model)
    pair.apply({})
    calls, dequantise = [], bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: calls.append(1) or dequantise(*args))
    step(pair.ours, False)
    assert len(calls) <= 2 * len(TARGETS) + 2  # v and o have no adapter: bitsandbytes calls it for their gradients


def test_dropout_calls_the_base():
    pair = ModelPair(quantised(four_bit, "is_loaded_in_4bit", torch.float32, lora_dropout=0.3))
    pair.apply({})
    pair.same(lambda model: step(model, False))
