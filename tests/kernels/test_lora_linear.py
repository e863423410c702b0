"""Linear layers with low-rank adapters: numbers, gradients, what is saved, and what checkpointing computes again."""

import contextlib

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch
from torch.utils.checkpoint import checkpoint

from liger_trainer.kernels import lora_linear as lora_module
from liger_trainer.kernels import reference
from liger_trainer.kernels.lora_linear import Projection, gated_lora_linear, lora_linear, lora_linears
from liger_trainer.kernels.shared.gated import ACTIVATIONS, DEFINITIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("a", "b", "weight", "bias", "base")


def make(outs=(20,), tokens=(2, 7), width=24, rank=3, frozen=("weight",), without=(), layout="contiguous"):
    """x, and for each projection its scale and tensors in the order of ``NAMES``."""
    torch.manual_seed(0)
    x = torch.randn(*tokens, width, device=DEVICE)
    if layout == "transposed":
        x = x.transpose(0, 1)
    projections = []
    for number, out in enumerate(outs):
        shapes = ((rank + number, width), (out, rank + number), (out, width), (out,), (*x.shape[:-1], out))
        tensors = [
            None if n in without else (torch.randn(s, device=DEVICE) / 3).requires_grad_(n not in frozen)
            for n, s in zip(NAMES, shapes, strict=True)
        ]
        projections.append((0.7 + number, *tensors))
    return x.requires_grad_("x" not in frozen), projections


def run(function, x, projections):
    outs = function(x, projections)
    leaves = [t for t in (x, *(t for _, *tensors in projections for t in tensors)) if t is not None and t.requires_grad]
    torch.manual_seed(1)
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.randn(o.shape, device=DEVICE).to(o.dtype) for o in outs])]


def ours(x, projections):
    return lora_linears(x, [Projection(a, b, s, weight, bias, base) for s, a, b, weight, bias, base in projections])


def definition(x, projections):
    return [reference.lora_linear(x, a, b, s, weight, bias, base) for s, a, b, weight, bias, base in projections]


def in_dtype(x, projections, dtype, adapters=None):
    [x] = as_dtype([x], dtype)
    rounded = []
    for s, a, b, *rest in projections:
        rounded.append((s, *as_dtype([a, b], adapters or dtype), *as_dtype(rest, dtype)))
    return x, rounded


CASES = {
    "one": {"without": ("base",)},
    "no bias": {"without": ("base", "bias")},
    "three": {"outs": (20, 9, 33), "without": ("base", "bias")},
    "base's output": {"outs": (20, 5), "without": ("weight",)},
    "base, no bias": {"without": ("weight", "bias")},
    "adapter alone": {"without": ("weight", "bias", "base")},
    "all trained": {"frozen": (), "without": ("base",)},
    "frozen adapter": {"frozen": ("weight", "bias", "a", "b"), "without": ("base",)},
    "frozen A": {"frozen": ("weight", "a"), "without": ("base",)},
    "frozen B and input": {"frozen": ("weight", "b", "x"), "without": ("base",)},
    "transposed": {"layout": "transposed", "without": ("base",)},
    "no tokens": {"tokens": (0, 7), "without": ("base",)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
    ids=["fp32", "bf16", "bf16, adapters fp32", "fp16"],
)
def test_outputs_and_gradients(case, dtype, adapters):
    inputs = in_dtype(*make(**case), dtype, adapters)
    exact = run(definition, *in_dtype(*inputs, torch.float64))
    for number, row in enumerate(zip(run(ours, *inputs), run(definition, *inputs), exact, strict=True)):
        assert_no_worse_than_torch(*row, name=f"result {number}")


@pytest.mark.parametrize("case", [CASES["three"], CASES["base's output"]], ids=["weights", "outputs"])
def test_two_nodes_give_the_same_bits(case):
    """With saved tensors hooked, as under checkpointing, the op saves in one node and computes in another."""
    inputs = in_dtype(*make(**case), torch.float32)
    whole = run(ours, *inputs)
    with kept_as_they_are():
        parted = run(ours, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(parted, whole, strict=True))


def test_checkpointing_computes_the_products_once(monkeypatch):
    calls, compute = [], lora_module._compute
    monkeypatch.setattr(lora_module, "_compute", lambda *args: calls.append(1) or compute(*args))
    x, projections = make(without=("base",))
    wanted = run(ours, x, projections)
    calls.clear()
    found = run(lambda x, p: checkpoint(ours, x, p, use_reentrant=False), x, projections)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_saved_for_backward():
    """The input, its narrow product and the weights; nothing of the size of an output."""
    kept = []
    x, projections = make(outs=(20, 31), without=("base", "bias"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ours(x, projections)
    assert sorted(kept) == sorted([(2, 7, 24), (14, 7), (20, 24), (3, 24), (20, 3), (31, 24), (4, 24), (31, 4)])


def test_autocast():
    """fp32 tensors under autocast: as torch's own layers, and backward inside or outside of it."""
    x, projections = make(without=("base",))
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = run(ours, x, projections)
        outs = ours(x, projections)
        theirs = run(lambda x, p: [
            torch.nn.functional.linear(x, w, c) + torch.nn.functional.linear(torch.nn.functional.linear(x, a), b) * s
            for s, a, b, w, c, _ in p
        ], x, projections)  # fmt: skip
    exact = run(definition, *in_dtype(x, projections, torch.float64))
    assert outs[0].dtype == torch.bfloat16
    x, projections = make(without=("weight",))
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(ours, x, projections)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close([f.float() for f in found], run(definition, x, projections), rtol=5e-2, atol=1e-1)
    for number, row in enumerate(zip(inside, theirs, exact, strict=True)):
        assert_no_worse_than_torch(row[0], row[1], row[2], name=f"result {number}", factor=2.5)


@pytest.mark.parametrize("hooked", [False, True], ids=["one node", "two nodes"])
@pytest.mark.parametrize("without", [("base",), ("weight",)], ids=["weights", "outputs"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_unused_results_give_no_gradients(without, hooked, create_graph):
    """None, as torch's own layers, not zeros: an optimizer would decay the weights."""
    x, projections = make(outs=(20, 9, 33), frozen=(), without=without)
    tensors = [x, *(t for _, *each in projections for t in each if t is not None)]
    results = []
    for function in (ours, definition):
        with kept_as_they_are(hooked):
            outs = function(x, projections)
        loss = outs[0].square().sum() + outs[2].sum()
        results.append(torch.autograd.grad(loss, tensors, allow_unused=True, create_graph=create_graph))
    for found, wanted in zip(*results, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert sum(found is None for found in results[0]) == 4


def test_weights_may_change_between_forward_and_backward_under_autocast():
    """What is saved of A and B are copies in autocast's dtype, as those of torch's own layers."""
    x, projections = make(without=("base",))
    with torch.autocast(DEVICE, torch.bfloat16):
        wanted = run(ours, x, projections)
        outs = ours(x, projections)
    [(_, a, b, _, bias, _)] = projections
    with torch.no_grad():
        a.add_(1.0)
        b.mul_(2.0)
    torch.manual_seed(1)
    found = torch.autograd.grad(outs, [x, a, b, bias], torch.randn(outs[0].shape, device=DEVICE).to(outs[0].dtype))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted[1:], strict=True))


def test_gradients_of_gradients():
    x, [(scale, a, b, weight, bias, _)] = make(without=("base",))
    leaves = [t.detach().double().requires_grad_() for t in (x, a, b, bias)]
    frozen = weight.detach().double()

    def op(x, a, b, bias):
        return lora_linear(x, a, b, scale, frozen, bias)

    assert torch.autograd.gradgradcheck(op, leaves)
    grads = torch.func.grad(lambda *args: op(*args).square().sum(), argnums=(0, 1, 2, 3))(*leaves)
    wanted = torch.autograd.grad(reference.lora_linear(*leaves[:3], scale, frozen, leaves[3]).square().sum(), leaves)
    for found, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_compiled():
    x, projections = make(outs=(20, 9), without=("base",))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for found, want in zip(run(compiled, x, projections), run(definition, x, projections), strict=True):
        torch.testing.assert_close(found, want)


def test_bad_input_is_an_error():
    x, [(_, a, b, weight, bias, base)] = make()
    for error, words, arguments in (
        (TypeError, "x: got dtype torch.int64", (x.long(), a, b)),
        (ValueError, "a, b: got shapes", (x, a.t(), b)),
        (ValueError, r"weight: got shape \(19, 24\)", (x, a, b, 1.0, weight[:19])),
        (ValueError, r"bias: got shape", (x, a, b, 1.0, weight, bias[:3])),
        (ValueError, "weight, base: got both", (x, a, b, 1.0, weight, None, base)),
        (ValueError, "weight: got dtype torch.float64", (x, a, b, 1.0, weight.double())),
        (ValueError, "base: got dtype torch.float64", (x, a, b, 1.0, None, None, base.double())),
        (ValueError, r"x: got shape \(\)", (x[0, 0, 0], a, b)),
        (ValueError, "a: got device meta", (x, a.to("meta"), b)),
    ):
        with pytest.raises(error, match=words):
            lora_linear(*arguments)
    with pytest.raises(ValueError, match="projections: got none"):
        lora_linears(x, [])


class Halves:
    """Stands for a quantised weight: its values are twice what it holds."""

    def __init__(self, weight):
        self.packed, self.shape, self.device, self.asked = weight.detach() / 2, weight.shape, weight.device, 0

    def to(self, dtype):
        self.asked += 1
        return (2 * self.packed).to(dtype)


def kept_as_they_are(hooked=True):
    """Saved tensors are hooked, which changes nothing in them."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if hooked else contextlib.nullcontext()


@pytest.mark.parametrize("hooked", [False, True], ids=["one node", "two nodes"])
def test_a_quantised_weight_is_dequantised_once_a_pass(hooked):
    x, projections = make(outs=(20, 9), without=("base",))
    wanted = run(ours, x, projections)
    stored = [(s, a, b, Halves(w), bias, None) for s, a, b, w, bias, _ in projections]

    def op(x, _):
        with kept_as_they_are(hooked):
            return ours(x, stored)

    for found, want in zip(run(op, x, projections), wanted, strict=True):
        torch.testing.assert_close(found, want)
    assert [each[3].asked for each in stored] == [2, 2]


GATED = {
    "separate": {}, "packed": {"packed": True}, "frozen gate": {"frozen": ("weight", "gate")},
    "frozen inputs": {"frozen": ("weight", "gate", "up")}, "B alone": {"frozen": ("weight", "gate", "up", "a", "bias")},
    "frozen adapter": {"frozen": ("weight", "a", "b")},
    "trained weight": {"frozen": ()}, "no tokens": {"tokens": (0, 7)},
}  # fmt: skip


def make_gated(packed=False, **options):
    x, [(_, *tensors)] = make(without=("base",), **options)
    frozen, shape = options.get("frozen", ()), (*x.shape[:-1], x.shape[-1] * (1 + packed))
    gate, up = (torch.randn(shape, device=DEVICE).requires_grad_(name not in frozen) for name in ("gate", "up"))
    return [gate, None if packed else up, *tensors[:4]]


def run_gated(function, inputs, activation):
    out = function(*inputs, activation)
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape, device=DEVICE).to(out.dtype))]


def our_gated(gate, up, a, b, weight, bias, activation):
    return gated_lora_linear(gate, up, Projection(a, b, -0.7, weight, bias), activation)


def gated_definition(gate, up, a, b, weight, bias, activation):
    return reference.lora_linear(DEFINITIONS[ACTIVATIONS[activation]](gate, up), a, b, -0.7, weight, bias)


@pytest.mark.parametrize("case", GATED.values(), ids=GATED)
@pytest.mark.parametrize(
    ("activation", "dtype", "hooked"),
    [("silu", torch.float32, False), ("silu", torch.bfloat16, True), ("gelu_tanh", torch.float16, False),
     ("gelu", torch.float32, True)], ids=str,
)  # fmt: skip
def test_gated_input(case, activation, dtype, hooked):
    rounded = as_dtype(make_gated(**case), dtype)
    exact = run_gated(gated_definition, as_dtype(rounded, torch.float64), activation)
    with kept_as_they_are(hooked):
        found = run_gated(our_gated, rounded, activation)
    for number, row in enumerate(zip(found, run_gated(gated_definition, rounded, activation), exact, strict=True)):
        assert_no_worse_than_torch(*row, name=f"result {number}")


def test_a_gated_input_is_not_saved(monkeypatch):
    kept, calls, compute = [], [], lora_module._compute
    monkeypatch.setattr(lora_module, "_compute", lambda *args: calls.append(1) or compute(*args))
    inputs = make_gated()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        our_gated(*inputs, "silu")
    wide = [t.data_ptr() for t in kept if t.shape == inputs[0].shape]
    assert wide == [t.data_ptr() for t in inputs[:2]]
    calls.clear()
    wanted = run_gated(our_gated, inputs, "silu")
    found = run_gated(lambda *args: checkpoint(our_gated, *args, use_reentrant=False), inputs, "silu")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(calls) == 2  # one for each of the two runs


def test_gated_bad_input_is_an_error():
    gate, up, a, b, *_ = make_gated()
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        gated_lora_linear(gate, up, Projection(a, b), "tanh")
    with pytest.raises(ValueError, match="a, b: got shapes"):
        gated_lora_linear(gate, up, Projection(a[:, :5], b))
