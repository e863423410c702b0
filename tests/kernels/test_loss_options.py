"""Class weights, token scaling, returned z-loss and predictions of cross_entropy and linear_cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from linear_inputs import DEVICE, budget, make_inputs

from liger_trainer.kernels.cross_entropy import cross_entropy
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.runtime import launch

VOCAB = 101
WEIGHTS = torch.rand(VOCAB, generator=torch.Generator().manual_seed(5)).to(DEVICE)


@pytest.fixture(autouse=True)
def plain_definitions(request, monkeypatch):
    if "triton" not in request.keywords:
        monkeypatch.setattr(launch, "INTERPRET", False)


def of_logits(params, labels, **options):
    hidden, weight, bias = params
    return cross_entropy(F.linear(hidden, weight, bias), labels, **options)


def of_hidden(params, labels, **options):
    hidden, weight, bias = params
    return linear_cross_entropy(hidden, weight, labels, bias, logits_budget_mib=budget(20, torch.float32), **options)


def of_torch(params, labels, reduction="mean", **options):
    hidden, weight, bias = params
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, weight=WEIGHTS, reduction=reduction, **options)


OPS = pytest.mark.parametrize("op", [of_logits, of_hidden])


def assert_same(params, ours, expected):
    upstream = torch.linspace(0.5, 1.5, ours.numel(), device=DEVICE).view(ours.shape)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        *(torch.autograd.grad(t, params, upstream, retain_graph=True) for t in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@OPS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_are_torchs(op, reduction):
    params, labels = make_inputs(tokens=15)
    ours = op(params, labels, class_weights=WEIGHTS, reduction=reduction)
    assert_same(params, ours, of_torch(params, labels, reduction))


@pytest.mark.triton
@OPS
def test_on_the_kernels(op):
    params, labels = make_inputs(tokens=6)
    options = {"class_weights": WEIGHTS, "z_loss": 0.01}
    weighted = op(params, labels, token_scaling=True, reduction="sum")
    probs = F.linear(*params).softmax(-1)[labels != -100].gather(-1, labels[labels != -100].unsqueeze(-1)).squeeze(-1)
    assert_same(params, weighted, -(probs.detach() * probs.log()).sum())
    loss, z_loss = op(params, labels, return_z_loss=True, **options)
    valid, lse = labels != -100, F.linear(*params).logsumexp(-1)
    weights = WEIGHTS[labels.clamp(min=0)].where(valid, 0.0)
    expected = (0.01 * lse.square() * weights).sum() / weights.sum()
    assert_same(params, loss, of_torch(params, labels) + expected)
    torch.testing.assert_close(z_loss, expected.detach())


@OPS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_scaling_weighs_by_the_labels_probability(op, reduction):
    params, labels = make_inputs(tokens=15)
    valid, tokens = labels != -100, torch.rand(labels.shape, device=DEVICE)
    log_probs = (8 * torch.tanh(F.linear(*params) / 8)).log_softmax(-1)
    log_probs = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = (-tokens * log_probs.exp().detach() * log_probs).where(valid, 0.0)
    expected = expected.sum() / valid.sum() if reduction == "mean" else expected
    ours = op(params, labels, token_scaling=True, token_weights=tokens, softcap=8.0, reduction=reduction)
    assert_same(params, ours, expected)


@OPS
def test_class_weights_with_token_weights_and_num_items(op):
    params, labels = make_inputs(tokens=15)
    tokens = torch.rand(labels.shape, device=DEVICE)
    ours = op(params, labels, class_weights=WEIGHTS, token_weights=tokens, num_items=7)
    assert_same(params, ours, (of_torch(params, labels, "none") * tokens).sum() / 7)
    mean = op(params, labels, class_weights=WEIGHTS, token_weights=tokens)
    divisor = WEIGHTS[labels[labels != -100]].sum()
    assert_same(params, mean, (of_torch(params, labels, "none") * tokens).sum() / divisor)


@OPS
@pytest.mark.parametrize("weights", [WEIGHTS, torch.zeros_like(WEIGHTS)], ids=["ignored", "weightless"])
def test_nothing_that_counts_gives_zero(op, weights):
    params, labels = make_inputs(tokens=15, ignored=0.0 if weights is not WEIGHTS else 2.0)
    loss = op(params, labels, class_weights=weights)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, params))


@OPS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_the_returned_z_loss_is_in_the_loss(op, reduction, class_weights):
    params, labels = make_inputs(tokens=15)
    options = {"reduction": reduction, "class_weights": class_weights, "softcap": 8.0}
    loss, z_loss = op(params, labels, z_loss=0.01, return_z_loss=True, **options)
    assert_same(params, loss, op(params, labels, z_loss=0.01, **options))
    assert not z_loss.requires_grad
    torch.testing.assert_close(z_loss, (loss - op(params, labels, **options)).detach(), rtol=1e-3, atol=1e-5)
    assert op(params, labels, return_z_loss=True, **options)[1].abs().sum() == 0


def test_z_loss_comes_after_the_statistics_and_without_gradients_too():
    params, labels = make_inputs(tokens=15)
    loss, stats, z_loss = of_hidden(params, labels, z_loss=0.01, return_stats=True, return_z_loss=True)
    with torch.no_grad():
        again = of_hidden(params, labels, z_loss=0.01, return_stats=True, return_z_loss=True)
        alone = of_logits(params, labels, z_loss=0.01, return_z_loss=True)
    torch.testing.assert_close((loss, z_loss), (again[0], again[2]))
    torch.testing.assert_close((loss, z_loss), alone)
    logits = F.linear(*params)
    assert torch.equal(stats.is_top1, (logits.argmax(-1) == labels))


@pytest.mark.triton
@pytest.mark.parametrize("logit_scale", [1.5, -1.5])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.1, 0.4, 2.0])  # few ignored rows are computed too in vocabulary chunks
def test_predictions(low_memory, logit_scale, ignored, monkeypatch):
    params, labels = make_inputs(tokens=12, ignored=ignored)
    expected = (logit_scale * F.linear(*params)).argmax(-1).masked_fill(labels == -100, -100)
    options = {"logit_scale": logit_scale, "low_memory": low_memory, "softcap": 8.0, "z_loss": 0.01}
    for interpreted in (logit_scale > 0 and ignored == 0.4, False):
        monkeypatch.setattr(launch, "INTERPRET", interpreted)
        loss, stats, z_loss, predictions = of_hidden(
            params, labels, return_stats=True, return_z_loss=True, return_predictions=True, **options
        )
        assert predictions.dtype == torch.int64
        assert torch.equal(predictions, expected)
        assert torch.equal(stats.is_top1, predictions == labels.masked_fill(labels == -100, -1))
        alone, z_alone = of_hidden(params, labels, return_z_loss=True, **options)
        torch.testing.assert_close((loss, z_loss), (alone, z_alone))
        assert_same(params, loss, alone)


def test_predictions_of_ties_and_any_shape():
    hidden, labels = torch.ones(2, 3, 1, device=DEVICE), torch.zeros(2, 3, dtype=torch.long, device=DEVICE)
    weight = torch.tensor([[0.0], [1.0], [1.0]], device=DEVICE)
    for low_memory in (False, True):
        _, predictions = linear_cross_entropy(hidden, weight, labels, return_predictions=True, low_memory=low_memory)
        assert torch.equal(predictions, torch.ones_like(labels))


def test_gradients_of_gradients_with_everything_returned():
    params, labels = make_inputs(tokens=5)
    loss, *_ = of_hidden(params, labels, return_stats=True, return_z_loss=True, return_predictions=True)
    expected = F.cross_entropy(F.linear(*params), labels)
    second = []
    for value in (loss, expected):
        first = torch.autograd.grad(value, params, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), params))
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5)


@OPS
def test_one_graph(op):
    params, labels = make_inputs(tokens=15)

    def function(labels):
        more = {"return_stats": True, "return_predictions": True} if op is of_hidden else {}
        return op(params, labels, z_loss=0.01, class_weights=WEIGHTS, token_scaling=True, return_z_loss=True, **more)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(labels)
    eager = function(labels)
    assert_same(params, compiled[0], eager[0])
    torch.testing.assert_close(compiled[1:], eager[1:])


@OPS
def test_wrong_arguments(op):
    params, labels = make_inputs(tokens=15)
    with pytest.raises(ValueError, match=r"class_weights: got shape \(3,\); must be \(101,\)"):
        op(params, labels, class_weights=WEIGHTS[:3])
    with pytest.raises(TypeError, match=r"class_weights: got dtype torch.int64"):
        op(params, labels, class_weights=WEIGHTS.long())
    with pytest.raises(ValueError, match=r"class_weights: got some with label_smoothing 0.1; must be None"):
        op(params, labels, class_weights=WEIGHTS, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"labels: got 200; must be in"):
        op(params, labels.masked_fill(labels == labels.max(), 200), class_weights=WEIGHTS)
