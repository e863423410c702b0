"""Medusa heads with the kernels on a GPU: precision, determinism and the allocator's own count of memory."""

import pytest
import torch
import torch.nn.functional as F

from liger_trainer import MedusaConfig
from liger_trainer.medusa import heads as medusa_heads
from liger_trainer.medusa.loss import plain_head_loss


@pytest.mark.gpu
def test_heads_on_a_gpu():
    """In bf16: gradients as good as plain ones, memory above the parameters' gradients flat, two runs bit-equal."""
    torch.manual_seed(0)
    embedding = (0.05 * torch.randn(32000, 512, device="cuda")).bfloat16()
    labels = torch.randint(0, 32000, (4, 512), device="cuda")
    labels[torch.rand(4, 512, device="cuda") < 0.2] = -100
    states = torch.randn(4, 512, 512, device="cuda").bfloat16()

    def run(count, dtype, head_loss):
        heads = medusa_heads.MedusaHeads(embedding.to(dtype), MedusaConfig(heads=count))
        hidden = states.to(dtype, copy=True).requires_grad_()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        options = {"logits_budget_mib": 16} if head_loss is None else {}
        loss, _ = heads(hidden, labels, torch.tensor(1700, device="cuda"), head_loss, options)
        (0.5 * loss).backward()
        own = sum(p.numel() * p.element_size() for p in heads.parameters())
        gradients = {"hidden": hidden.grad, **{n: p.grad for n, p in heads.named_parameters()}}
        return gradients, torch.cuda.max_memory_allocated() - before - own

    for _ in range(2):  # the first time, cuBLAS takes its workspace
        fused, peak = run(5, torch.bfloat16, None)
    again, _ = run(5, torch.bfloat16, None)
    assert all(torch.equal(gradient, again[name]) for name, gradient in fused.items())
    assert peak < 1.05 * run(1, torch.bfloat16, None)[1]
    plain, _ = run(5, torch.bfloat16, plain_head_loss)
    for name, exact in run(5, torch.float64, plain_head_loss_in_fp64)[0].items():
        errors = [((g[name].double() - exact).norm() / exact.norm()).item() for g in (fused, plain)]
        assert errors[0] < 1.25 * errors[1], f"{name}: {errors[0]:.2e}, plain {errors[1]:.2e}"


def plain_head_loss_in_fp64(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
