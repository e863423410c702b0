"""What autograd can do besides one backward: torch.func's transforms, forward mode, and gradients of gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from liger_trainer.kernels import reference
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
from liger_trainer.kernels.runtime.autograd import differentiate
from liger_trainer.kernels.softmax import softmax
from liger_trainer.kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 6


def plain_gated_linear(gate, up, weight, bias):
    return F.linear(reference.swiglu(gate, up), weight, bias)


def rotation(op):
    cos, sin = torch.randn(2, 1, 3, WIDTH, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return lambda q, k: op(q, k, cos, sin)


def from_a_teacher(op):
    teacher = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return lambda logits: op(logits, teacher[: logits.shape[0]], kind="jsd", softcap=2.0, reduction="sum")


def labelled(op):
    """``op`` of its other arguments, with a label for each row of the first."""
    return lambda first, *others: op(first, *others, torch.zeros(first.shape[:-1], dtype=torch.int64, device=DEVICE))


def log_probs_and_entropy(op):
    return labelled(lambda *args: op(*args)[:2])


# op -> (ours, its definition, shapes of its arguments)
OPS = {
    "rms_norm": (rms_norm, reference.rms_norm, [(2, 3, WIDTH), (WIDTH,)]),
    "rms_norm without a weight": (rms_norm, reference.rms_norm, [(2, 3, WIDTH)]),
    "add_rms_norm": (add_rms_norm, reference.add_rms_norm, [(2, 3, WIDTH), (2, 3, WIDTH), (WIDTH,)]),
    "layer_norm": (layer_norm, reference.layer_norm, [(2, 3, WIDTH), (WIDTH,), (WIDTH,)]),
    "swiglu": (swiglu, reference.swiglu, [(2, 3, WIDTH), (2, 3, WIDTH)]),
    "swiglu, multiplied": (
        partial(swiglu, gate_multiplier=1.5, down_multiplier=0.5),
        partial(reference.swiglu, gate_multiplier=1.5, down_multiplier=0.5), [(2, 3, WIDTH), (2, 3, WIDTH)],
    ),
    "swiglu, packed": (swiglu, reference.swiglu, [(2, 3, WIDTH)]),
    "geglu": (geglu, reference.geglu, [(2, 3, WIDTH), (2, 3, WIDTH)]),
    "clamped_swiglu": (clamped_swiglu, reference.clamped_swiglu, [(2, 3, WIDTH)]),
    "softmax": (softmax, reference.softmax, [(2, 3, WIDTH)]),
    "divergence": (from_a_teacher(divergence), from_a_teacher(reference.divergence), [(2, 3, WIDTH)]),
    "gated_linear": (gated_linear, plain_gated_linear, [(2, 3, WIDTH), (2, 3, WIDTH), (5, WIDTH), (5,)]),
    "cross_entropy": (labelled(cross_entropy), labelled(reference.cross_entropy), [(2, 3, WIDTH)]),
    "linear_cross_entropy": (
        labelled(partial(linear_cross_entropy, reduction="none")),
        labelled(partial(reference.linear_cross_entropy, reduction="none")), [(2, 3, WIDTH), (5, WIDTH)],
    ),
    "linear_cross_entropy, reduced": (
        labelled(linear_cross_entropy), labelled(reference.linear_cross_entropy), [(2, 3, WIDTH), (5, WIDTH)],
    ),
    "linear_logprobs": (
        log_probs_and_entropy(linear_logprobs), log_probs_and_entropy(reference.linear_logprobs),
        [(2, 3, WIDTH), (5, WIDTH)],
    ),
    "rope": (rotation(rope), rotation(reference.rope), [(2, 4, 3, WIDTH), (2, 2, 3, WIDTH)]),
}  # fmt: skip


def scalar(op):
    """A number that depends on every output in a way whose second derivatives are not zero."""

    def loss(*args):
        outputs = op(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((i + 1) * out.pow(3).sum() for i, out in enumerate(outputs))

    return loss


def gradients(op, args):
    return torch.func.grad(scalar(op), argnums=tuple(range(len(args))))(*args)


def hessian_vector_product(op, args):
    return torch.func.jvp(lambda *args: gradients(op, args), args, tuple(a.cos() for a in args))


def per_sample_gradients(op, args):
    """Of the first argument's rows."""

    def loss(row):
        return scalar(op)(row[None], *(a[:1] if a.dim() > 2 else a for a in args[1:]))

    return torch.func.vmap(torch.func.grad(loss))(args[0])


def pushed_forward(op, args):
    return torch.func.jvp(scalar(op), args, tuple(a.cos() for a in args))


def duals(op, args):
    with forward_ad.dual_level():
        out = scalar(op)(*(forward_ad.make_dual(a, a.cos()) for a in args))
        return forward_ad.unpack_dual(out).tangent


def gradients_of_gradients(op, args):
    """By ``create_graph=True``; arguments that depend on each other must not be counted twice."""
    leaf = torch.linspace(0.5, 1.5, WIDTH, device=DEVICE, requires_grad=True)
    args = [a.detach() * leaf if a.shape[-1] == WIDTH else a.detach().requires_grad_() for a in args]
    inputs = [leaf, *(a for a in args if a.is_leaf)]
    first = torch.autograd.grad(scalar(op)(*args), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return *first, *second


def checkpointed_gradients_of_gradients(op, args):
    """Where saved tensors are hooked, some ops are made of two nodes."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return gradients_of_gradients(op, args)


@pytest.mark.parametrize(
    "use",
    [
        gradients, hessian_vector_product, per_sample_gradients, pushed_forward, duals, gradients_of_gradients,
        checkpointed_gradients_of_gradients,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", OPS)
def test_ops_can_be_differentiated_in_every_way(name, use):
    if name.endswith("reduced") and use in (gradients_of_gradients, checkpointed_gradients_of_gradients):
        return  # an error: see test_linear_cross_entropy.py
    ours, definition, shapes = OPS[name]
    random = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(shape, generator=random).to(DEVICE) for shape in shapes)
    expected = use(definition, tuple(a.double() for a in args)) if "rope" not in name else use(definition, args)
    actual = use(ours, args)
    assert not isinstance(expected, tuple) or len(actual) == len(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_is_trained_gets_gradients_of_gradients(trained):
    args = [
        torch.randn(shape, device=DEVICE, requires_grad=i == trained) for i, shape in enumerate(OPS["layer_norm"][2])
    ]
    results = []
    for op in (layer_norm, reference.layer_norm):
        (first,) = torch.autograd.grad(scalar(op)(*args), [args[trained]], create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), [args[trained]])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_an_output_without_upstream_gradient_counts_nothing():
    x, residual = (torch.randn(2, WIDTH, device=DEVICE, requires_grad=True) for _ in range(2))
    for pick in (0, 1):
        results = []
        for op in (add_rms_norm, reference.add_rms_norm):
            first = torch.autograd.grad(op(x, residual)[pick].pow(3).sum(), [x, residual], create_graph=True)
            results.append((*first, *torch.autograd.grad(sum(g.pow(3).sum() for g in first), [x, residual])))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert differentiate(reference.swiglu, (x, None), (None,)) == (None, None)
