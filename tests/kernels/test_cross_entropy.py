"""cross_entropy against its definition: loss, gradients, options, layouts and errors."""

import subprocess
import sys

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import reference
from liger_trainer.kernels.cross_entropy import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_inputs(shape, ignored=0.3, scale=3.0):
    gen = torch.Generator().manual_seed(sum(shape))
    logits = (torch.randn(*shape, generator=gen) * scale).to(DEVICE).requires_grad_()
    labels = torch.randint(0, shape[-1], shape[:-1], generator=gen)
    labels[torch.rand(shape[:-1], generator=gen) < ignored] = -100
    return logits, labels.to(DEVICE)


def run(op, logits, labels, upstream=None, **options):
    loss = op(logits, labels, **options)
    upstream = torch.full_like(loss, 2.5) if upstream is None else upstream.to(loss.dtype)
    return loss, torch.autograd.grad(loss, logits, upstream)[0]


def check(logits, labels, dtype, upstream=None, **options):
    (same,) = as_dtype([logits], dtype)
    (exact,) = as_dtype([same], torch.float64)
    ours = run(cross_entropy, same, labels, upstream, **options)
    theirs = run(reference.cross_entropy, same, labels, upstream, **options)
    truth = run(reference.cross_entropy, exact, labels, upstream, **options)
    for name, *values in zip(("loss", "dlogits"), ours, theirs, truth, strict=True):
        assert_no_worse_than_torch(*values, name)
    with torch.no_grad():  # where nothing is kept for backward
        assert torch.equal(cross_entropy(same, labels, **options), ours[0])


# 101 is one masked block; 4613 is two unmasked ones and a ragged rest
@pytest.mark.parametrize("shape", [(3, 5, 101), (4, 4613), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "logit_scale": 0.5, "reduction": "sum"},
        {"label_smoothing": 0.2, "reduction": "none", "ignore_index": 0},
        {"num_items": 7, "softcap": 30.0},
    ],
    ids=["mean", "sum-all", "none", "num_items"],
)
def test_matches_definition(backend, shape, dtype, options):
    logits, labels = make_inputs(shape)
    if "ignore_index" in options:
        labels = labels.clamp(min=0)
    per_token = options.get("reduction") == "none"
    check(logits, labels, dtype, torch.randn(labels.shape, device=DEVICE) if per_token else None, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weights_and_device_num_items(backend, reduction):
    logits, labels = make_inputs((3, 6, 37))
    weights = torch.rand(3, 6, device=DEVICE).bfloat16()
    options = {"token_weights": weights, "reduction": reduction}
    check(logits, labels, torch.float32, **options)
    if reduction == "none":
        return
    check(logits, labels, torch.float32, num_items=11, **options)
    expected = run(cross_entropy, logits, labels, num_items=11, **options)
    for num_items in (torch.tensor(11), torch.tensor(11.0, device=DEVICE), torch.tensor([11], device=DEVICE)):
        for a, b in zip(run(cross_entropy, logits, labels, num_items=num_items, **options), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_small_logits_under_softcap(backend):
    """tanh near 0 must not cancel."""
    logits, labels = make_inputs((4, 64), scale=1e-3)
    check(logits, labels, torch.float32, softcap=30.0, reduction="none")


def test_layouts_and_untouched_input(backend):
    logits, labels = make_inputs((6, 50))
    wide = torch.randn(6, 64, device=DEVICE)
    strided = wide[:, :50].requires_grad_()
    transposed = logits.detach().t().contiguous().t().requires_grad_()
    expanded = torch.randn(1, 50, device=DEVICE).expand(6, 50).requires_grad_()
    for x in (strided, transposed, expanded):
        before = x.detach().clone()
        upstream = torch.randn(12, device=DEVICE)[::2]
        ours = run(cross_entropy, x, labels, upstream, reduction="none")
        theirs = run(reference.cross_entropy, x, labels, upstream, reduction="none")
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(x, before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 4])
def test_no_valid_label_gives_zero_and_zero_gradients(backend, rows, reduction):
    logits = torch.randn(rows, 33, device=DEVICE, requires_grad=True)
    labels = torch.full((rows,), -100, device=DEVICE)
    loss, grad = run(cross_entropy, logits, labels, reduction=reduction)
    assert loss.shape == (labels.shape if reduction == "none" else ())
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(logits))


def test_ignored_rows_are_not_read(backend):
    logits, labels = make_inputs((4, 40), ignored=0.0)
    labels[1] = -100
    with torch.no_grad():
        logits[1] = float("nan")
    loss, grad = run(cross_entropy, logits, labels)
    assert torch.isfinite(loss)
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_transforms_are_the_definitions(backend, reduction):
    logits, labels = make_inputs((5, 7))
    logits = logits.detach().double().requires_grad_()

    def op(logits):
        return cross_entropy(logits, labels, label_smoothing=0.1, softcap=3.0, logit_scale=0.5, reduction=reduction)

    assert torch.autograd.gradcheck(op, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(op, logits)
    (single,) = as_dtype([logits], torch.float32)
    (grad,) = torch.autograd.grad(op(single).sum(), single, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), single)
    (grad,) = torch.autograd.grad(op(logits).sum(), logits, create_graph=True)
    (exact,) = torch.autograd.grad(grad.square().sum(), logits)
    torch.testing.assert_close(second, exact.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 7, dtype=torch.int64)}, TypeError, "logits: got dtype"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "logits: got shape"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels: got shape \(4,\)"),
        ({"labels": torch.zeros(3)}, TypeError, "labels: got dtype"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss: got -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0"),
        ({"num_items": 0}, ValueError, "num_items: got 0"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items: got a tensor of shape"),
        ({"token_weights": torch.ones(2)}, ValueError, "token_weights: got shape"),
        (
            {"token_weights": torch.ones(3, requires_grad=True)},
            ValueError,
            "token_weights: got a tensor that requires grad",
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_arguments(backend, change, error, message):
    arguments = {"logits": torch.zeros(3, 7), "labels": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        cross_entropy(**arguments)


@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_label_out_of_range_on_cpu(label):
    with pytest.raises(ValueError, match=f"labels: got {label}"):
        cross_entropy(torch.zeros(3, 7), torch.tensor([1, label, -100]))


@pytest.mark.gpu
@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_label_out_of_range_on_a_device(label):
    """An assert there takes the process's device away, so each label has a process of its own."""
    code = f"""
import torch
from liger_trainer.kernels.cross_entropy import cross_entropy
logits, labels = torch.zeros(5000, 7, device="cuda"), torch.full((5000,), -100, device="cuda")
for labels[-1] in (6, {label}):
    print(cross_entropy(logits, labels))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("tensor")) == (1, 1)
    assert "a label is neither ignore_index nor in [0, V)" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab_size", [32000, 50257, 151936])
def test_real_vocabularies(vocab_size, dtype):
    logits, labels = make_inputs((512, vocab_size))
    check(logits, labels, dtype, label_smoothing=0.1, z_loss=1e-4)
    runs = [run(cross_entropy, logits.to(dtype), labels) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, vocab_size = 16800, 128256
    logits = torch.randn(rows, vocab_size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocab_size, (rows,), device=DEVICE)
    loss, grad = run(cross_entropy, logits, labels, reduction="none")
    tail = logits.detach()[-64:].requires_grad_()
    expected_loss, expected_grad = run(reference.cross_entropy, tail, labels[-64:], reduction="none")
    torch.testing.assert_close(loss[-64:], expected_loss)
    torch.testing.assert_close(grad[-64:], expected_grad)
