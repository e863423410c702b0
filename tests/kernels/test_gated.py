"""SwiGLU and GeGLU against their definitions: outputs and every gradient, for separate and packed inputs."""

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import geglu as geglu_module
from liger_trainer.kernels import reference
from liger_trainer.kernels import swiglu as swiglu_module
from liger_trainer.kernels.geglu import geglu
from liger_trainer.kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = {
    "swiglu": (swiglu, reference.swiglu, {}),
    "geglu-tanh": (geglu, reference.geglu, {"approximate": "tanh"}),
    "geglu-none": (geglu, reference.geglu, {"approximate": "none"}),
}
MODULES = {swiglu: swiglu_module, geglu: geglu_module}


def make(shape, layout="separate"):
    """The arguments of an op whose output has ``shape``; values reach far into both tails of the activation."""
    torch.manual_seed(0)
    packed = torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE) * 4
    if layout == "packed":
        return [packed.requires_grad_(), None]
    halves = packed.chunk(2, dim=-1)
    if layout == "separate":
        halves = [h.contiguous() for h in halves]
    elif layout == "transposed":
        halves = [h.transpose(0, -1).contiguous().transpose(0, -1) for h in halves]
    return [h.requires_grad_() for h in halves]


def run(function, arguments, grad=None, **options):
    out = function(*arguments, **options)
    if grad is None:
        torch.manual_seed(1)
        grad = torch.randn(*out.shape[:-1], 2 * out.shape[-1], device=DEVICE)[..., ::2].double()
    leaves = [t for t in arguments if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))], grad


def compare(variant, arguments, dtype):
    ours_fn, reference_fn, options = VARIANTS[variant]
    rounded = as_dtype(arguments, dtype)
    exact, grad = run(reference_fn, as_dtype(rounded, torch.float64), **options)
    before = [t if t is None else t.detach().clone() for t in rounded]
    ours, same = run(ours_fn, rounded, grad, **options)[0], run(reference_fn, rounded, grad, **options)[0]
    for name, *row in zip(("output", "gradient 0", "gradient 1"), ours, same, exact, strict=False):
        assert_no_worse_than_torch(*row, name=f"{variant} {name}")
    for t, old in zip(rounded, before, strict=True):
        assert t is None or torch.equal(t, old), "an argument was written to"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["separate", "packed", "sliced", "transposed"])
def test_outputs_and_gradients(variant, layout, dtype):
    compare(variant, make((3, 2, 17), layout), dtype)


@pytest.mark.parametrize("layout", ["separate", "packed", "sliced"])
@pytest.mark.parametrize("shape", [(2, 2500), (1, 1), (4100,), (0, 6), (3, 0, 6)], ids=str)
def test_shapes(shape, layout):
    compare("swiglu", make(shape, layout), torch.float32)


def test_each_gradient_alone():
    for frozen in (0, 1):
        arguments = make((5, 33))
        arguments[frozen].requires_grad_(False)
        for variant in VARIANTS:
            compare(variant, arguments, torch.float32)


@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_multipliers(layout, monkeypatch):
    options = {"gate_multiplier": 1.7, "down_multiplier": -0.3}
    monkeypatch.setitem(VARIANTS, "multiplied", (swiglu, reference.swiglu, options))
    compare("multiplied", make((2, 17), layout), torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_values(variant):
    """Where the exponential of either sign overflows, the result and the gradients are the limits."""
    ours_fn, reference_fn, options = VARIANTS[variant]
    gate = torch.tensor([-1e4, -200.0, -89.0, 0.0, 89.0, 200.0, 1e4], device=DEVICE, requires_grad=True)
    up = torch.ones_like(gate, requires_grad=True)
    ours, grad = run(ours_fn, (gate, up), **options)
    for a, b in zip(ours, run(reference_fn, (gate, up), grad, **options)[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-30)


def test_mixed_dtypes_promote():
    gate, up = make((3, 9))
    gate = as_dtype([gate], torch.bfloat16)[0]
    ours, grad = run(swiglu, (gate, up))
    for a, b in zip(ours, run(reference.swiglu, (gate, up), grad)[0], strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_without_triton_and_in_fp64_it_is_the_definition(variant, layout, monkeypatch):
    ours_fn, reference_fn, options = VARIANTS[variant]
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32:
            monkeypatch.setattr(MODULES[ours_fn], "use_triton", lambda *_: False)
        arguments = as_dtype(make((4, 10), layout), dtype)
        ours, grad = run(ours_fn, arguments, **options)
        assert all(map(torch.equal, ours, run(reference_fn, arguments, grad, **options)[0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_does_not_change_the_forward(variant):
    ours_fn, _, options = VARIANTS[variant]
    arguments = make((4, 10))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = ours_fn(*arguments, **options)
    assert torch.equal(cast, ours_fn(*arguments, **options))


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_bad_input_is_named(op):
    x = torch.randn(3, 7, device=DEVICE)
    with pytest.raises(TypeError, match=r"^gate: got dtype torch.int64"):
        op(x.long(), x)
    with pytest.raises(TypeError, match=r"^up: got dtype torch.int64"):
        op(x, x.long())
    with pytest.raises(ValueError, match=r"^up: got shape \(3, 6\); must be \(3, 7\)"):
        op(x, x[:, :6])
    with pytest.raises(ValueError, match=r"^gate: got shape \(3, 7\); must be \[\.\.\., 2 \* I\] without up"):
        op(x)
    with pytest.raises(ValueError, match=r"^gate: got shape \(3, 0\)"):
        op(x[:, :0])
    with pytest.raises(ValueError, match=r"^up: got device meta"):
        op(x, x.to("meta"))
    with pytest.raises(ValueError, match=r"^approximate: got 'erf'; must be"):
        geglu(x, x, approximate="erf")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_realistic_widths_and_equal_runs(variant, layout):
    ours_fn, _, options = VARIANTS[variant]
    arguments = make((777, 14336), layout)
    compare(variant, arguments, torch.bfloat16)
    assert all(map(torch.equal, run(ours_fn, arguments, **options)[0], run(ours_fn, arguments, **options)[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_more_than_2_to_31_elements(layout):
    rows, cols = 2**17 + 3, 16384
    width = cols * 2 if layout == "packed" else cols
    gate = torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    up = None if layout == "packed" else torch.ones_like(gate)
    out = swiglu(gate, up)
    out[-1].float().sum().backward()
    tail = gate.detach()[-1:].clone().requires_grad_()
    expected = reference.swiglu(tail, None if up is None else up[-1:])
    (expected_grad,) = torch.autograd.grad(expected.float().sum(), tail)
    assert torch.allclose(out[-1:].float(), expected.float(), rtol=2e-2, atol=2e-2)
    assert torch.allclose(gate.grad[-1:].float(), expected_grad.float(), rtol=3e-2, atol=3e-2)
    assert gate.grad[0].abs().max() == 0
