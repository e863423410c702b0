"""linear_cross_entropy and linear_logprobs inside torch.compile: one graph, the eager ops' numbers."""

import pytest
import torch
from linear_inputs import DEVICE, budget, make_inputs
from numerics import as_dtype

from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_empty_logits
from liger_trainer.kernels.linear_logprobs import linear_logprobs


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


def gradients(fn, params, upstream):
    loss, *others = fn(*params)
    upstream = torch.full_like(loss, 2.5) if upstream is None else upstream
    return [loss, *others, *torch.autograd.grad(loss, params, upstream)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"return_stats": True, "label_smoothing": 0.1, "softcap": 5.0, "num_items": 50}),
        (torch.float16, {"num_items": torch.tensor([50])}),
        (torch.bfloat16, {"low_memory": True, "return_stats": True}),
        (torch.float32, {"reduction": "none", "z_loss": 1e-3}),
    ],
    ids=["mean", "fp16", "vocabulary chunks", "none"],
)
def test_equals_eager(dtype, options):
    params, labels = make_inputs()
    params = as_dtype(params, dtype)
    options = {"token_weights": torch.rand(37, device=DEVICE), "logits_budget_mib": budget(10, dtype)} | options
    upstream = torch.randn(37, device=DEVICE) if options.get("reduction") == "none" else None

    def loss_and_stats(hidden, weight, bias):
        out = linear_cross_entropy(hidden, weight, labels, bias, **options)
        return (out[0], *out[1]) if options.get("return_stats") else (out,)

    eager = gradients(loss_and_stats, params, upstream)
    ours = gradients(compiled(loss_and_stats), params, upstream)
    for a, b in zip(ours, eager, strict=True):
        assert a.requires_grad == b.requires_grad
        if dtype == torch.float16:  # the reduction's factor is rounded once more
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


def test_empty_logits_and_frozen_weight():
    (hidden, weight, _), labels = make_inputs()
    weight.requires_grad_(False)

    def scaled_loss(hidden):
        loss, stats, logits = linear_cross_entropy_with_empty_logits(hidden * 2, weight, labels)
        assert stats is None
        assert logits.shape == (37, 0)
        return (3 * loss + logits.sum(),)

    eager = gradients(scaled_loss, [hidden], None)
    for a, b in zip(gradients(compiled(scaled_loss), [hidden], None), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
def test_log_probs(low_memory):
    params, labels = make_inputs()
    factors = torch.randn(2, 37, device=DEVICE)
    own = {"logits_budget_mib": budget(20, torch.float32), "low_memory": low_memory, "temperature": 0.7}

    def loss_and_fields(hidden, weight, bias):
        out = linear_logprobs(hidden, weight, labels, bias, **own)
        loss = (factors[0] * out.log_probs).sum()
        return (loss if low_memory else loss + (factors[1] * out.entropy).sum(), *out)

    eager = gradients(loss_and_fields, params, None)
    for a, b in zip(gradients(compiled(loss_and_fields), params, None), eager, strict=True):
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b)


def test_labels_out_of_range_raise():
    (hidden, weight, _), labels = make_inputs()
    labels[3] = 101
    with pytest.raises(ValueError, match="labels: got 101"):
        compiled(linear_cross_entropy)(hidden, weight, labels)
