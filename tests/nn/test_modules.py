"""The modules against torch's and transformers': state dicts, outputs and gradients."""

import pytest
import torch
from numerics import assert_no_worse_than_torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from liger_trainer.kernels.runtime import launch
from liger_trainer.nn import LigerGEGLUMLP, LigerLayerNorm, LigerRMSNorm, LigerSwiGLUMLP

WIDTH = 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[False, True], ids=["definition", "kernel"], autouse=True)
def backend(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(launch, "INTERPRET", False)


def mlp_config(cls, act, **options):
    return cls(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=2, hidden_act=act, **options)


def llama(act, **options):
    return mlp_config(LlamaConfig, act, **options)


def gemma(act):
    return mlp_config(GemmaConfig, act)


# Ours and the module it stands for
PAIRS = {
    "rms norm, torch": lambda: (LigerRMSNorm(WIDTH, None, scale_in_fp32=True), nn.RMSNorm(WIDTH)),
    "rms norm, no weight": lambda: (LigerRMSNorm((WIDTH,), 1e-5, False), nn.RMSNorm(WIDTH, 1e-5, False)),
    "rms norm, llama": lambda: (LigerRMSNorm(WIDTH), LlamaRMSNorm(WIDTH)),
    "rms norm, gemma": lambda: (LigerRMSNorm(WIDTH, weight_offset=1.0, scale_in_fp32=True), GemmaRMSNorm(WIDTH)),
    "layer norm": lambda: (LigerLayerNorm(WIDTH), nn.LayerNorm(WIDTH)),
    "layer norm, no bias": lambda: (LigerLayerNorm([WIDTH], 1e-3, bias=False), nn.LayerNorm(WIDTH, 1e-3, bias=False)),
    "layer norm, plain": lambda: (LigerLayerNorm(WIDTH, 1e-6, False), nn.LayerNorm(WIDTH, 1e-6, False)),
    "swiglu": lambda: (LigerSwiGLUMLP(llama("silu")), LlamaMLP(llama("silu"))),
    "swiglu, bias": lambda: (LigerSwiGLUMLP(llama("swish", mlp_bias=True)), LlamaMLP(llama("swish", mlp_bias=True))),
    "geglu, tanh": lambda: (LigerGEGLUMLP(gemma("gelu_pytorch_tanh")), GemmaMLP(gemma("gelu_pytorch_tanh"))),
    "geglu, exact": lambda: (LigerGEGLUMLP(llama("gelu")), LlamaMLP(llama("gelu"))),
}


def run(module, x, upstream):
    x = x.clone().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], upstream.to(out.dtype))
    return out, dict(zip(["input", *(n for n, _ in module.named_parameters())], grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_outputs_and_gradients_are_the_originals(name, dtype):
    if dtype == torch.bfloat16 and launch.INTERPRET:
        return  # the interpreter truncates fp32 to bf16 instead of rounding
    torch.manual_seed(0)
    ours, theirs = (m.to(DEVICE) for m in PAIRS[name]())
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    if "norm" in name:
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)  # both start the same
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, upstream = (torch.randn(2, 3, WIDTH, device=DEVICE).to(dtype) for _ in range(2))
    exact = run(theirs.double(), x.double(), upstream)
    got, same = (run(module.to(dtype), x, upstream) for module in (ours, theirs))
    assert_no_worse_than_torch(got[0], same[0], exact[0])
    for key, grad in got[1].items():
        assert_no_worse_than_torch(grad, same[1][key], exact[1][key], key)


def test_they_are_found_as_norms_and_say_what_they_are():
    norms = nn.Sequential(LigerRMSNorm(8, dtype=torch.bfloat16), LigerLayerNorm(8, device="meta"))
    assert isinstance(norms[0], nn.RMSNorm)
    assert isinstance(norms[1], nn.LayerNorm)
    assert norms[0].weight.dtype == torch.bfloat16
    assert norms[1].bias.device.type == "meta"
    assert "eps=1e-06" in repr(norms)


def test_the_mlps_take_another_width():
    mlp = LigerSwiGLUMLP(llama("silu"), intermediate_size=6)
    assert mlp.down_proj.weight.shape == (WIDTH, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LigerRMSNorm((3, 4)), r"hidden_size: got \(3, 4\); must be one positive number"),
        (lambda: LigerLayerNorm(0), "normalized_shape: got 0"),
        (lambda: LigerRMSNorm(4)(torch.zeros(2, 5)), r"x: got shape \(2, 5\); must be \[\.\.\., 4\]"),
        (lambda: LigerSwiGLUMLP(llama("gelu")), "config.hidden_act: got 'gelu'; must be one of 'silu', 'swish'"),
        (lambda: LigerGEGLUMLP(llama("silu")), "config.hidden_act: got 'silu'; must be one of 'gelu_pytorch_tanh'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
