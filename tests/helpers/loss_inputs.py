"""A small batch of sequences for the losses of liger_trainer.losses, and its log-probabilities from full logits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

VOCAB = 7


class Batch(NamedTuple):
    """Parameters of the policy, labels ``[4, 5]``, and the hidden states and head of a narrower reference."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor
    reference: dict[str, torch.Tensor]

    @property
    def params(self):
        return self.hidden, self.weight, self.bias

    @property
    def args(self):
        return self.hidden, self.weight, self.labels, self.bias

    @property
    def active(self):
        return self.labels != -100


def make_batch(dtype=torch.float32, seed=0, scale=1.0):
    """Prompts of one or two tokens, completions of different lengths; every parameter needs a gradient."""
    gen = torch.Generator().manual_seed(seed)
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (
        (torch.randn(*shape, generator=gen, dtype=torch.float64) * scale).to(dtype)
        for shape in ((4, 5, 3), (VOCAB, 3), (VOCAB,), (4, 5, 2), (VOCAB, 2), (VOCAB,))
    )
    labels = torch.randint(0, VOCAB, (4, 5), generator=gen)
    for row, (start, stop) in enumerate([(1, 5), (2, 4), (1, 3), (0, 5)]):
        labels[row, :start] = labels[row, stop:] = -100
    params = [t.requires_grad_() for t in (hidden, weight, bias)]
    return Batch(*params, labels, {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias})


def log_probs_of(hidden, weight, labels, bias):
    """``[B, T]``, 0 where the label is -100, from full logits."""
    logits = F.linear(hidden, weight, bias).float() if hidden.dtype != torch.float64 else F.linear(hidden, weight, bias)
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, torch.zeros_like(picked), picked)


def reference_of(batch):
    """The reference's ``[B, T]`` log-probabilities."""
    ref = batch.reference
    return log_probs_of(ref["ref_hidden"], ref["ref_weight"], batch.labels, ref["ref_bias"])


def assert_same(batch, ours, expected, rtol=1e-5, atol=3e-6):
    """Equal values and equal gradients of every parameter."""
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
    assert ours.dtype == torch.promote_types(batch.hidden.dtype, torch.float32)
    grads = (torch.autograd.grad(loss, batch.params, retain_graph=True) for loss in (ours, expected))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def gradcheck(function, batch):
    """``torch.autograd.gradcheck`` in fp64, with random projections instead of the whole Jacobian."""
    assert batch.hidden.dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: function(hidden, weight, batch.labels, bias), batch.params, fast_mode=True
    )
