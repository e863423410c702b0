"""Patched models and Trainers on a GPU, with the Triton kernels: as right as the unpatched model in the same dtype."""

import copy

import pytest
import torch
from tiny_models import MODEL_TYPES, batch, tiny_model
from training import Rows, arguments, losses
from transformers import Trainer

from liger_trainer import apply_liger, revert_liger
from liger_trainer.patching import patch_state

pytestmark = pytest.mark.gpu
EXPERTS = ("mixtral", "deepseek_v3")  # grouped: they have no fp64 form on a GPU, and scatter in no fixed order


def gradients(model, inputs):
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def total_error(ours, exact):
    """Error of all gradients together, relative to their norm."""
    square = lambda tensors: sum(t.square().sum().item() for t in tensors)  # noqa: E731
    return (square(ours[n] - exact[n] for n in exact) / square(exact.values())) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_are_as_good_as_the_unpatched_model_s(model_type, dtype):
    inputs = {k: v.cuda() for k, v in batch(rows=4, tokens=33).items()}
    model = tiny_model(model_type).cuda()
    exact_model = copy.deepcopy(model) if model_type in EXPERTS else copy.deepcopy(model).double()
    exact_loss, exact = gradients(exact_model, inputs)
    model = model.to(dtype)
    loss, theirs = gradients(model, inputs)
    apply_liger(model, {"strict": True, "attention": model.config._attn_implementation == "sdpa"})
    our_loss, ours = gradients(model, inputs)
    again_loss, again = gradients(model, inputs)
    tiny = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert abs(our_loss - exact_loss) <= 2 * abs(loss - exact_loss) + tiny * abs(exact_loss)
    assert total_error(ours, exact) <= 1.5 * total_error(theirs, exact) + tiny
    assert our_loss == again_loss
    if model_type not in EXPERTS:
        assert all(torch.equal(ours[n], again[n]) for n in ours)
    revert_liger(model)
    assert gradients(model, inputs)[0] == loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("option", ["attention", "padding_mask"])
def test_attention_to_padded_rows(option, head_dim, dtype, monkeypatch):
    inputs = {k: v.cuda() for k, v in batch(rows=4, tokens=96).items()}
    inputs["attention_mask"][1:, -20:] = 0
    inputs["labels"][1:, -20:] = -100
    shape = {"head_dim": head_dim, "num_attention_heads": 8, "max_position_embeddings": 96}
    model = tiny_model("llama", attn_implementation="sdpa", **shape).cuda()
    exact_loss, exact = gradients(copy.deepcopy(model).double(), inputs)
    model = model.to(dtype)
    loss, theirs = gradients(model, inputs)
    apply_liger(model, {"unpad": False} | {name: name == option for name in ("attention", "padding_mask")})
    key_heads, masked = [], []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        key_heads.append(key.shape[1])
        masked.append(attn_mask is not None)
        return sdpa(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    our_loss, ours = gradients(model, inputs)
    assert masked == [option == "attention"] * 2
    if option == "padding_mask" or torch.cuda.get_device_capability() >= (9, 0):  # where cuDNN's kernel is preferred
        assert key_heads == [2, 2]
    tiny = {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert abs(our_loss - exact_loss) <= 2 * abs(loss - exact_loss) + tiny * abs(exact_loss)
    assert total_error(ours, exact) <= 1.5 * total_error(theirs, exact) + tiny


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "cohere", "nemotron", "gpt_neox"])
def test_norms_keep_their_dtypes_under_autocast(model_type):
    model = tiny_model(model_type).cuda()
    norms = {a.module for a in apply_liger(model).applied if a.kind in ("rms_norm", "layer_norm")}
    assert norms
    for name in norms:
        norm = model.get_submodule(name)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, 64 if norm.weight is None else norm.weight.shape[0], device="cuda", dtype=dtype)
            with torch.autocast("cuda", torch.bfloat16):
                assert norm(x).dtype == type(norm).forward(norm, x).dtype, (name, dtype)


@pytest.mark.parametrize("precision", ["bf16 autocast", "bf16 weights", "fp16 autocast", "fp32", "checkpointing"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_trainer_on_a_gpu(model_type, precision, tmp_path):
    runs = []
    for flag in (False, True):
        model = tiny_model(model_type)
        if precision == "bf16 weights":
            model = model.to(torch.bfloat16)
        args = arguments(
            tmp_path, use_liger=flag, use_cpu=False, optim="sgd", learning_rate=0.1, max_steps=8,
            bf16=precision in ("bf16 autocast", "checkpointing"), fp16=precision == "fp16 autocast",
            activation_checkpointing=precision == "checkpointing",
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Rows(valid=lambda i: (12, 3, 7, 0, 1, 9)[i % 6]))
        trainer.train()
        runs.append(trainer)
    assert patch_state(runs[1].model).fused.calls_fused == 8
    theirs, ours = (torch.tensor(losses(run)) for run in runs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if precision == "fp32" else 2e-2, atol=1e-6)
