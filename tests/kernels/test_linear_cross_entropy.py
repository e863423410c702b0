"""linear_cross_entropy against its definition, in one chunk and in several."""

import pytest
import torch
from linear_inputs import DEVICE, DTYPES, budget, make_inputs, run
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import reference
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_empty_logits
from liger_trainer.kernels.linear_loss import gradients, token_chunks, vocab_chunks

NAMES = ("hidden", "weight", "bias")


def check(params, labels, dtype, upstream=None, logits_budget_mib=512, low_memory=False, **options):
    same = as_dtype(params, dtype)
    exact = as_dtype(same, torch.float64)
    own = {"logits_budget_mib": logits_budget_mib, "low_memory": low_memory}
    ours = run(linear_cross_entropy, same, labels, upstream, **own, **options)
    theirs = run(reference.linear_cross_entropy, same, labels, upstream, **options)
    truth = run(reference.linear_cross_entropy, exact, labels, upstream, **options)
    assert_no_worse_than_torch(ours[0], theirs[0], truth[0], "loss")
    for name, *grads in zip(NAMES, ours[1], theirs[1], truth[1], strict=False):
        assert_no_worse_than_torch(*grads, name)
    for name, *stats in zip(("log_probs", "entropy"), ours[2], theirs[2], truth[2], strict=False):
        assert_no_worse_than_torch(*stats, name)
    if options.get("return_stats"):
        assert torch.equal(ours[2].is_top1, theirs[2].is_top1)
        assert not any(s.requires_grad for s in ours[2])


@pytest.mark.parametrize(
    ("chunk", "low_memory"), [(10, False), (1000, False), (20, True)], ids=["token chunks", "one", "vocabulary chunks"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("options", "use_bias", "ignored"),
    [
        ({"return_stats": True}, False, 0.3),
        ({"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "logit_scale": 0.5, "num_items": 50}, True, 0.0),
        ({"reduction": "none", "label_smoothing": 0.1, "return_stats": True, "softcap": 9.0}, True, 0.3),
        ({"reduction": "sum", "num_items": torch.tensor([50], device=DEVICE), "z_loss": 1e-2}, True, 0.05),
    ],
    ids=["mean", "all", "none", "sum"],
)
def test_matches_definition(backend, dtype, chunk, low_memory, options, use_bias, ignored):
    params, labels = make_inputs(ignored=ignored)
    options = {"low_memory": low_memory} | options
    upstream = torch.randn(labels.shape, device=DEVICE) if options.get("reduction") == "none" else None
    check(params if use_bias else [*params[:2], None], labels, dtype, upstream, budget(chunk, dtype), **options)


@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
@pytest.mark.parametrize(("reduction", "ignored"), [("mean", 0.05), ("none", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_token_weights(backend, reduction, ignored, dtype, low_memory):
    params, labels = make_inputs(ignored=ignored)
    options = {"token_weights": torch.rand(37, device=DEVICE), "reduction": reduction, "low_memory": low_memory}
    check(params, labels, dtype, None, budget(20, dtype), **options)


def test_batched_and_non_contiguous(backend):
    (hidden, weight, _), labels = make_inputs(tokens=40)
    hidden = hidden.detach().view(5, 8, 12).transpose(0, 1).requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    labels = labels.view(8, 5)
    upstream = torch.randn(8, 10, device=DEVICE)[:, ::2]
    check([hidden, weight, None], labels, torch.float32, upstream, reduction="none", return_stats=True)
    check([hidden, weight, None], labels, torch.bfloat16, low_memory=True)
    check([hidden, weight, None], labels, torch.bfloat16)


@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tokens", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_valid_label_gives_zero_and_zero_gradients(backend, tokens, reduction, dtype, low_memory):
    params, labels = make_inputs(tokens=tokens, ignored=2.0)
    params = as_dtype(params, dtype)
    options = {"reduction": reduction, "return_stats": True, "low_memory": low_memory}
    loss, grads, stats = run(linear_cross_entropy, params, labels, **options)
    for out, like in zip((loss, *grads, *stats), (loss, *params, *stats), strict=True):
        assert out.shape == like.shape
        assert out.dtype == like.dtype
        assert not out.any()
    assert stats.log_probs.shape == labels.shape


def record_gemms(monkeypatch):
    """Widths of the gradients that GEMMs write, in a list that grows."""
    widths = []
    for home in (token_chunks, vocab_chunks, gradients):
        for name in {"mm_into", "add_mm_into"} & set(vars(home)):
            original = getattr(home, name)
            monkeypatch.setattr(
                home, name, lambda out, a, b, original=original: widths.append(out.shape[1]) or original(out, a, b)
            )
    return widths


@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_frozen_parameters_get_no_work(backend, monkeypatch, trained, reduction, low_memory):
    params, labels = make_inputs()
    _, expected, _ = run(reference.linear_cross_entropy, params, labels, reduction=reduction)
    params = [p.detach().requires_grad_(i in trained) for i, p in enumerate(params)]
    widths = record_gemms(monkeypatch)
    loss = linear_cross_entropy(params[0], params[1], labels, params[2], reduction=reduction, low_memory=low_memory)
    loss.backward(torch.full_like(loss, 2.5))
    for i, (p, e) in enumerate(zip(params, expected, strict=True)):
        if i in trained:
            torch.testing.assert_close(p.grad, e)
        else:
            assert p.grad is None
    assert len(widths) == len({0, 1} & set(trained))


@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
def test_no_gradient_work_without_grad_mode(backend, monkeypatch, low_memory):
    params, labels = make_inputs()
    widths = record_gemms(monkeypatch)
    with torch.no_grad():
        loss = linear_cross_entropy(params[0], params[1], labels, params[2], low_memory=low_memory)
    assert not loss.requires_grad
    assert widths == []
    torch.testing.assert_close(loss, reference.linear_cross_entropy(params[0], params[1], labels, params[2]).detach())


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice(backend, dtype, options):
    params, labels = make_inputs()
    params = as_dtype(params, dtype)
    loss = linear_cross_entropy(params[0], params[1], labels, params[2], **options)
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, params, upstream, retain_graph=True)
    copies = [g.clone() for g in first]
    unit = torch.autograd.grad(loss, params, torch.ones_like(loss), retain_graph=True)
    last = torch.autograd.grad(loss, params, upstream)
    for a, copy, one, b in zip(first, copies, unit, last, strict=True):
        assert torch.equal(a, copy)
        assert torch.equal(a, b)
        torch.testing.assert_close(3 * one, a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, params, upstream)


def test_second_derivatives_of_a_reduced_loss_are_an_error():
    params, labels = make_inputs()
    loss = linear_cross_entropy(params[0], params[1], labels)
    grads = torch.autograd.grad(loss.square(), params[:2], create_graph=True, retain_graph=True)
    for grad, plain in zip(grads, torch.autograd.grad(loss.square(), params[:2]), strict=True):
        torch.testing.assert_close(grad.detach(), plain)
        with pytest.raises(RuntimeError, match=r"linear_cross_entropy: .* cannot be differentiated again.*fused_loss"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_precise_in_parts_as_in_one_gemm(monkeypatch, dtype, low_memory):
    params, labels = make_inputs(tokens=70)
    params = as_dtype(params, dtype)
    exact = run(reference.linear_cross_entropy, as_dtype(params, torch.float64), labels)[1]
    errors, gemms, widths = [], [], record_gemms(monkeypatch)
    for chunk in (20 if low_memory else 10, 1000):
        options = {"logits_budget_mib": budget(chunk, dtype), "low_memory": low_memory}
        grads = run(linear_cross_entropy, params, labels, **options)[1]
        errors.append([(g.double() - e).square().mean().sqrt() for g, e in zip(grads, exact, strict=True)])
        gemms.append(len(widths) - sum(gemms))
    assert gemms[0] > gemms[1]
    for parts, single in zip(*errors, strict=True):
        assert parts <= 1.1 * single


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("hidden_dtype", "low_memory"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)], ids=str
)
def test_autocast(backend, hidden_dtype, low_memory, reduction):
    params, labels = make_inputs(tokens=60)
    params[0] = params[0].detach().to(hidden_dtype).requires_grad_()
    exact = run(reference.linear_cross_entropy, as_dtype(params, torch.float64), labels, reduction=reduction)[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        own = {"logits_budget_mib": budget(20, torch.bfloat16), "low_memory": low_memory}
        ours = run(linear_cross_entropy, params, labels, reduction=reduction, **own)
        theirs = run(reference.linear_cross_entropy, params, labels, reduction=reduction)
    for name, *grads in zip(NAMES, ours[1], theirs[1], exact, strict=True):
        assert_no_worse_than_torch(*grads, name)
    rounded = ours[1][1].bfloat16().float()
    assert not torch.equal(ours[1][1], rounded), "the weight's fp32 gradient went through bf16"


@pytest.mark.parametrize("return_stats", [False, True])
def test_empty_logits_share_the_loss_node(return_stats):
    params, labels = make_inputs()
    expected = run(linear_cross_entropy, params, labels, torch.ones((), device=DEVICE))[1]
    loss, stats, logits = linear_cross_entropy_with_empty_logits(
        params[0], params[1], labels, params[2], return_stats=return_stats
    )
    assert (stats is not None) == return_stats
    assert logits.shape == (*labels.shape, 0)
    assert logits.grad_fn is loss.grad_fn
    for a, b in zip(torch.autograd.grad(loss + logits.sum(), params), expected, strict=True):
        assert torch.equal(a, b)


def test_empty_logits_under_autocast(backend):
    params, labels = make_inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, _, logits = linear_cross_entropy_with_empty_logits(params[0], params[1], labels)
    assert logits.dtype == torch.bfloat16
    assert logits.grad_fn is loss.grad_fn


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_transforms_are_the_definitions(without_triton, reduction):
    (hidden, weight, bias), labels = make_inputs(4, 3, 7)

    def op(hidden, weight, bias):
        options = {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5, "reduction": reduction}
        return linear_cross_entropy(hidden, weight, labels, bias, **options)

    params = as_dtype([hidden, weight, bias], torch.float64)
    assert torch.autograd.gradcheck(op, params, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(op, params)

    def second(params, autocast=False):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = op(*params).sum()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), params)

    for name, *grads in zip(NAMES, second([hidden, weight, bias]), second(params), strict=True):
        torch.testing.assert_close(grads[0], grads[1].float(), msg=name)
    for grad, exact in zip(second([hidden, weight, bias], autocast=True), second(params), strict=True):
        torch.testing.assert_close(grad, exact.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, ValueError, "hidden: got shape"),
        (
            {"hidden": torch.zeros(3, 4).bfloat16()},
            ValueError,
            "weight: got dtype torch.float32; must be hidden.dtype = torch.bfloat16",
        ),
        ({"weight": torch.zeros(4)}, ValueError, "weight: got shape"),
        ({"bias": torch.zeros(6)}, ValueError, "bias: got shape"),
        ({"bias": torch.zeros(7).half()}, ValueError, "bias: got dtype torch.float16"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, "labels: got shape"),
        ({"labels": torch.tensor([1, 7, -100])}, ValueError, "labels: got 7"),
        ({"labels": torch.tensor([1, -1, -100])}, ValueError, "labels: got -1"),
        ({"logits_budget_mib": 0}, ValueError, "logits_budget_mib: got 0"),
        ({"logits_budget_mib": "most"}, ValueError, "logits_budget_mib: got 'most'; must be greater than 0, or 'auto'"),
        ({"logits_budget": 1}, TypeError, "linear_cross_entropy: got an unexpected keyword argument 'logits_budget'"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_arguments(change, error, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    arguments = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in (arguments | change).items()}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [32000, 50257])
@pytest.mark.parametrize(
    "options",
    [{"return_stats": True}, {"reduction": "none"}, {"return_stats": True, "low_memory": True}],
    ids=["mean", "none", "vocabulary chunks"],
)
def test_real_widths_and_bit_equal_runs(vocab_size, options):
    params, labels = make_inputs(1500, 256, vocab_size)
    params = [params[0], (params[1].detach() * 0.1).requires_grad_(), None]
    check(params, labels, torch.bfloat16, None, 40, **options)
    params = as_dtype(params, torch.bfloat16)
    runs = [run(linear_cross_entropy, params, labels, logits_budget_mib=40, **options) for _ in range(2)]
    for a, b in zip((runs[0][0], *runs[0][1]), (runs[1][0], *runs[1][1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True], ids=["token chunks", "vocabulary chunks"])
def test_peak_memory(low_memory):
    hidden = torch.randn(8192, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(64000, 1024, device=DEVICE, dtype=torch.bfloat16) * 0.02).requires_grad_()
    labels = torch.randint(0, 64000, (8192,), device=DEVICE)
    labels[1023::1024] = -100
    options = {"logits_budget_mib": 64, "low_memory": low_memory}
    linear_cross_entropy(hidden, weight, labels, **options).backward()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, **options).backward()
    extra = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
    # an fp32 sum needs two bytes an element more than the bf16 gradient that comes of it
    sums_bytes = 4 * hidden.numel() if low_memory else 2 * weight.numel()
    assert extra <= sums_bytes + 72 * 2**20


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_in_a_chunk():
    tokens, vocab_size = 16800, 128256
    hidden = torch.randn(tokens, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab_size, 64, device=DEVICE, dtype=torch.bfloat16) * 0.1).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,), device=DEVICE)
    grads = [run(linear_cross_entropy, [hidden, weight, None], labels, logits_budget_mib=mib)[1] for mib in (8192, 256)]
    for whole, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(whole, chunked)
