"""Patched models under torch.compile: one graph, the unpatched model's losses and gradients."""

import copy

import pytest
import torch
from tiny_models import batch, tiny_model

from liger_trainer import apply_liger
from liger_trainer.patching import patch_state

ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_training_is_one_graph(model_type, checkpointing):
    """Forward, fused loss and backward without a graph break, and without compiling again at later steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    device = "cuda" if ON_GPU else "cpu"
    plain = tiny_model(model_type, use_cache=False).to(device).train()
    model = copy.deepcopy(plain)
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    apply_liger(model, {"strict": True, "attention": model.config._attn_implementation == "sdpa"})
    # Reentrant checkpointing is an autograd.Function that calls back into Python: it breaks the graph by itself.
    compiled = torch.compile(model, fullgraph=not checkpointing, backend="inductor" if ON_GPU else "aot_eager")
    for seed in range(3):
        inputs = {k: v.to(device) for k, v in batch(seed=seed).items()}
        inputs["num_items_in_batch"] = torch.tensor(9, device=device)
        results = []
        for each in (plain, compiled):
            each.zero_grad()
            out = each(**inputs)
            out.loss.backward()
            results.append(out.loss.detach())
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
        for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
            error = (actual.grad - expected.grad).norm() / expected.grad.norm().clamp(min=1e-12)
            assert error < (1e-4 if ON_GPU else 1e-5), f"{name}: {error:.1e}"
    assert out.logits.shape[-1] == 0  # the fused loss acted
    state = patch_state(model)
    state.count_step()
    assert {kind for kind, steps in state.report.ran.items() if steps} >= {"rms_norm", "rope", "glu", "fused_loss"}
    if not checkpointing:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_training_in_cuda_graphs(model_type):
    """Everything but the fused loss, which reads the number of labels, is replayed from CUDA graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = tiny_model(model_type, use_cache=False).cuda().train()
    model = copy.deepcopy(plain)
    apply_liger(model, {"strict": True, "attention": model.config._attn_implementation == "sdpa"})
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):  # warm-up, recording, replay
        inputs = {k: v.cuda() for k, v in batch(seed=seed).items()}
        results = []
        for each in (plain, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            each.zero_grad()
            loss = each(**inputs).loss
            loss.backward()
            results.append(loss.detach().clone())
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
        for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
            error = (actual.grad - expected.grad).norm() / expected.grad.norm().clamp(min=1e-12)
            assert error < 1e-4, f"{name}: {error:.1e}"
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
