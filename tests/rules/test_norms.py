"""The norm rules: which norms match, and that they keep their dtype under autocast."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from liger_trainer import apply_liger
from liger_trainer.rules import norms


@pytest.mark.parametrize(
    ("model_type", "behaviour"), [("gpt_neox", "torch's"), ("cohere", "the input's"), ("nemotron", "autocast's")]
)
def test_layer_norms_keep_their_dtype_under_autocast(model_type, behaviour):
    """CUDA's autocast behaviour is predicted on the CPU; tests/test_models_gpu.py compares on a GPU."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchs_rms_norm_without_an_epsilon(dtype):
    """Its epsilon is fp32's in any dtype. One that is set later counts."""
    norm = nn.RMSNorm(16).to(dtype)
    assert apply_liger(norm, {"fused_loss": False}).counts == {"rms_norm": 1}
    x = 1e-3 * torch.randn(3, 16, dtype=dtype)
    for eps in (None, 0.5):
        norm.eps = eps
        torch.testing.assert_close(norm(x), nn.RMSNorm.forward(norm, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_weights_in_half_precision_below_fp32(model_type, dtype):
    """T5's norm then gives half precision, Llama's fp32."""
    cls = LlamaRMSNorm if model_type == "llama" else T5LayerNorm
    norm = cls(16).to(dtype)
    assert apply_liger(norm, {"fused_loss": False}).counts == {"rms_norm": 1}
    x = torch.randn(3, 16)
    for each in (x, x.to(dtype)):
        ours, theirs = norm(each), cls.forward(norm, each)
        assert ours.dtype == theirs.dtype == (torch.float32 if each is x and model_type == "llama" else dtype)
        torch.testing.assert_close(ours, theirs)
