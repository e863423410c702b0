"""The losses in torch.compile: one graph, the numbers of eager; distillation_loss breaks the graph and is right too."""

import pytest
import torch
from loss_inputs import make_batch

from liger_trainer.losses import distillation_loss, dpo_loss, grpo_loss


def preferences(batch):
    types = ("sigmoid", "aot", "sft")
    loss, stats = dpo_loss(*batch.args, **batch.reference, loss_type=types, ld_alpha=0.5, return_stats=True)
    return loss, stats.entropy


def policy(batch):
    options = {"beta": 0.1, "importance_sampling_level": "sequence", "entropy_coef": 0.1, "return_stats": True}
    loss, stats = grpo_loss(*batch.args, **batch.reference, advantages=torch.tensor([1.2, -0.7, 0.4, -1.5]), **options)
    return loss, stats.kl


def distillation(batch):
    teacher = {name.replace("ref_", "teacher_"): t for name, t in batch.reference.items()}
    return distillation_loss(*batch.args, **teacher, hard_weight=0.5), batch.labels


@pytest.mark.parametrize("function", [preferences, policy, distillation])
def test_compiled_is_eager(function):
    batch = make_batch()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=function is not distillation, backend="aot_eager")(batch)
    eager = function(batch)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(*(torch.autograd.grad(loss, batch.params) for loss, _ in (compiled, eager)))
