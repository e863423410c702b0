"""torch.compile of every op of the benchmarks' table, and of a model made of ops: one graph, the numbers of eager."""

import importlib
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from variants import VARIANTS, Variant, calls

import liger_trainer.kernels
from benchmarks.cases import own_op
from benchmarks.ops import OPS
from liger_trainer.kernels import (
    add_rms_norm,
    clamped_swiglu,
    cross_entropy,
    gated_linear,
    geglu,
    layer_norm,
    rms_norm,
    rope,
    swiglu,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILES = pkgutil.iter_modules(liger_trainer.kernels.__path__, "liger_trainer.kernels.")
MODULES = [module for file in FILES if hasattr(module := importlib.import_module(file.name), "use_triton")]
WIDTH, HEAD, VOCAB = 32, 8, 19
OPAQUE = [name for name in OPS if name != "lora_linear"]  # that one is plain GEMMs, which the compiler may see


def make():
    torch.manual_seed(0)
    shapes = {"x": (2, 5, WIDTH), "norm": (WIDTH,), "bias": (WIDTH,), "up": (WIDTH, WIDTH), "head": (VOCAB, WIDTH)}
    tensors = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    tensors["tables"] = torch.randn(2, 1, 5, HEAD, device=DEVICE)
    labels = torch.randint(0, VOCAB, (2, 5), device=DEVICE)
    labels[0, 1] = -100
    return tensors, labels


def model(t, labels, num_items):
    x, (cos, sin) = t["x"], t["tables"]
    h, total = add_rms_norm.add_rms_norm(rms_norm.rms_norm(x, t["norm"]), x, t["norm"], scale_in_fp32=True)
    q = h.view(*h.shape[:2], -1, HEAD).transpose(1, 2)
    rotated, k = rope.rope(q, 2 * q[:, :1], cos, sin)
    h = (rotated + k + rope.rope(q, None, cos, sin)).transpose(1, 2).reshape(x.shape) + total
    h = layer_norm.layer_norm(h, t["norm"], t["bias"]) + layer_norm.layer_norm(h, None, t["bias"])
    h = swiglu.swiglu(h @ t["up"], h) + geglu.geglu(torch.cat((h, x), -1), approximate="none")
    h = h + gated_linear.gated_linear(h @ t["up"], x, t["up"], t["bias"])
    h = h + gated_linear.gated_linear(torch.cat((h, x), -1), None, t["up"], activation="gelu")
    h = h + clamped_swiglu.clamped_swiglu(torch.cat((h, x), -1), limit=2.0, interleaved=True)
    logits = h @ t["head"].T
    loss = cross_entropy.cross_entropy(logits, labels, num_items=num_items, softcap=30.0)
    return loss + cross_entropy.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1).square().mean()


def results(function, tensors, labels, num_items, trained):
    leaves = {n: t.detach().requires_grad_(n in trained) for n, t in tensors.items()}
    loss = function(leaves, labels, num_items)
    return loss.detach(), torch.autograd.grad(loss, [leaves[n] for n in trained])


def compare(backend, num_items, trained, **options):
    tensors, labels = make()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, **options)
    loss, grads = results(compiled, tensors, labels, num_items, trained)
    expected, expected_grads = results(model, tensors, labels, num_items, trained)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(trained, grads, expected_grads, strict=True):
        error, scale = (a - b).abs().max(), b.abs().max()
        assert error <= 1e-4 * scale, f"{name}: error {error:.1e} where the largest gradient is {scale:.1e}"


ALL = ("x", "norm", "bias", "up", "head")


@pytest.mark.parametrize("with_triton", [True, False])
@pytest.mark.parametrize(
    ("num_items", "trained"), [(None, ALL), (7, ("x",)), (torch.tensor(7), ("norm", "head"))], ids=str
)
def test_one_graph_and_the_numbers_of_eager(monkeypatch, with_triton, num_items, trained):
    if not with_triton:
        for module in MODULES:
            monkeypatch.setattr(module, "use_triton", lambda *_: False)
    compare("aot_eager", num_items, trained)


def test_sizes_may_vary():
    compare("aot_eager", None, ALL, dynamic=True)


def test_ops_are_opaque():
    """The compiler's graph holds one operator an op, and nothing from inside it."""
    seen = []

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    tensors, labels = make()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=backend)(tensors, labels, None)
    ours = [name.split(".")[1] for name in seen if name.startswith("liger_trainer.")]
    expected = ["norm", "norm", "rope", "rope", "norm", "norm", "gated", "gated"]
    expected += ["gated_linear", "gated_linear", "clamped_swiglu", "cross_entropy", "cross_entropy"]
    assert ours == expected


def operators():
    def r(*shape, grad=True):
        return torch.randn(*shape, device=DEVICE, requires_grad=grad)

    torch.manual_seed(0)
    x, w, b = r(3, 4, 16), r(16), r(16)
    strided = r(3, 5, 4, 16).transpose(1, 2)
    cos, sin = r(1, 5, 8, grad=False), r(1, 5, 8, grad=False)
    labels = torch.randint(0, 16, (12,), device=DEVICE)
    rows, weights = r(12, 16), r(12, grad=False)
    entropy = (1.0, 1.0, False, -100, 0.1, 0.0)
    yield "norm", (x, None, w, None, 1e-6, 0.0, False, False, torch.float32, True)
    yield "norm", (r(0, 16), None, None, None, 1e-6, 0.0, True, False, torch.float32, True)
    yield "norm_bwd", (r(12, 16), None, r(12, 16), w, r(1, 12), None, 0.0, False, False, True, False)
    yield "norm", (x, r(3, 4, 16), w, None, 1e-6, 1.0, True, False, torch.float32, True)
    yield "norm", (x, None, w, b, 1e-5, 1.0, True, True, torch.bfloat16, True)
    yield "norm_bwd", (x, None, r(3, 4, 16), w, r(2, 12), torch.float32, 0.0, True, True, True, True)
    yield "rope", (strided, None, cos, sin, 8, False, False, 1)
    yield "rope", (strided, r(3, 2, 5, 16), cos, sin, 8, True, False, 1)
    yield "rope", (strided, None, cos, sin, 16, True, True, 1)
    yield "rope_bwd", (None, strided, cos, sin, 8, True, False, 1)
    yield "gated", (x, r(3, 4, 16), 0, 1.0, 0.5)
    yield "clamped_swiglu", (x, 1.0, 1.7, 1.0, True)
    yield "clamped_swiglu_bwd", (r(3, 4, 8), x, 1.0, 1.7, 1.0, False)
    yield "gated_bwd", (r(3, 4, 8), x, None, 1, 2.0, 1.0, True, False)
    yield "gated_linear", (x, r(3, 4, 16), r(5, 16), r(5), 0, 2.0, 0.5)
    yield "gated_linear", (x, None, r(5, 8), None, 1, 1.0, 1.0)
    yield "gated_linear_bwd", (r(3, 4, 5), x, r(3, 4, 16), r(5, 16), 0, 1.0, 1.0, True, True, True, True)
    yield "gated_linear_bwd", (r(3, 4, 5), x, None, r(5, 8), 0, 1.0, 1.0, True, False, True, False)
    yield "gated_linear_bwd", (r(3, 4, 5), x, r(3, 4, 16), r(5, 16), 0, 1.0, 1.0, False, True, False, False)
    yield "gated_linear_bwd", (r(3, 4, 5), x, None, r(5, 8), 0, 1.0, 1.0, False, False, True, True)
    yield "cross_entropy", (rows, labels, weights, None, 3.0, *entropy, "sum")
    yield "cross_entropy", (rows, labels, None, None, None, *entropy, "none")
    yield "cross_entropy_bwd", (r(()), rows, labels, r(12), r(1), None, *entropy)


@pytest.mark.parametrize(("name", "arguments"), list(operators()), ids=lambda v: v if isinstance(v, str) else "")
def test_operators_keep_their_promises(name, arguments):
    """Schema (no writes, no shared memory) and what the compiler is told of shapes, dtypes and strides."""
    op = getattr(torch.ops.liger_trainer, name).default
    arguments = tuple(a.detach() if torch.is_tensor(a) and name.endswith("bwd") else a for a in arguments)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("name", OPAQUE)
def test_every_op_is_one_opaque_operator(name):
    case, _, _ = calls(name, Variant(), 5, 48, DEVICE)
    seen = []

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(own_op(name), fullgraph=True, backend=backend)(*case.tensors.values())
    eager = own_op(name)(*case.tensors.values())
    assert len([target for target in seen if target.startswith("liger_trainer.")]) == 1
    for a, b in zip(*((out if isinstance(out, tuple) else (out,)) for out in (compiled, eager)), strict=True):
        assert torch.equal(a, b)


class RecordedOperators(TorchDispatchMode):
    """Keeps every call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "liger_trainer":
            self.calls.append((func, [a.detach().clone() if torch.is_tensor(a) else a for a in args]))
        return func(*args, **(kwargs or {}))


def variants():
    return [(name, variant) for name in OPAQUE for variant in VARIANTS.get(name, (Variant(),))]


@pytest.mark.parametrize(("name", "variant"), variants(), ids=lambda v: v if isinstance(v, str) else v.note)
def test_every_op_calls_operators_that_keep_their_promises(name, variant, monkeypatch):
    """What a traced call runs, forward and backward, with the arguments that the op gives its operators."""
    case, ours, _ = calls(name, variant, 5, 48, DEVICE)
    with RecordedOperators() as recorded:
        with monkeypatch.context() as tracing:
            tracing.setattr(torch.compiler, "is_compiling", lambda: True)
            out = ours()
        outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
        forward = len(recorded.calls)
        torch.autograd.grad([t.float().square().sum() for t in outputs], case.leaf_tensors())
    assert 0 < forward < len(recorded.calls)
    for op, arguments in recorded.calls:
        torch.library.opcheck(op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    compare("inductor", torch.tensor(7), ALL, dynamic=dynamic)
