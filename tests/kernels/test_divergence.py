"""divergence against its definition: outputs and gradients of every kind."""

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import divergence as module
from liger_trainer.kernels import reference
from liger_trainer.kernels.divergence import divergence
from liger_trainer.kernels.reference import DIVERGENCES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRANSFORMS = {
    "logit_scale": 1.5,
    "softcap": 4.0,
    "teacher_logit_scale": 0.7,
    "teacher_softcap": 5.0,
    "temperature": 2.0,
}


def make(shape=(2, 2, 37), layout="contiguous"):
    torch.manual_seed(0)
    student, teacher = (torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE) * 2 for _ in range(2))
    if layout == "contiguous":
        student, teacher = (t[..., : shape[-1]].contiguous() for t in (student, teacher))
    else:
        student, teacher = student[..., : shape[-1]], teacher[..., shape[-1] :]
    mask = torch.rand(shape[:-1], device=DEVICE) > 0.3
    return student.requires_grad_(), teacher, mask


def run(op, student, teacher, **options):
    loss = op(student, teacher, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=DEVICE).view(loss.shape).to(loss.dtype)
    return loss, torch.autograd.grad(loss, student, upstream)[0]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(
    ("layout", "options", "dtype"),
    [
        ("contiguous", {"reduction": "mean"}, torch.float32),
        ("contiguous", {"reduction": "mean"}, torch.float16),
        ("sliced", {"reduction": "none", **TRANSFORMS}, torch.float32),
        ("sliced", {"reduction": "sum", "num_items": torch.tensor(7), "softcap": 3.0}, torch.bfloat16),
    ],
    ids=["plain", "fp16", "all", "sum"],
)
def test_matches_definition(kind, layout, options, dtype):
    *tensors, mask = make(layout=layout)
    options = options | {"kind": kind, "beta": 0.3} | ({} if options["reduction"] == "mean" else {"mask": mask})
    same = as_dtype(tensors, dtype)
    exact = run(reference.divergence, *as_dtype(same, torch.float64), **options)
    ours, theirs = (run(op, *same, **options) for op in (divergence, reference.divergence))
    for name, *row in zip(("loss", "dlogits"), ours, theirs, exact, strict=True):
        assert_no_worse_than_torch(*row, name=f"{kind} {name}")


@pytest.mark.parametrize("shape", [(4, 1), (1, 2500), (0, 6), (9,)], ids=str)
def test_shapes(shape):
    student, teacher, _ = make(shape)
    for kind in DIVERGENCES:
        ours, theirs = (run(op, student, teacher, kind=kind) for op in (divergence, reference.divergence))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_all_masked_and_equal_and_far_apart(kind):
    student, teacher, mask = make()
    loss, grad = run(divergence, student, teacher, kind=kind, mask=torch.zeros_like(mask))
    assert loss == 0
    assert (grad == 0).all()
    loss, grad = run(divergence, student, student.detach(), kind=kind)
    assert loss.abs() < 1e-6
    assert grad.abs().max() < 1e-6
    far = [torch.tensor([[0.0, 200.0, -300.0]], device=DEVICE), torch.tensor([[200.0, 0.0, -300.0]], device=DEVICE)]
    far[0].requires_grad_()
    for a, b in zip(*(run(op, *far, kind=kind) for op in (divergence, reference.divergence)), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)


def test_the_teacher_is_constant_and_dtypes_may_differ():
    student, teacher, _ = make()
    teacher = teacher.bfloat16().requires_grad_()
    loss = divergence(student, teacher)
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(loss, reference.divergence(student, teacher))


def test_without_triton_and_in_fp64_it_is_the_definition(monkeypatch):
    student, teacher, mask = make()
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32:
            monkeypatch.setattr(module, "use_triton", lambda *_: False)
        tensors = as_dtype((student, teacher), dtype)
        ours, theirs = (run(op, *tensors, mask=mask, kind="jsd") for op in (divergence, reference.divergence))
        assert all(map(torch.equal, ours, theirs))
    double = as_dtype((student, teacher), torch.float64)
    for kind in DIVERGENCES:
        assert torch.autograd.gradcheck(
            lambda x, kind=kind: divergence(x, double[1], kind=kind), double[:1], fast_mode=True
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "kind: got 'kl'; must be one of"),
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"reduction": "batchmean"}, "reduction: got 'batchmean'"),
        ({"num_items": -1}, "num_items: got -1"),
        ({"mask": torch.ones(3)}, r"mask: got shape \(3,\)"),
        ({"teacher_logits": torch.zeros(2, 2, 36)}, r"teacher_logits: got shape \(2, 2, 36\)"),
    ],
)
def test_wrong_arguments(options, message):
    student, teacher, _ = make()
    with pytest.raises(ValueError, match=message):
        divergence(student, **{"teacher_logits": teacher, **options})
    with pytest.raises(TypeError, match=r"logits: got dtype torch.int64"):
        divergence(student.long(), teacher)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_realistic_vocabulary_and_equal_runs(kind):
    student, teacher, mask = make((700, 128256))
    same = as_dtype((student, teacher), torch.bfloat16)
    exact = run(reference.divergence, *as_dtype(same, torch.float64), kind=kind, mask=mask)
    ours, again, theirs = (
        run(op, *same, kind=kind, mask=mask) for op in (divergence, divergence, reference.divergence)
    )
    assert all(map(torch.equal, ours, again))
    for row in zip(ours, theirs, exact, strict=True):
        assert_no_worse_than_torch(*row, name=kind)
