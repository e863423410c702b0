"""The clamped SwiGLU of GPT-OSS against its definition, and the rule that finds it in experts."""

from types import SimpleNamespace

import pytest
import torch
from liger_trainer.kernels.clamped_swiglu import clamped_swiglu
from numerics import as_dtype, assert_no_worse_than_torch, random_rows
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model

from liger_trainer import LigerConfig, apply_liger
from liger_trainer.kernels import clamped_swiglu as module
from liger_trainer.kernels import reference
from liger_trainer.probing.rule import Skip
from liger_trainer.rules import glu

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
    with pytest.raises(ValueError, match=r"gate_up: shape is \(2, 3\); the last dimension must be even"):
        clamped_swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="limit: is 0; must be greater than 0"):
        clamped_swiglu(torch.zeros(2, 4), limit=0)
    with pytest.raises(TypeError, match="gate_up: dtype is"):
        clamped_swiglu(torch.zeros(2, 4).long())
    wide = make((3, 8)).double()
    assert torch.equal(clamped_swiglu(wide), reference.clamped_swiglu(wide))
    monkeypatch.setattr(module, "use_triton", lambda x: False)
    x = make((3, 8))
    assert torch.equal(clamped_swiglu(x), reference.clamped_swiglu(x))


def experts(gate, **numbers):
    """Experts as transformers has them, with ``gate`` and attributes of these names and values, in that order."""

    class Experts(torch.nn.Module):
        _apply_gate = gate

    module = Experts()
    for name, value in numbers.items():
        setattr(module, name, value)
    module.has_gate, module.config = True, SimpleNamespace(_experts_implementation="grouped_mm")
    return module


def clamped(self, x):
    return reference.clamped_swiglu(x, limit=self.limit, alpha=self.alpha)


def unclamped(self, x):
    gate, up = x.chunk(2, dim=-1)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize(
    ("gate", "numbers"),
    [
        (clamped, {"hidden_dim": 4096, "top_k": 7, "alpha": 1.702, "limit": 7.0}),
        (clamped, {"hidden_dim": 4096, "limit": 1e4, "alpha": 1.0}),
        (unclamped, {"hidden_dim": 4096, "alpha": 1.702}),
    ],
)
def test_the_limit_is_told_from_other_numbers(gate, numbers):
    module = experts(gate, **numbers)
    if gate is unclamped:
        with pytest.raises(Skip, match="neither"):
            glu.probe_experts(module, LigerConfig())
        return
    match = glu.probe_experts(module, LigerConfig())
    for change in ({}, {"limit": 2.0}, {"alpha": 0.5}):  # later changes are followed
        for name, value in change.items():
            setattr(module, name, value)
        x = torch.randn(5, 48) * 8000
        torch.testing.assert_close(match.methods["_apply_gate"](module, x), gate(module, x))


@pytest.mark.parametrize(
    ("model_type", "settings", "variant"),
    [
        ("gpt_oss", {"head_dim": 16}, "swiglu, clamped, packed, interleaved"),
        ("minimax_m3_vl_text", {"head_dim": 16}, "swiglu, clamped, packed"),
    ],
)  # fmt: skip
def test_experts_with_such_a_gate_are_patched(model_type, settings, variant):
    """At a limit that the activations of a tiny model reach."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.02}
    model, inputs = tiny_model(model_type, **sizes, **settings), batch()
    theirs = loss_and_gradients(model, inputs)
    report = apply_liger(model)
    assert variant in {applied.variant for applied in report.applied if applied.kind == "glu"}
    assert_same_training(theirs, loss_and_gradients(model, inputs))
