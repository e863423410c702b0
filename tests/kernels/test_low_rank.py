"""The narrow products of an adapter, as kernels and as torch's GEMMs."""

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels.shared.low_rank import narrow, tall, update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]  # tl.dot of bf16 needs a GPU


def make(rows, cols, rank):
    torch.manual_seed(0)
    return [torch.randn(s, device=DEVICE) for s in ((rows, cols), (rows, rank), (rank, cols))]


def results(x, u, w, columns):
    """All products; ``columns`` gives w as the transpose of a contiguous tensor, which B is."""
    w = w.t().contiguous().t() if columns else w
    out = torch.empty_like(x)
    update(x, u, w, 0.5, out)
    return narrow(x, w, -2.0), tall(u, x, 1.5), tall(u, x, 1.5, transposed=True), out


def definition(x, u, w, columns):
    return -2.0 * (x @ w.t()), 1.5 * (u.t() @ x), 1.5 * (x.t() @ u), x + 0.5 * (u @ w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["A", "B"])
@pytest.mark.parametrize(
    ("rows", "cols", "rank"),
    [(37, 200, 3), (131, 129, 16), (5, 48, 33), (70, 256, 8), (0, 16, 4), (9, 16, 300)],
    ids=str,
)
@pytest.mark.usefixtures("backend")
def test_products(rows, cols, rank, columns, dtype):
    rounded = as_dtype(make(rows, cols, rank), dtype)
    exact = definition(*as_dtype(rounded, torch.float64), columns)
    for number, row in enumerate(zip(results(*rounded, columns), definition(*rounded, columns), exact, strict=True)):
        assert_no_worse_than_torch(*row, name=f"result {number}")


@pytest.mark.usefixtures("backend")
def test_parts_of_wider_tensors_in_place():
    """Operands and results may be columns of wider tensors, and the sum may replace what is added to."""
    x, u, w = make(20, 96, 5)
    wide = torch.zeros(20, 9, device=DEVICE)
    narrow(x, w, out=wide[:, 2:7])
    torch.testing.assert_close(wide[:, 2:7], x @ w.t(), rtol=1e-4, atol=1e-4)
    assert not wide[:, :2].any()
    assert not wide[:, 7:].any()
    part = torch.randn(20, 128, device=DEVICE)[:, 16:112]
    expected = part + u @ w
    update(part, u, w, 1.0, part)
    torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tall(u, part, 1.0), u.t() @ expected, rtol=1e-4, atol=1e-4)


def test_update_casts_w():
    x, u, w = (t.bfloat16() if t.shape[0] == 40 else t for t in make(40, 64, 8))
    out = torch.empty_like(x)
    update(x, u, w, 1.0, out)
    torch.testing.assert_close(out.float(), x.float() + u.float() @ w, rtol=2e-2, atol=2e-1)
