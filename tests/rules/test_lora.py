"""LoRA layers with our op: PEFT's variants give the numbers of the unpatched model, whatever is done to them."""

import copy

import pytest
import torch
from foreign import Quantised
from lora_models import TARGETS, a_layer, acts, layers_of, lora, step, wrapped
from model_pair import ModelPair
from peft import (
    IA3Config,
    LoHaConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tiny_models import batch, tiny_model
from torch import nn

from liger_trainer import apply_liger, revert_liger
from liger_trainer.patching import patch_state
from liger_trainer.probing.rebinding import bound_methods
from liger_trainer.rules import lora as lora_rule

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "base bias": {"bias": "lora_only"},
    "dropout": {"lora_dropout": 0.3},
    "ranks": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 3}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_variants(options, base):
    model = wrapped(**options)
    if base == torch.bfloat16:
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    pair = ModelPair(model)
    pair.tolerance = 1e-5 if base == torch.float32 else 6e-2
    pair.apply({})
    assert layers_of(patch_state(pair.ours).report) == len(options.get("target_modules", TARGETS))
    pair.same(step)
    assert acts(pair.ours)
    pair.revert()
    pair.same(step)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fp32_adapters_of_a_bf16_layer_have_pefts_gradients(dropout):
    """Without autocast PEFT computes them in fp32."""
    torch.manual_seed(0)
    plain = inject_adapter_in_model(
        lora(target_modules=["first"], lora_dropout=dropout), nn.ModuleDict({"first": nn.Linear(32, 24)})
    )["first"]
    plain.base_layer.bfloat16()
    layer = copy.deepcopy(plain)
    assert layers_of(apply_liger(nn.ModuleDict({"first": layer}))) == 1
    x, dy = torch.randn(40, 32).bfloat16(), torch.randn(40, 24).bfloat16()
    results = []
    for each in (plain, layer):
        torch.manual_seed(1)
        out = each(x)
        results.append([out, *torch.autograd.grad(out, [each.lora_A.default.weight, each.lora_B.default.weight], dy)])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_checkpointing(dtype):
    pair = ModelPair(wrapped(lora_dropout=0.2))
    pair.apply({})
    for model in pair.models:
        model.to(dtype)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()

    def action(model):
        with torch.autocast("cpu", torch.bfloat16):
            return step(model)

    pair.same(action, tolerance=6e-2)
    assert acts(pair.ours)


def test_adapters_come_switch_merge_and_go():
    pair = ModelPair(wrapped())
    pair.apply({"lora": True})

    def add(model):
        torch.manual_seed(3)
        model.add_adapter("second", lora(r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))
        model.set_adapter("second")
        return step(model)

    def both_at_once(model):
        model.base_model.set_adapter(["default", "second"])
        return step(model)

    def disabled(model):
        with model.disable_adapter(), torch.no_grad():
            return model(**batch()).loss

    def mixed(model):
        model.eval()
        with torch.no_grad():
            out = model(**batch(), adapter_names=["default", "second"]).loss
        model.train()
        return out

    def merged(model):
        model.merge_adapter()
        with torch.no_grad():
            out = model(**batch()).loss
        model.unmerge_adapter()
        return out

    def scaled(model):
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)
        return step(model)

    def after_an_optimizer_step(model):
        step(model)
        torch.optim.SGD(model.parameters(), 1.0).step()
        return step(model)

    def inferred(model):
        with torch.inference_mode():
            return model(**batch()).loss.clone()

    actions = (step, inferred, add, both_at_once, disabled, mixed, merged, scaled, after_an_optimizer_step)
    for action in actions:
        pair.same(action)
    assert acts(pair.ours)
    pair.both(lambda model: model.delete_adapter("second"))
    pair.both(lambda model: model.set_adapter("default"))
    pair.same(step)
    assert pair.replace(lambda model: model.merge_and_unload())
    pair.same(lambda model: model(**batch()).loss.detach())
    pair.same(lambda model: dict(model.named_parameters()))


def test_disabled_and_merged_adapters_do_not_count_as_ours():
    model = wrapped()
    apply_liger(model, {"unpad": False})
    assert acts(model)
    with model.disable_adapter():
        assert not acts(model)
    model.merge_adapter()
    assert not acts(model)


def test_wrapping_after_patching(tmp_path):
    """The layers that PEFT makes later are its own, until ``apply_liger`` is called on the wrapped model."""
    model = tiny_model("llama", num_hidden_layers=1)
    plain = copy.deepcopy(model)
    assert "lora" in apply_liger(model, {"unpad": False}).none_here
    ours, theirs = get_peft_model(model, lora()).train(), get_peft_model(plain, lora()).train()
    theirs.load_state_dict(ours.state_dict())
    assert not acts(ours)
    assert layers_of(apply_liger(ours, {"unpad": False})) == len(TARGETS)
    assert acts(ours)
    found, wanted = step(ours), step(theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), tmp_path).train()
    torch.testing.assert_close(loaded(**batch()).loss, wanted["loss"])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora(use_dora=True), "its adapter is of a variant (DoraLinearVariant)"),
        (LoHaConfig(r=2, target_modules=["q_proj"]), "Linear is not a LoRA linear layer"),
        (VeraConfig(r=2, target_modules=["q_proj"]), "is not a LoRA linear layer"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "is not a LoRA linear layer"),
        (lora(target_modules=["embed_tokens"]), "Embedding is not a LoRA linear layer"),
    ],
    ids=["dora", "loha", "vera", "ia3", "embedding"],
)
def test_other_methods_stay_pefts_own(config, reason):
    pair = ModelPair(get_peft_model(tiny_model("llama", num_hidden_layers=1), config).train())
    pair.apply({})
    report = patch_state(pair.ours).report
    assert "lora" not in report.counts
    assert reason in next(record.reason for record in report.skipped if record.kind == "lora")
    pair.same(step)


def test_off_and_reverted():
    model = wrapped()
    report = apply_liger(model, {"lora": False, "unpad": False})
    assert "lora" not in report.kinds() | {*report.none_here}
    assert not list(bound_methods(a_layer(model)))
    revert_liger(model)
    apply_liger(model, {"unpad": False})
    assert list(bound_methods(a_layer(model)))


@pytest.mark.parametrize("change", ["", "hook", "dropout", "disabled"])
def test_gate_and_up_are_one_op(change, monkeypatch):
    """Unless a call of one of them has to do something else."""
    pair = ModelPair(wrapped(target_modules=["gate_proj", "up_proj"]))
    pair.apply({})
    calls, op = [], lora_rule.unchecked_lora_linears
    monkeypatch.setattr(
        lora_rule, "unchecked_lora_linears", lambda x, projections: calls.append(len(projections)) or op(x, projections)
    )

    def action(model):
        layer = next(m for n, m in model.named_modules() if n.endswith("up_proj"))
        if change == "hook":
            layer.register_forward_hook(lambda module, inputs, out: 2 * out)
        elif change == "dropout":
            layer.lora_dropout["default"] = nn.Dropout(0.5)
        elif change == "disabled":
            layer.enable_adapters(False)
        return step(model)

    pair.same(action)
    assert calls == {"": [2], "hook": [1, 1], "dropout": [1], "disabled": [1]}[change]


def test_an_adapter_of_the_down_projection_does_not_keep_its_input(monkeypatch):
    """On a GPU; the op's own tests show that it then is not saved."""
    seen, op = [], lora_rule.gated_lora_linear
    monkeypatch.setattr(lora_rule, "gated_lora_linear", lambda *args: seen.append(args[-1]) or op(*args))
    pair = ModelPair(wrapped(target_modules=["down_proj"]))
    pair.apply({})
    pair.same(step)
    assert seen == ["silu"]
    pair.apply({"recompute_glu": False})
    pair.same(step)
    assert seen == ["silu"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after apply_liger"])
def test_a_base_of_another_tensor_type_is_called(late):
    """Such as torchao's: the adapter is added to what the base gives."""
    pair = ModelPair(wrapped())

    def quantise(model):
        base = a_layer(model).base_layer
        base.weight = nn.Parameter(Quantised(base.weight.detach()), requires_grad=False)

    if late:
        pair.apply({})
    pair.both(quantise)
    pair.apply({})
    variants = {r.module.split(".")[-1]: r.variant for r in patch_state(pair.ours).report.applied if r.kind == "lora"}
    assert variants["q_proj"] == ("lora_linear" if late else "lora_linear, beside Quantised")
    assert ("self_attn" in variants) == late
    pair.same(step)
    assert acts(pair.ours)
