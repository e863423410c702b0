"""The glu rules: which gated activations match, and what they save for backward."""

import pytest
import torch
from liger_trainer.kernels.gated_linear import gated_linear
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model
from torch import nn

from liger_trainer import apply_liger
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
