"""Calls of single LoRA layers: which our op computes, and why PEFT's own forward runs for others."""

import functools

import pytest
import torch
from lora_models import a_layer, acts, lora, step, wrapped
from model_pair import ModelPair
from tiny_models import batch
from torch import nn

from liger_trainer import apply_liger
from liger_trainer.probing.rebinding import Bound

# What is done to a layer, and why PEFT's own forward then runs, if it does.
CHANGES = {
    "hook on the base": (lambda layer: layer.base_layer.register_forward_hook(lambda m, i, o: 2 * o), None),
    "trained base": (lambda layer: layer.base_layer.requires_grad_(True), None),
    "tensor scaling": (lambda layer: layer.scaling.update({"default": torch.tensor(0.7)}), None),
    "hook on A": (
        lambda layer: layer.lora_A["default"].register_forward_hook(lambda m, i, o: 2 * o), "lora_A or lora_B has",
    ),
    "B of another class": (
        lambda layer: layer.lora_B.update({"default": nn.Sequential(layer.lora_B["default"])}), "a class of its own",
    ),
    "no cast": (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), "the cast of its input is disabled"),
    "another dropout": (
        lambda layer: layer.lora_dropout.update({"default": nn.Hardtanh(-0.1, 0.1)}), "its dropout has hooks",
    ),
    "narrow adapter": (
        lambda layer: layer.lora_A.bfloat16() and layer.lora_B.bfloat16(),
        "dtypes torch.bfloat16 of lora_A, torch.bfloat16 of lora_B and torch.float32 of the input",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_what_the_op_does_not_take_runs_as_pefts_own(change, reason, caplog):
    """With one warning, which says why."""
    pair = ModelPair(wrapped(target_modules=["q_proj"]))
    pair.apply({})
    pair.same(step)
    pair.both(lambda model: change(a_layer(model)) and None)
    pair.same(step)
    pair.same(step)
    assert acts(pair.ours) == (reason is None)
    warnings = [record.message for record in caplog.records if "runs PEFT's own forward" in record.message]
    assert len(warnings) == (reason is not None)
    assert reason is None or reason in warnings[0]


def test_a_layer_without_the_active_adapter_is_its_base(caplog):
    pair = ModelPair(wrapped(target_modules=["q_proj"]))
    pair.apply({})

    def switch(model):
        model.add_adapter("second", lora(target_modules=["k_proj"], init_lora_weights=True))
        model.set_adapter("second")

    pair.both(switch)
    pair.same(step)
    assert not acts(pair.ours)
    assert "PEFT's own forward" not in caplog.text


@pytest.mark.parametrize(("where", "dtype"), [("layer", torch.float32), ("bnb", torch.bfloat16)])
def test_dropout_sees_the_dtype_that_it_sees_in_peft(where, dtype, monkeypatch):
    """PEFT's layers over bitsandbytes's do not cast their input under autocast; a GPU's mask depends on the dtype."""
    model = wrapped(target_modules=["q_proj"], lora_dropout=0.5)
    apply_liger(model, {"unpad": False})
    layer, seen, dropout = a_layer(model), [], nn.functional.dropout
    layer.base_layer.bfloat16()
    monkeypatch.setattr(type(layer), "__module__", f"peft.tuners.lora.{where}")
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *args: seen.append(x.dtype) or dropout(x, *args))
    torch.set_autocast_enabled("cuda", True)
    try:
        layer(torch.randn(3, 64).bfloat16())
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [dtype]


def test_other_devices_and_shapes_are_pefts_errors(caplog):
    model = wrapped(target_modules=["q_proj"])
    apply_liger(model, {"unpad": False})
    layer = a_layer(model)
    layer.lora_B["default"] = nn.Linear(5, layer.out_features, bias=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(**batch())
    layer.lora_B["default"].to("meta")
    with pytest.raises(RuntimeError):
        model(**batch())
    assert "shapes (3, 64) of lora_A, (64, 5) of lora_B" in caplog.text
    assert "lora_A is on cpu, lora_B on meta, the input on cpu" in caplog.text


def test_a_wrapper_around_our_forward_is_called():
    """``functools.wraps`` copies attributes of our forward; the wrapper still is another function."""
    pair = ModelPair(wrapped(target_modules=["gate_proj", "up_proj"]))
    pair.apply({})
    layer = next(m for n, m in pair.ours.named_modules() if n.endswith("up_proj"))
    ours, calls = vars(layer)["forward"], []

    @functools.wraps(ours.function)
    def wrapper(module, x):
        calls.append(1)
        return ours.function(module, x)

    layer.forward = Bound(wrapper, layer, "forward")
    step(pair.ours)
    assert calls == [1]
