"""softmax against torch's: output and gradient."""

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch, random_rows

from liger_trainer.kernels import reference
from liger_trainer.kernels import softmax as module
from liger_trainer.kernels.softmax import softmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(op, x, upstream):
    out = op(x)
    return out, torch.autograd.grad(out, x, upstream.to(out.dtype))[0]


def compare(x, dtype, scale=3.0):
    (x,) = as_dtype([(x * scale).requires_grad_()], dtype)
    (exact,) = as_dtype([x], torch.float64)
    upstream = random_rows((*x.shape[:-1], x.shape[-1]), "sliced", DEVICE).to(dtype)
    expected = run(lambda t: t.softmax(-1), exact, upstream)
    ours, theirs = (run(op, x, upstream) for op in (softmax, lambda t: t.softmax(-1)))
    for row in zip(ours, theirs, expected, strict=True):
        assert_no_worse_than_torch(*row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_outputs_and_gradients(layout, dtype):
    torch.manual_seed(0)
    compare(random_rows((2, 2, 17), layout, DEVICE), dtype)


@pytest.mark.parametrize("shape", [(1, 2500), (3, 1), (7,), (0, 4)], ids=str)
def test_shapes(shape):
    torch.manual_seed(0)
    compare(torch.randn(shape, device=DEVICE), torch.float32)


def test_masked_and_extreme_values():
    x = torch.tensor([[0.0, -float("inf"), 1.0], [1e30, 0.0, -1e30], [-3e38, -3e38, -float("inf")]], device=DEVICE)
    torch.testing.assert_close(softmax(x), x.softmax(-1))


def test_without_triton_and_in_fp64_it_is_the_definition(monkeypatch):
    x = torch.randn(3, 5, device=DEVICE)
    assert torch.equal(softmax(x.double()), x.double().softmax(-1))
    monkeypatch.setattr(module, "use_triton", lambda *_: False)
    assert torch.equal(softmax(x.bfloat16()), reference.softmax(x.bfloat16()))
    assert softmax(x.bfloat16()).dtype == torch.bfloat16


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"x: got dtype torch.int64"):
        softmax(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 0\)"):
        softmax(torch.zeros(2, 0))


@pytest.mark.gpu
def test_realistic_rows_and_equal_runs():
    x = torch.randn(700, 50001, device=DEVICE)
    compare(x, torch.bfloat16)
    assert torch.equal(softmax(x), softmax(x))
