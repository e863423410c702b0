"""Without Triton no op takes more memory than PyTorch does for the same: forward and backward, and forward alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from liger_trainer.kernels.add_rms_norm import add_rms_norm
from liger_trainer.kernels.clamped_swiglu import clamped_swiglu
from liger_trainer.kernels.cross_entropy import cross_entropy
from liger_trainer.kernels.divergence import divergence
from liger_trainer.kernels.gated_linear import gated_linear
from liger_trainer.kernels.geglu import geglu
from liger_trainer.kernels.layer_norm import layer_norm
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear_logprobs import linear_logprobs
from liger_trainer.kernels.rms_norm import rms_norm
from liger_trainer.kernels.rope import rope
from liger_trainer.kernels.softmax import softmax
from liger_trainer.kernels.swiglu import swiglu

SCALARS = 64  # bytes: numbers that take part in an operation are tensors to the profiler
PER_TOKEN = 64  # bytes: losses, normalisers and coefficients, beside a weight's gradient that outweighs the logits


def peak(function):
    """The most bytes that ``function`` held at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0
    return most


def plain_norm(x, weight):
    """A norm of transformers."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(variance + 1e-6)
    return weight * wide.to(x.dtype)


def plain_add_norm(x, residual, weight):
    total = x + residual
    return plain_norm(total, weight), total


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def plain_rope(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def plain_clamped(packed):
    gate, up = packed.chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def plain_divergence(student, teacher):
    student, teacher = F.log_softmax(student.float(), -1), F.log_softmax(teacher.detach().float(), -1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def plain_logprobs(hidden, weight, labels):
    return torch.log_softmax(F.linear(hidden, weight).float(), -1).gather(-1, labels[:, None]).squeeze(-1)


def plain_head(hidden, weight, labels, **options):
    """The loss of transformers, whose logits are fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, **options)


def of(*names):
    return lambda shape, draw: [draw(*(shape[size] for size in name.split())) for name in names]


def tables(shape, draw):
    rows, cols = shape["n"], shape["c"]
    q, k = draw(2, rows // 8, 4, cols // 4).transpose(1, 2), draw(2, rows // 8, 2, cols // 4).transpose(1, 2)
    return [q, k, *(draw(1, rows // 8, cols // 4).detach() for _ in "cs")]


def labelled(*names):
    def make(shape, draw):
        return [*of(*names)(shape, draw), torch.randint(shape["v"], (shape["n"],))]

    return make


OPS = {
    "rms_norm": (rms_norm, plain_norm, of("n c", "c")),
    "add_rms_norm": (add_rms_norm, plain_add_norm, of("n c", "n c", "c")),
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), of("n c", "c", "c")),
    "rope": (rope, plain_rope, tables),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, of("n c", "n c")),
    "geglu": (geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up, of("n c", "n c")),
    "clamped_swiglu": (clamped_swiglu, plain_clamped, of("n 2c")),
    "gated_linear": (gated_linear, lambda g, u, w: F.linear(F.silu(g) * u, w), of("n c", "n c", "c c")),
    "softmax": (softmax, lambda x: F.softmax(x, -1, dtype=torch.float32).to(x.dtype), of("n v")),
    "divergence": (divergence, plain_divergence, of("n v", "n v")),
    "cross_entropy": (cross_entropy, F.cross_entropy, labelled("n v")),
    "linear_cross_entropy": (linear_cross_entropy, plain_head, labelled("n c", "v c")),
    "linear_cross_entropy per token": (
        lambda *inputs: linear_cross_entropy(*inputs, reduction="none"),
        lambda *inputs: plain_head(*inputs, reduction="none"),
        labelled("n c", "v c"),
    ),
    "linear_logprobs": (lambda *inputs: linear_logprobs(*inputs)[0], plain_logprobs, labelled("n c", "v c")),
}
# The logits are larger than the head's weight, as large, and smaller.
SHAPES = [{"n": 1024, "c": 128, "v": 1000}, {"n": 256, "c": 256, "v": 2000}, {"n": 64, "c": 512, "v": 5003}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape.values())))
@pytest.mark.parametrize("op", OPS)
def test_no_more_than_pytorch(op, shape, dtype, without_triton):
    ours, plain, make = OPS[op]
    sizes = shape | {"2c": 2 * shape["c"]}
    inputs = make(sizes, lambda *size: torch.randn(*size, dtype=dtype, requires_grad=True))
    leaves = [t.detach().requires_grad_() if t.requires_grad else t for t in inputs]

    def train(function):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        for leaf in leaves:
            leaf.grad = None

    @torch.no_grad()
    def evaluate(function):
        return function(*leaves)

    slack = SCALARS + PER_TOKEN * sum(t.numel() for t in inputs if t.dtype == torch.int64)
    for run in (train, evaluate):
        run(ours)
        assert peak(lambda run=run: run(ours)) <= peak(lambda run=run: run(plain)) + slack, run.__name__
