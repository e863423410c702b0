"""linear_logprobs against its definition, with and without gradients computed ahead in forward."""

import pytest
import torch
from linear_inputs import DEVICE, DTYPES, budget, make_inputs
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import linear_logprobs as module
from liger_trainer.kernels import reference
from liger_trainer.kernels.linear_logprobs import Speculation, linear_logprobs
from liger_trainer.kernels.linear_loss import token_chunks

DIFFERENTIABLE = ("log_probs", "entropy")


def run(op, params, labels, upstream, **options):
    """Outputs, and gradients for ``upstream``: a dict from output to its gradient."""
    hidden, weight, bias = params
    out = op(hidden, weight, labels, bias, **options)
    ys = [getattr(out, name) for name in upstream]
    gs = [g.to(y.dtype) for g, y in zip(upstream.values(), ys, strict=True)]
    return out, torch.autograd.grad(ys, [p for p in params if p is not None and p.requires_grad], gs)


def check(
    params, labels, dtype, upstream, factor=2.0, logits_budget_mib=512, speculation=None, low_memory=False, **options
):
    same = as_dtype(params, dtype)
    exact = as_dtype(same, torch.float64)
    own = {"logits_budget_mib": logits_budget_mib, "speculation": speculation, "low_memory": low_memory}
    ours = run(linear_logprobs, same, labels, upstream, **own, **options)
    theirs = run(reference.linear_logprobs, same, labels, upstream, **options)
    truth = run(reference.linear_logprobs, exact, labels, upstream, **options)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        assert_no_worse_than_torch(*(getattr(o[0], name) for o in (ours, theirs, truth)), name)
        assert getattr(ours[0], name).requires_grad == (name in DIFFERENTIABLE)
    assert torch.equal(ours[0].is_top1, theirs[0].is_top1)
    for name, *grads in zip(("hidden", "weight", "bias"), ours[1], theirs[1], truth[1], strict=False):
        assert_no_worse_than_torch(*grads, name)


def upstreams(shape, *names, constant=None):
    gen = torch.Generator().manual_seed(1)
    make = (lambda: torch.randn(shape, generator=gen)) if constant is None else (lambda: torch.full(shape, constant))
    return {name: make().to(DEVICE) for name in names}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [("log_probs",), ("entropy",), DIFFERENTIABLE], ids=str)
@pytest.mark.parametrize(
    ("options", "chunk", "low_memory", "use_bias", "ignored"),
    [({}, 1000, False, False, 0.0), ({"temperature": 0.7, "softcap": 8.0, "logit_scale": 1.5}, 20, True, True, 0.3)],
    ids=["plain", "all"],
)
def test_matches_definition(backend, dtype, names, options, chunk, low_memory, use_bias, ignored):
    params, labels = make_inputs(ignored=ignored)
    params = params if use_bias else [*params[:2], None]
    options = {"low_memory": low_memory} | options
    check(params, labels, dtype, upstreams((37,), *names), logits_budget_mib=budget(chunk, dtype), **options)


@pytest.mark.parametrize(
    ("constant", "ignored", "low_memory"),
    [(-1 / 37, 0.0, False), (-1 / 500, 0.3, False), (2.0, 0.3, True), (-1 / 500, 0.05, True)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_upstream_gradients_use_the_speculation(backend, monkeypatch, dtype, constant, ignored, low_memory):
    params, labels = make_inputs(ignored=ignored)
    monkeypatch.setattr(module, "recompute", lambda *_: pytest.fail("logits were computed again"))
    speculation, upstream = Speculation(), upstreams((37,), "log_probs", constant=constant)
    upstream["entropy"] = torch.zeros(37, device=DEVICE)
    upstream["log_probs"][labels == -100] = 5.0  # does not matter: ignored positions are constants
    options = {"logits_budget_mib": budget(20, dtype), "low_memory": low_memory, "softcap": 8.0}
    check(params, labels, dtype, upstream, speculation=speculation, **options)
    assert speculation.active


@pytest.mark.parametrize("names", [("log_probs",), ("entropy",)], ids=str)
def test_wrong_speculation_is_recomputed_and_stops(backend, monkeypatch, names):
    params, labels = make_inputs()
    speculation = Speculation()
    check(params, labels, torch.float32, upstreams((37,), *names), speculation=speculation)
    assert not speculation.active
    monkeypatch.setattr(token_chunks.GradientSums, "add", lambda *_: pytest.fail("still speculates"))
    linear_logprobs(params[0], params[1], labels, speculation=speculation)


@pytest.mark.parametrize("equal", [True, False])
def test_backward_twice(backend, equal):
    params, labels = make_inputs()
    log_probs = linear_logprobs(params[0], params[1], labels, params[2], speculation=Speculation()).log_probs
    upstream = upstreams((37,), "log_probs", constant=3.0 if equal else None)["log_probs"]
    first = torch.autograd.grad(log_probs, params, upstream, retain_graph=True)
    copies = [g.clone() for g in first]
    last = torch.autograd.grad(log_probs, params, upstream)
    for a, copy, b in zip(first, copies, last, strict=True):
        assert torch.equal(a, copy)
        assert torch.equal(a, b)


def test_speculation_then_unequal_gradients_on_a_kept_graph(backend):
    params, labels = make_inputs()
    log_probs = linear_logprobs(params[0], params[1], labels, params[2], speculation=Speculation()).log_probs
    torch.autograd.grad(log_probs.sum(), params, retain_graph=True)
    upstream = upstreams((37,), "log_probs")
    expected = run(reference.linear_logprobs, params, labels, upstream)[1]
    for a, b in zip(torch.autograd.grad(log_probs, params, upstream["log_probs"]), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_valid_label(backend, tokens, speculate, dtype):
    params, labels = make_inputs(tokens=tokens, ignored=2.0)
    params = as_dtype(params, dtype)
    speculation = Speculation() if speculate else None
    out, grads = run(linear_logprobs, params, labels, upstreams((tokens,), *DIFFERENTIABLE), speculation=speculation)
    for t in out:
        assert t.shape == labels.shape
        assert not t.any()
    for g, p in zip(grads, params, strict=True):
        assert g.dtype == dtype
        assert torch.equal(g, torch.zeros_like(p))


@pytest.mark.parametrize("speculate", [True, False])
def test_batched_frozen_weight_and_no_grad(backend, speculate):
    (hidden, weight, _), labels = make_inputs(tokens=40)
    hidden = hidden.detach().view(5, 8, 12).transpose(0, 1).requires_grad_()
    labels = labels.view(8, 5)
    speculation = Speculation() if speculate else None
    params = [hidden, weight.detach(), None]
    check(params, labels, torch.float32, upstreams((8, 5), "log_probs", constant=1.0), speculation=speculation)
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, labels, speculation=speculation).log_probs.requires_grad


@pytest.mark.parametrize("speculate", [True, False])
def test_autocast(backend, speculate):
    params, labels = make_inputs(tokens=50)
    upstream = upstreams((50,), "log_probs", constant=-0.01)
    exact = run(reference.linear_logprobs, as_dtype(params, torch.float64), labels, upstream)[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(linear_logprobs, params, labels, upstream, speculation=Speculation() if speculate else None)[1]
        theirs = run(reference.linear_logprobs, params, labels, upstream)[1]
    for name, *grads in zip(("hidden", "weight", "bias"), ours, theirs, exact, strict=True):
        assert_no_worse_than_torch(*grads, name)


@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
def test_first_argmax_wins_ties(backend, low_memory):
    weight = torch.ones(6, 4, device=DEVICE)
    weight[0] = 0.5  # the first of the tied maxima is in the second sixteen columns
    weight = weight.repeat_interleave(16, 0)  # the smallest vocabulary chunk
    labels = torch.tensor([16, 17, 48, 0], device=DEVICE)
    own = {"logits_budget_mib": 1e-6, "low_memory": low_memory}
    out = linear_logprobs(torch.ones(4, 4, device=DEVICE), weight, labels, **own)
    assert out.is_top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("speculate", [True, False])
def test_second_derivatives_and_transforms_are_the_definitions(backend, speculate):
    params, labels = make_inputs(4, 3, 7)
    speculation = Speculation() if speculate else None

    def op(hidden, weight, bias):
        out = linear_logprobs(hidden, weight, labels, bias, temperature=2.0, softcap=3.0, speculation=speculation)
        return out.log_probs, out.entropy

    def second(params):
        grads = torch.autograd.grad(op(*params)[0].sum(), params, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), params)

    exact = as_dtype(params, torch.float64)
    assert torch.autograd.gradcheck(op, exact, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(op, exact)
    for grad, truth in zip(second(params), second(exact), strict=True):
        torch.testing.assert_close(grad, truth.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"labels": torch.tensor([1, 7, -100])}, "labels: got 7"),
        ({"hidden": torch.zeros(3, 4).half()}, "weight: got dtype torch.float32; must be hidden.dtype = torch.float16"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_arguments(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    arguments = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in (arguments | change).items()}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("speculate", "low_memory"), [(True, False), (False, False), (True, True)])
def test_real_widths_and_bit_equal_runs(speculate, low_memory):
    params, labels = make_inputs(1500, 512, 50257)
    params = [params[0], (params[1].detach() * 0.1).requires_grad_(), None]
    upstream = upstreams((1500,), "log_probs", constant=-1e-3)
    options = {"logits_budget_mib": 40, "low_memory": low_memory}
    options["speculation"] = Speculation() if speculate else None
    check(params, labels, torch.bfloat16, upstream, **options)
    params = as_dtype(params, torch.bfloat16)
    runs = [run(linear_logprobs, params, labels, upstream, **options) for _ in range(2)]
    for a, b in zip((*runs[0][0], *runs[0][1]), (*runs[1][0], *runs[1][1]), strict=True):
        assert torch.equal(a, b)
