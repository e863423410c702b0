"""Un-padded batches on a GPU: flash attention within rows, the model's gradients in bf16, and steps of all lengths."""

import statistics
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, sdpa_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from liger_trainer import apply_liger
from liger_trainer.patching import patch_state
from liger_trainer.unpadding import attention
from liger_trainer.unpadding.layout import layout_of, read_mask

pytestmark = pytest.mark.gpu


def ragged_mask(rows, tokens, seed=0, left=False):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return (mask.flip(1) if left else mask).cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 64), (8, 2, 128), (4, 1, 256), (3, 3, 72)])
def test_flash_attention_within_rows(dtype, window, heads, key_heads, width, monkeypatch):
    """Outputs and gradients against fp32 rows, at most twice the error of SDPA in the same dtype on padded rows."""
    lengths = read_mask(ragged_mask(7, 150, left=True), None)
    layout = layout_of(lengths, torch.device("cuda"), 128)
    module = SimpleNamespace(
        is_causal=True, num_key_value_groups=heads // key_heads, config=SimpleNamespace(_attn_implementation="sdpa")
    )
    torch.manual_seed(0)
    exact = [torch.randn(1, h, layout.total, width, device="cuda") for h in (heads, key_heads, key_heads)]
    upstream = torch.randn(1, layout.total, heads, width, device="cuda")
    options = {} if window is None else {"sliding_window": window}
    calls = []
    flash = attention._flash
    monkeypatch.setattr(attention, "_flash", lambda *args, **kwargs: calls.append(1) or flash(*args, **kwargs))

    def run(states, dense):
        states = [state.detach().requires_grad_() for state in states]
        with monkeypatch.context() as patch:
            if dense:
                patch.setattr(attention, "_flash_takes", lambda *args: False)
            out = attention.attend_rows(sdpa_attention_forward, module, *states, layout.bounds, **options)[0]
        return [out, *torch.autograd.grad(out, states, upstream.to(out.dtype))]

    expected = run(exact, dense=True)
    half = [state.to(dtype) for state in exact]
    ours, theirs = run(half, dense=False), run(half, dense=True)
    assert len(calls) == 1
    assert not ours[0][0, layout.real :].any(), "the trailing part attends to nothing"
    for mine, other, right in zip(ours, theirs, expected, strict=True):
        assert torch.isfinite(mine).all()
        error, limit = (mine.float() - right).norm(), (other.float() - right).norm()
        assert error <= 2 * limit + 1e-3 * right.norm()


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_in_bf16(side):
    """The error against fp32 is at most 1.2 times that of the unpatched model.

    A left-padded row's first token has no label: padding predicts it, and the kernel decides what padding attends to.
    cuDNN's makes NaN of it in backward, so the unpatched model gets another one.
    """
    ids = torch.randint(3, VOCAB, (16, 64), generator=torch.Generator().manual_seed(2)).cuda()
    mask = ragged_mask(16, 64, left=side == "left")
    labelled = mask.bool() & (mask.cumsum(1) > 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~labelled, -100)}

    def gradients(dtype, patched):
        model = sdpa_model("llama", head_dim=64).to("cuda", dtype).train()
        if patched:
            apply_liger(model, dict.fromkeys(("rms_norm", "rope", "glu", "attention", "fused_loss"), False))
        with nullcontext() if patched else sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            model(**inputs).loss.backward()
        if patched:
            assert patch_state(model).acted["unpad"][0].on
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    exact = gradients(torch.float32, False)
    error, limit = ((gradients(torch.bfloat16, patched) - exact).norm() for patched in (True, False))
    assert error <= 1.2 * limit


def test_no_step_of_another_length_is_slow():
    """Of 200 steps of random lengths, none after the warm-up takes more than 1.3 times the median of its size.

    Layers as wide as a 7B model's: narrower ones take the host longer than the GPU.
    """
    sizes = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 1024,
    }  # fmt: skip
    model = sdpa_model("llama", **sizes).to("cuda", torch.bfloat16).train()
    apply_liger(model)
    seconds = []
    for step in range(220):
        mask = ragged_mask(32, 512, seed=step)
        ids = torch.randint(3, VOCAB, mask.shape, device="cuda")
        labels = ids.masked_fill(mask == 0, -100)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.cuda.synchronize()
        model.zero_grad()
        seconds.append((time.perf_counter() - start) / mask.sum().item())
    assert patch_state(model).acted["unpad"][0].on
    timed = seconds[20:]
    assert max(timed) <= 1.3 * statistics.median(timed)


def test_fp32_takes_the_definition():
    """Flash attention has no fp32; the numbers are those of the padded batch."""
    ids = torch.randint(3, VOCAB, (16, 64), generator=torch.Generator().manual_seed(2)).cuda()
    mask = ragged_mask(16, 64)
    model = sdpa_model("llama").cuda().train()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    theirs = model(**inputs).loss
    apply_liger(model)
    ours = model(**inputs).loss
    assert patch_state(model).acted["unpad"][0].on
    assert F.mse_loss(ours, theirs) < 1e-10
