"""The gated activation with its down projection as one op: numbers, gradients, and what it does not keep."""

import pytest
import torch
import torch.nn.functional as F
from numerics import as_dtype, assert_no_worse_than_torch
from torch.utils.checkpoint import checkpoint

from liger_trainer.kernels import gated_linear as gated_linear_module
from liger_trainer.kernels.gated_linear import ACTIVATIONS, gated_linear
from liger_trainer.kernels.shared.gated import DEFINITIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(packed=False, bias=True, frozen=(), tokens=(2, 7), width=36, out=20):
    torch.manual_seed(0)
    both = torch.randn(*tokens, 2 * width, device=DEVICE) * 2
    inputs = [both, None] if packed else [h.contiguous() for h in both.chunk(2, dim=-1)]
    inputs += [torch.randn(out, width, device=DEVICE) / 6, torch.randn(out, device=DEVICE) if bias else None]
    names = ("gate", "up", "weight", "bias")
    return [None if t is None else t.requires_grad_(n not in frozen) for n, t in zip(names, inputs, strict=True)]


def definition(gate, up, weight, bias, activation, **multipliers):
    return F.linear(DEFINITIONS[ACTIVATIONS[activation]](gate, up, **multipliers), weight, bias)


def run(function, inputs, activation, **multipliers):
    out = function(*inputs, activation=activation, **multipliers)
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    torch.manual_seed(1)
    grad = torch.randn(out.shape, device=DEVICE).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "case",
    [{}, {"packed": True}, {"bias": False}, {"frozen": ("weight", "bias")}, {"frozen": ("gate",)}, {"frozen": ("up",)},
     {"frozen": ("gate", "up")}, {"tokens": (0, 7)}],
    ids=["separate", "packed", "no bias", "frozen projection", "frozen gate", "frozen up", "frozen input", "no tokens"],
)  # fmt: skip
def test_outputs_and_gradients(case, activation, dtype):
    rounded = as_dtype(make(**case), dtype)
    exact = run(definition, as_dtype(rounded, torch.float64), activation)
    ours, same = run(gated_linear, rounded, activation), run(definition, rounded, activation)
    for number, row in enumerate(zip(ours, same, exact, strict=True)):
        assert_no_worse_than_torch(*row, name=f"result {number}")


@pytest.mark.parametrize(("packed", "activation"), [(False, "silu"), (True, "gelu_tanh"), (False, "gelu")])
def test_multipliers(packed, activation):
    multipliers = {"gate_multiplier": 1.7, "down_multiplier": -0.3}
    inputs = make(packed)
    exact = run(definition, as_dtype(inputs, torch.float64), activation, **multipliers)
    ours, same = (run(function, inputs, activation, **multipliers) for function in (gated_linear, definition))
    for number, row in enumerate(zip(ours, same, exact, strict=True)):
        assert_no_worse_than_torch(*row, name=f"result {number}")


@pytest.mark.parametrize(
    ("parts", "widths"),  # of the kernel's calls, the last part's twice
    [(4, [36, 36]), (4, [256, 88, 256, 256]), (4, [512, 6, 512, 512]), (2, [262, 768, 768])],
    ids=str,
)
def test_gradients_of_a_large_product_come_in_parts(parts, widths, monkeypatch):
    rounded = as_dtype(make(tokens=(3, 11), width=sum(widths[:-1])), torch.bfloat16)
    whole = run(gated_linear, rounded, "silu")
    monkeypatch.setattr(gated_linear_module, "PARTED_BYTES", 0)
    monkeypatch.setattr(gated_linear_module, "PARTS", parts)
    made, backward = [], gated_linear_module.gated_bwd
    monkeypatch.setattr(gated_linear_module, "gated_bwd", lambda dout, *rest: made.append(dout.shape[-1]) or
                        backward(dout, *rest))  # fmt: skip
    exact = run(definition, as_dtype(rounded, torch.float64), "silu")
    ours, same = run(gated_linear, rounded, "silu"), run(definition, rounded, "silu")
    for number, row in enumerate(zip(ours, same, exact, strict=True)):
        assert_no_worse_than_torch(*row, name=f"result {number}")
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], whole[:3], strict=True))  # element-wise
    assert made == widths


def test_product_is_not_kept():
    inputs = make(tokens=(4, 16), width=64, out=8)
    kept = {}
    for function in (gated_linear, definition):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.setdefault(t.data_ptr(), t) is None or t, lambda t: t
        ):
            function(*inputs, activation="silu")
        known = {t.data_ptr() for t in inputs}
        kept[function] = sum(t.numel() for pointer, t in sizes.items() if pointer not in known)
    assert kept[gated_linear] == 0
    assert kept[definition] >= 4 * 16 * 64


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", [{}, {"packed": True, "bias": False}, {"frozen": ("weight", "bias")}], ids=str)
def test_checkpointing_projects_once(case, autocast, monkeypatch):
    """The second forward, which only looks for saved tensors, stops before the GEMM; numbers stay the same."""
    inputs = make(**case)
    if autocast:
        inputs[:2] = [None if t is None else t.detach().bfloat16().requires_grad_() for t in inputs[:2]]
    computed = []
    compute = gated_linear_module._compute
    monkeypatch.setattr(gated_linear_module, "_compute", lambda *args: (computed.append(1), compute(*args)))

    def layer(*inputs, activation):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            return gated_linear(*inputs, activation=activation).sin()

    def plain_layer(*inputs, activation):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            return gated_linear(*inputs, activation=activation)

    def checkpointed(function):
        return lambda *inputs, activation: checkpoint(function, *inputs, activation=activation, use_reentrant=False)

    for function, calls in ((plain_layer, 1), (layer, 2)):  # the sine saves what comes out of the projection
        expected = run(function, inputs, "silu")
        computed.clear()
        actual = run(checkpointed(function), inputs, "silu")
        assert len(computed) == calls
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_autocast_and_backward_twice():
    gate, up, weight, bias = make()
    gate, up = gate.detach().bfloat16().requires_grad_(), up.detach().bfloat16().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = gated_linear(gate, up, weight, bias)
        expected = definition(gate, up, weight, bias, "silu")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2)  # the interpreter truncates to bf16
    first = torch.autograd.grad(out.float().square().sum(), [gate, weight], retain_graph=True)
    again = torch.autograd.grad(out.float().square().sum(), [gate, weight])
    assert first[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("parted_bytes", [0, 2**60])
@pytest.mark.parametrize("packed", [False, True])
def test_backward_under_autocast_keeps_its_dtype(packed, parted_bytes, monkeypatch):
    monkeypatch.setattr(gated_linear_module, "PARTED_BYTES", parted_bytes)
    inputs = make(packed=packed)
    trained = [t for t in inputs if t is not None]
    out = gated_linear(*inputs, activation="silu")
    expected = torch.autograd.grad(out.square().sum(), trained, retain_graph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = torch.autograd.grad(out.square().sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_wrong_arguments():
    gate, up, weight, bias = make()
    with pytest.raises(ValueError, match=r"weight: got \(20, 36\).*must be \[H, 18\]"):
        gated_linear(gate, None, weight, bias)
    with pytest.raises(ValueError, match="activation: got 'relu'; must be one of 'silu'"):
        gated_linear(gate, up, weight, bias, activation="relu")
    with pytest.raises(ValueError, match=r"weight, up: got dtypes torch\.float16, torch\.float32; must be gate\.dtype"):
        gated_linear(gate, up, weight.half(), bias)
