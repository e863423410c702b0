"""The norm rules: which norms match, and that they keep their dtype under autocast."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from liger_trainer import apply_liger
from liger_trainer.rules import norms


@pytest.mark.parametrize(
    ("model_type", "behaviour"), [("gpt_neox", "torch's"), ("cohere", "the input's"), ("nemotron", "autocast's")]
)
def test_layer_norms_keep_their_dtype_under_autocast(model_type, behaviour):
    """What CUDA's autocast would do is told from a CPU; tests/test_models_gpu.py compares on a GPU."""
    model = tiny_model(model_type)
    (norm, *_) = (m for m in model.modules() if norms.matches(m))
    assert norms._autocast_behaviour(norm, type(norm).forward) == behaviour
    assert not torch.is_autocast_enabled("cuda")
    apply_liger(model)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, norm.weight.shape[0], dtype=dtype)
            assert norm(x).dtype == type(norm).forward(norm, x).dtype


def test_a_layer_norm_by_another_name_of_torch_s():
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    assert norms._autocast_behaviour(Norm(32), Norm.forward) == "torch's"


def test_other_normalisations_are_no_candidates():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.LayerNorm(8))
    report = apply_liger(model, {"strict": True, "fused_loss": False})
    assert report.counts == {"layer_norm": 1}
