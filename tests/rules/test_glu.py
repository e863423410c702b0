"""The glu rules: which gated activations match, and what they save for backward."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model
from torch import nn

from liger_trainer import LigerConfig, apply_liger
from liger_trainer.kernels import reference
from liger_trainer.kernels.gated_linear import gated_linear
from liger_trainer.probing.rule import Skip
from liger_trainer.rules import glu as gated


def test_a_clamp_is_seen():
    """DeepSeek-V4 clamps gate and up at swiglu_limit, far beyond ordinary activations."""
    report = apply_liger(tiny_model("deepseek_v4"))
    assert ("DeepseekV4MLP", "glu") in {(s.cls, s.kind) for s in report.skipped}
    assert {a.variant for a in report.applied if a.cls == "DeepseekV4Experts"} == {"swiglu, clamped, packed"}


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


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_gated_activations_are_not_kept_for_backward(model_type, monkeypatch):
    """A bare down projection goes with the activation into one op; one with a hook or an adapter is called."""
    calls = []
    monkeypatch.setattr(gated, "gated_linear", lambda *args, **kwargs: calls.append(1) or gated_linear(*args, **kwargs))
    results = {}
    for mode, expected in (("kept", 0), ("made again", 2), ("hooked", 1)):
        model = tiny_model(model_type)
        apply_liger(model, {"recompute_glu": mode != "kept"})
        if mode == "hooked":
            model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: out * 2)
            model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: out / 2)
        results[mode] = loss_and_gradients(model, batch())
        assert len(calls) == expected
        calls.clear()
    assert_same_training(results["kept"], results["made again"])
    assert_same_training(results["kept"], results["hooked"])


def experts(gate, **numbers):
    """Experts as transformers has them, with ``gate`` and attributes of these names and values, in that order."""

    class Experts(torch.nn.Module):
        _apply_gate = gate

    module = Experts()
    for name, value in numbers.items():
        setattr(module, name, value)
    module.has_gate, module.config = True, SimpleNamespace(_experts_implementation="grouped_mm")
    return module


def clamped(self, x):
    return reference.clamped_swiglu(x, limit=self.limit, alpha=self.alpha)


def unclamped(self, x):
    gate, up = x.chunk(2, dim=-1)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize(
    ("gate", "numbers"),
    [
        (clamped, {"hidden_dim": 4096, "top_k": 7, "alpha": 1.702, "limit": 7.0}),
        (clamped, {"hidden_dim": 4096, "limit": 1e4, "alpha": 1.0}),
        (unclamped, {"hidden_dim": 4096, "alpha": 1.702}),
    ],
)
def test_the_limit_is_told_from_other_numbers(gate, numbers):
    module = experts(gate, **numbers)
    if gate is unclamped:
        with pytest.raises(Skip, match="neither"):
            gated.probe_experts(module, LigerConfig())
        return
    apply_gate = gated.probe_experts(module, LigerConfig()).methods["_apply_gate"]
    for change in ({}, {"limit": 2.0}, {"alpha": 0.5}):  # later changes are followed
        for name, value in change.items():
            setattr(module, name, value)
        x = torch.randn(5, 48) * 8000
        torch.testing.assert_close(apply_gate(module, x), gate(module, x))


@pytest.mark.parametrize(
    ("model_type", "settings", "variant"),
    [
        ("gpt_oss", {"head_dim": 16}, "swiglu, clamped, packed, interleaved"),
        ("minimax_m3_vl_text", {"head_dim": 16}, "swiglu, clamped, packed"),
    ],
)  # fmt: skip
def test_experts_with_such_a_gate_are_patched(model_type, settings, variant):
    """At a limit that the activations of a tiny model reach."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.02}
    model, inputs = tiny_model(model_type, **sizes, **settings), batch()
    theirs = loss_and_gradients(model, inputs)
    report = apply_liger(model)
    assert variant in {applied.variant for applied in report.applied if applied.kind == "glu"}
    assert_same_training(theirs, loss_and_gradients(model, inputs))


def counted(module, calls):
    module.register_forward_hook(lambda *args: calls.append(1))


def halved(module, gradients, *args):
    return (gradients[0] * 0.5,)


CHANGES = {
    "output": lambda act, calls: act.register_forward_hook(lambda module, args, out: out * 0.5),
    "input": lambda act, calls: act.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,)),
    "gradient of inputs": lambda act, calls: act.register_full_backward_hook(halved),
    "gradient of outputs": lambda act, calls: act.register_full_backward_pre_hook(
        lambda module, grads: (grads[0] * 2,)
    ),
    "observed": lambda act, calls: counted(act, calls),
    "forward": lambda act, calls: setattr(act, "forward", torch.tanh),
    "observed globally": lambda act, calls: None,  # see below
}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("change", [*CHANGES, "replaced"])
def test_what_happens_to_the_activation_later_is_seen(model_type, change, caplog):
    """By hooks of every kind, and by another activation: the module's own forward runs, and a log line says so."""
    results, counts = [], []
    for patched in (False, True):
        model, calls = tiny_model(model_type), []
        if patched:
            assert apply_liger(model).counts["glu"] == len(model.model.layers)
        gates = [m for m in model.modules() if hasattr(m, "act_fn")]
        if change == "replaced":
            gates[0].act_fn = nn.ReLU()
        else:
            CHANGES[change](gates[0].act_fn, calls)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, calls=calls: (
                calls.append(type(module).__name__) if "SiLU" in str(module) else None
            )
        )
        if change != "observed globally":
            handle.remove()
        results.append(loss_and_gradients(model, batch()))
        handle.remove()
        counts.append(calls)
    assert_same_training(*results)
    assert counts[0] == counts[1]
    assert "runs its own forward" in caplog.text


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_an_activation_that_is_hooked_already_is_left_alone(model_type):
    model, calls = tiny_model(model_type), []
    gate = next(m for m in model.modules() if hasattr(m, "act_fn"))
    counted(gate.act_fn, calls)
    report = apply_liger(model)
    assert [s.reason for s in report.skipped if s.kind == "glu"] == [gated.INTERCEPTED]
    assert not calls, "a hook has seen the numbers of a probe"
    loss_and_gradients(model, batch())
    assert calls


def test_settings_of_the_activation_and_functions_are_asked_again():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act, self.act_fn, self.drop = nn.functional.silu, nn.GELU(approximate="tanh"), nn.Dropout(0.0)
            self.exact = False

        def activate(self, x):
            return self.act_fn(x) if self.exact else self.act(x)

        def forward(self, x):
            return self.down_proj(self.drop(self.activate(self.gate_proj(x))) * self.up_proj(x))

    model, x = nn.Sequential(Gated()), torch.randn(3, 8)
    plain = copy.deepcopy(model)
    assert apply_liger(model).counts == {"glu": 1}
    for change in (
        lambda mlp: setattr(mlp, "exact", True),
        lambda mlp: setattr(mlp.act_fn, "approximate", "none"),
        lambda mlp: setattr(mlp, "exact", False),
        lambda mlp: setattr(mlp, "act", torch.tanh),
        lambda mlp: setattr(mlp.drop, "p", 1.0),
    ):
        for each in (plain, model):
            change(each[0])
        torch.testing.assert_close(model(x), plain(x))
