"""RMSNorm, residual-add RMSNorm and LayerNorm against their definitions: outputs and every gradient."""

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch, random_rows

from liger_trainer.kernels import add_rms_norm as add_rms_norm_module
from liger_trainer.kernels import layer_norm as layer_norm_module
from liger_trainer.kernels import reference
from liger_trainer.kernels import rms_norm as rms_norm_module
from liger_trainer.kernels.add_rms_norm import add_rms_norm
from liger_trainer.kernels.layer_norm import layer_norm
from liger_trainer.kernels.rms_norm import rms_norm
from liger_trainer.kernels.shared import norm, norm_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODULES = {"rms_norm": rms_norm_module, "add_rms_norm": add_rms_norm_module, "layer_norm": layer_norm_module}
OPS = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "layer_norm": layer_norm}
NUM_X = {"rms_norm": 1, "add_rms_norm": 2, "layer_norm": 1}  # arguments of x's shape; the rest are vectors
# Rows x columns: a handful, ragged tiles of several rows, several tiles a program, one row a tile, rows that take all
# registers, rows that leave none for the weights' sums, and no row at all.
SHAPES = [(3, 3), (2, 5, 7), (301, 64), (2, 9, 130), (5, 2048), (3, 12000), (9, 16401), (1, 770), (0, 16)]


def make(op, shape, affine=True, layout="contiguous"):
    torch.manual_seed(0)
    arguments = []
    for _ in range(NUM_X[op]):
        arguments.append(random_rows(shape, layout, DEVICE).mul_(2).add_(0.5))
    vectors = 2 if op == "layer_norm" else 1
    arguments += [torch.randn(shape[-1], device=DEVICE) + 1 if affine else None for _ in range(vectors)]
    return [t if t is None else t.requires_grad_() for t in arguments]


def run(function, arguments, grads=None, **options):
    """Outputs and gradients of all arguments; ``grads`` are fp64 upstream gradients, made if None."""
    out = function(*arguments, **options)
    outs = out if isinstance(out, tuple) else (out,)
    if grads is None:
        torch.manual_seed(1)
        grads = [torch.randn(*o.shape[:-1], 2 * o.shape[-1], device=DEVICE)[..., ::2].double() for o in outs]
    used = [(o, g.to(o.dtype)) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
    leaves = [t for t in arguments if torch.is_tensor(t) and t.requires_grad]
    return list(outs), list(torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used])), grads


def compare(op, arguments, dtype, weight_dtype=None, **options):
    """Our op against the definition in the same dtypes and in fp64, on the same (rounded) numbers."""
    count = NUM_X[op]
    # The interpreter cuts bf16 off where hardware rounds to nearest: twice the error of each rounding.
    factor = 4.0 if DEVICE == "cpu" and torch.bfloat16 in (dtype, weight_dtype) else 2.0
    rounded = as_dtype(arguments[:count], dtype) + as_dtype(arguments[count:], weight_dtype or dtype)
    exact_outs, exact_grads, grads = run(getattr(reference, op), as_dtype(rounded, torch.float64), **options)
    before = [t if t is None else t.detach().clone() for t in rounded]
    outs, ours, _ = run(OPS[op], rounded, grads, **options)
    torch_outs, torch_grads, _ = run(getattr(reference, op), rounded, grads, **options)
    with torch.no_grad():  # a kernel that keeps nothing for backward, which may round its last bit in another way
        alone = OPS[op](*rounded, **options)
    alone = alone if isinstance(alone, tuple) else (alone,)
    compared = {
        "output": (outs, torch_outs, exact_outs),
        "output without gradients": (alone, torch_outs, exact_outs),
        "gradient": (ours, torch_grads, exact_grads),
    }
    for name, rows in compared.items():
        for i, (a, b, c) in enumerate(zip(*rows, strict=True)):
            assert_no_worse_than_torch(a, b, c, f"{op} {name} {i}", factor)
    for t, old in zip(rounded, before, strict=True):
        assert t is None or torch.equal(t, old), "an argument was written to"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(op, shape, dtype):
    compare(op, make(op, shape), dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.parametrize("affine", [True, False])
def test_layouts_and_no_weights(op, layout, affine):
    compare(op, make(op, (3, 4, 40), affine, layout), torch.bfloat16, eps=1e-3)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_in_fp32", [False, True])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_rms_variants(op, weight_dtype, scale_in_fp32, weight_offset):
    arguments = make(op, (4, 9, 96))
    compare(op, arguments, torch.bfloat16, weight_dtype, scale_in_fp32=scale_in_fp32, weight_offset=weight_offset)


def test_rms_variants_round_like_the_definition():
    """Every normalised value is 1, so a rounding of weight + offset left out or put in would show as a whole step."""
    x = torch.full((2, 64), 3.0, dtype=torch.float16, device=DEVICE)
    weight = torch.linspace(-0.9, 0.9, 64, device=DEVICE).half()
    for options in ({"weight_offset": 1.0}, {"weight_offset": 1.0, "scale_in_fp32": True}):
        assert torch.equal(rms_norm(x, weight, 0.0, **options), reference.rms_norm(x, weight, 0.0, **options))


def test_layer_norm_with_mixed_dtypes_an_offset_and_bias_only():
    x, weight, bias = make("layer_norm", (6, 24))
    weight, bias = as_dtype([weight], torch.float32)[0], as_dtype([bias], torch.bfloat16)[0]
    x = as_dtype([x], torch.bfloat16)[0]
    for arguments, offset in (((x, weight, bias), 0.0), ((x, weight, bias), 1.0), ((x, None, bias), 0.0)):
        options = {"weight_offset": offset}
        exact, exact_grads, grads = run(reference.layer_norm, as_dtype(arguments, torch.float64), **options)
        ours, our_grads, _ = run(layer_norm, arguments, grads, **options)
        same, same_grads, _ = run(reference.layer_norm, arguments, grads, **options)
        for a, b, c in zip(ours + our_grads, same + same_grads, exact + exact_grads, strict=True):
            assert_no_worse_than_torch(a, b, c)


@pytest.mark.parametrize("op", OPS)
def test_frozen_weights_cost_nothing(op, monkeypatch):
    arguments = make(op, (33, 48))
    vectors = arguments[NUM_X[op] :]
    for v in vectors:
        v.requires_grad_(False)
    monkeypatch.setattr(norm, "sum_partials", None)  # a call fails
    compare(op, arguments, torch.float32)
    run(OPS[op], arguments)
    assert all(v.grad is None for v in vectors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(33, 48), (3, 16401)], ids=str)
def test_frozen_input(op, shape):
    arguments = make(op, shape)
    for x in arguments[: NUM_X[op]]:
        x.requires_grad_(False)
    compare(op, arguments, torch.float32)


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_with_one_output_used(used):
    arguments = make("add_rms_norm", (7, 20))
    ours = torch.autograd.grad(add_rms_norm(*arguments)[used].square().sum(), arguments, allow_unused=True)
    theirs = torch.autograd.grad(reference.add_rms_norm(*arguments)[used].square().sum(), arguments, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_add_rms_norm_gradients_of_leaves_are_apart():
    """x and residual share one gradient tensor inside backward; writing into one leaf's must not change the other's."""
    x, residual, weight = make("add_rms_norm", (4, 8))
    y, total = add_rms_norm(x, residual, weight)
    (y + total).sum().backward()
    kept = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, kept)
    assert kept.abs().sum() > 0


def test_add_rms_norm_promotes_a_wide_residual():
    x, residual, weight = make("add_rms_norm", (4, 8))
    x, weight = as_dtype([x, weight], torch.bfloat16)
    ours, our_grads, grads = run(add_rms_norm, (x, residual, weight))
    theirs, their_grads, _ = run(reference.add_rms_norm, (x, residual, weight), grads)
    for a, b in zip(ours + our_grads, theirs + their_grads, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", OPS)
def test_without_triton_it_is_the_definition(op, monkeypatch):
    monkeypatch.setattr(MODULES[op], "use_triton", lambda *_: False)
    arguments = make(op, (5, 12))
    ours, our_grads, grads = run(OPS[op], arguments)
    theirs, their_grads, _ = run(getattr(reference, op), arguments, grads)
    assert all(torch.equal(a, b) for a, b in zip(ours + our_grads, theirs + their_grads, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_fp64_is_computed_in_fp64(op):
    arguments = as_dtype(make(op, (5, 12)), torch.float64)
    ours, theirs = run(OPS[op], arguments), run(getattr(reference, op), arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True))


@pytest.mark.parametrize("op", OPS)
def test_autocast_does_not_change_the_forward(op):
    arguments = make(op, (5, 12))
    plain = run(OPS[op], arguments)[0]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = run(OPS[op], arguments)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.gpu
def test_layer_norm_gives_fp32_under_cuda_autocast():
    arguments = as_dtype(make("layer_norm", (5, 512)), torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours, our_grads, grads = run(layer_norm, arguments)
        theirs, their_grads, _ = run(reference.layer_norm, arguments, grads)
    for a, b in zip(ours + our_grads, theirs + their_grads, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", OPS)
def test_bad_input_is_named(op):
    x = torch.randn(3, 8, device=DEVICE)
    rest = [x] if op == "add_rms_norm" else []
    with pytest.raises(TypeError, match=r"^x: got dtype torch.int64"):
        OPS[op](x.long(), *rest)
    with pytest.raises(ValueError, match=r"^x: got shape \(3, 0\)"):
        OPS[op](x[:, :0], *rest)
    with pytest.raises(ValueError, match=r"^weight: got shape \(7,\); must be \(8,\)"):
        OPS[op](x, *rest, torch.randn(7, device=DEVICE))
    with pytest.raises(ValueError, match=r"^weight: got device meta"):
        OPS[op](x, *rest, torch.randn(8, device="meta"))
    with pytest.raises(ValueError, match=r"^x: got last dimension 65537"):
        OPS[op](x.new_zeros(1, 65537), *(x.new_zeros(1, 65537) for _ in rest))
    with pytest.raises(ValueError, match=r"^residual: got shape \(2, 8\)"):
        add_rms_norm(x, x[:2])
    with pytest.raises(ValueError, match=r"^bias: got shape \(3, 8\)"):
        layer_norm(x, None, x)


def test_sum_of_partials_spans_blocks():
    partials = torch.randn(2, 300, 37, device=DEVICE)
    out = norm_tiles.sum_partials(partials, torch.float32)
    assert torch.allclose(out, partials.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape", [(2048, 4096), (4096, 2880), (1024, 8192), (512, 16384), (64, 65536), (65536, 128)], ids=str
)
def test_realistic_widths_and_equal_runs(op, shape):
    arguments = make(op, shape)
    compare(op, arguments, torch.bfloat16)
    halves = as_dtype(arguments, torch.bfloat16)
    first, second = run(OPS[op], halves), run(OPS[op], halves)
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_more_than_2_to_31_elements(op):
    rows, cols = 2**18 + 3, 8192
    x = torch.randn(rows, cols, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    rest = [torch.ones_like(x)] if op == "add_rms_norm" else []
    weight = torch.randn(cols, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    out = OPS[op](x, *rest, weight)
    out = out[0] if rest else out
    out[-2:].sum().backward()
    tail = x.detach()[-2:].clone().requires_grad_()
    expected = getattr(reference, op)(tail, *(r[-2:] for r in rest), weight)
    expected = expected[0] if rest else expected
    (expected_dx,) = torch.autograd.grad(expected.sum(), tail)
    assert torch.allclose(out[-2:].float(), expected.float(), rtol=2e-2, atol=2e-2)
    assert torch.allclose(x.grad[-2:].float(), expected_dx.float(), rtol=5e-2, atol=5e-2)
    assert x.grad[:-2].abs().max() == 0
