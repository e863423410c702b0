"""The clamped SwiGLU of GPT-OSS against its definition."""

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch, random_rows

from liger_trainer.kernels import clamped_swiglu as module
from liger_trainer.kernels import reference
from liger_trainer.kernels.clamped_swiglu import clamped_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(shape, layout="contiguous"):
    """Numbers of which a good part lies beyond a limit of 2."""
    torch.manual_seed(0)
    return random_rows(shape, layout, DEVICE).mul_(2).requires_grad_()


def run(function, x, **options):
    out = function(x, **options)
    torch.manual_seed(1)
    upstream = torch.randn(*out.shape[:-1], 2 * out.shape[-1], device=DEVICE, dtype=torch.float64)[..., ::2]
    return out, torch.autograd.grad(out, x, upstream.to(out.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 2), "contiguous"), ((2, 5, 14), "sliced"), ((3, 4, 40), "transposed"), ((7, 2310), "contiguous"),
     ((0, 8), "contiguous")],
)  # fmt: skip
def test_output_and_gradient(shape, layout, interleaved, dtype):
    (x,) = as_dtype([make(shape, layout)], dtype)
    x.data[..., :2] = 0.1  # at a limit that 16 bits do not hold
    before = x.detach().clone()
    for options in ({"limit": 2.0}, {"limit": 1.5, "alpha": 1.0, "offset": 0.0}, {"limit": 0.1}):
        options["interleaved"] = interleaved
        rounded = options | {"limit": float(torch.tensor(options["limit"], dtype=dtype))}
        exact = run(reference.clamped_swiglu, *as_dtype([x], torch.float64), **rounded)
        ours, same = run(clamped_swiglu, x, **options), run(reference.clamped_swiglu, x, **options)
        for name, *row in zip(("output", "gradient"), ours, same, exact, strict=True):
            assert_no_worse_than_torch(*row, name=name)
    assert torch.equal(x, before)


def test_at_and_beyond_the_limit_and_nan():
    x = torch.tensor(
        [[2.0, 2.0], [2.0, -2.0], [3.0, 3.0], [3.0, -9.0], [-3.0, 0.0], [float("nan"), 1.0], [1.0, float("nan")]]
    )
    x = x.to(DEVICE).requires_grad_()
    for a, b in zip(run(clamped_swiglu, x, limit=2.0), run(reference.clamped_swiglu, x, limit=2.0), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_wrong_arguments_and_where_it_is_the_definition(monkeypatch):
    with pytest.raises(ValueError, match=r"gate_up: got shape \(2, 3\); must be \[\.\.\., 2 \* I\]"):
        clamped_swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="limit: got 0; must be greater than 0"):
        clamped_swiglu(torch.zeros(2, 4), limit=0)
    with pytest.raises(TypeError, match="gate_up: got dtype"):
        clamped_swiglu(torch.zeros(2, 4).long())
    wide = make((3, 8)).double()
    assert torch.equal(clamped_swiglu(wide), reference.clamped_swiglu(wide))
    monkeypatch.setattr(module, "use_triton", lambda *_: False)
    x = make((3, 8))
    assert torch.equal(clamped_swiglu(x), reference.clamped_swiglu(x))
