"""Weights that are not tensors of torch itself: what is replaced computes the same, and what is not says so."""

import copy

import pytest
import torch
from foreign import Quantised
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model

from liger_trainer import apply_liger

MODULES = {
    "rms_norm": lambda model: model.model.norm,
    "glu": lambda model: model.model.layers[0].mlp.down_proj,
    "glu, gate": lambda model: model.model.layers[1].mlp.gate_proj,
    "fused_loss": lambda model: model.lm_head,
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after apply_liger"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_quantised_weight_trains_as_without_the_patch(kind, late):
    model, inputs = tiny_model("llama").train(), batch()
    patched = copy.deepcopy(model)

    def quantise(model):
        module = MODULES[kind](model)
        module.weight = torch.nn.Parameter(Quantised(module.weight.detach()), requires_grad=False)

    quantise(model)
    if late:
        report = apply_liger(patched, {"recompute_glu": True})
        quantise(patched)
    else:
        quantise(patched)
        report = apply_liger(patched, {"recompute_glu": True})
        reasons = [s.reason for s in report.skipped if s.kind == "fused_loss"]
        assert len(reasons) == (kind == "fused_loss")
        assert all("Quantised of foreign" in reason for reason in reasons)
    assert report.counts["rms_norm"] == 5
    assert_same_training(loss_and_gradients(model, inputs), loss_and_gradients(patched, inputs))
