"""distillation_loss against its definition on full logits, whole and from the teacher's top tokens on disk."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_inputs import VOCAB, assert_same, gradcheck, make_batch
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import reference
from liger_trainer.losses import chunked, distillation_loss
from liger_trainer.losses.divergences import DIVERGENCES

TINY_BUDGET = 3 * 16 * 40 / 2**20  # three of the twelve tokens


def teacher_of(batch):
    return {name.replace("ref_", "teacher_"): t for name, t in batch.reference.items()}


def definition(kind, p, q, beta=0.3):
    """Of two probability vectors, or of two vectors of logits for the cosine."""
    if kind == "cosine":
        return 1 - (p @ q) / (p.norm() * q.norm())
    kl = lambda a, b: (a * torch.log(a / b)).sum()  # noqa: E731
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
        "tvd": (p - q).abs().sum() / 2,
    }[kind]


def logits_of(batch, scale=1.0, softcap=None, teacher_scale=1.0, teacher_softcap=None):
    cap = lambda z, c: z if c is None else c * torch.tanh(z / c)  # noqa: E731
    wide = torch.promote_types(batch.hidden.dtype, torch.float32)
    student = cap(scale * F.linear(*batch.params).to(wide), softcap)
    ref = batch.reference
    teacher = F.linear(ref["ref_hidden"], ref["ref_weight"], ref["ref_bias"]).to(wide)
    return student, cap(teacher_scale * teacher, teacher_softcap)


def expected(batch, kind, temperature=1.0, soft_weight=1.0, hard_weight=0.0, **transforms):
    student, teacher = logits_of(batch, **transforms)
    nll = -student.log_softmax(-1)[batch.active].gather(-1, batch.labels[batch.active].unsqueeze(-1)).mean()
    rows = [(t[batch.active] / temperature) for t in (teacher, student)]
    if kind != "cosine":
        rows = [r.softmax(-1) for r in rows]
    soft = torch.stack([definition(kind, p, q) for p, q in zip(*rows, strict=True)]).mean()
    return soft_weight * soft + hard_weight * nll


@pytest.mark.parametrize("budget", [2048.0, TINY_BUDGET])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_are_the_definitions(kind, budget):
    batch, double = make_batch(), make_batch(torch.float64)
    options = {"divergence": kind, "beta": 0.3, "logits_budget_mib": budget}
    assert_same(batch, distillation_loss(*batch.args, **teacher_of(batch), **options), expected(batch, kind))
    gradcheck(partial(distillation_loss, **teacher_of(double), **options), double)


@pytest.mark.triton
def test_on_the_kernels():
    batch = make_batch()
    options = {"divergence": "jsd", "beta": 0.3, "hard_weight": 0.4, "logits_budget_mib": 8 * TINY_BUDGET / 10}
    loss = distillation_loss(*batch.args, **teacher_of(batch), **options)
    assert_same(batch, loss, expected(batch, "jsd", hard_weight=0.4))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_hard_labels_temperature_and_transforms(kind):
    batch = make_batch()
    transforms = {"softcap": 3.0, "teacher_softcap": 4.0}
    ours = {**transforms, "logit_scale": 1.5, "teacher_logit_scale": 0.5}
    terms = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4}
    args = {"divergence": kind, "beta": 0.3, "logits_budget_mib": TINY_BUDGET}
    loss, stats = distillation_loss(*batch.args, **teacher_of(batch), **args, **terms, **ours, return_stats=True)
    assert_same(batch, loss, expected(batch, kind, **terms, **transforms, scale=1.5, teacher_scale=0.5))
    torch.testing.assert_close(0.7 * stats.soft + 0.4 * stats.hard, loss.detach())
    double = make_batch(torch.float64)
    gradcheck(partial(distillation_loss, **teacher_of(double), **args, **terms, **ours), double)


def test_only_one_chunk_of_logits_exists(monkeypatch):
    sizes, original = [], chunked.Head.logits

    def logits(self, rows, dtype):
        sizes.append(self.hidden[rows].shape[0])
        return original(self, rows, dtype)

    monkeypatch.setattr(chunked.Head, "logits", logits)
    batch = make_batch()
    distillation_loss(*batch.args, **teacher_of(batch), logits_budget_mib=TINY_BUDGET).backward()
    assert sum(sizes) == 4 * batch.active.sum()  # two models, forward and backward
    assert max(sizes) == 3


def top_of(batch, count, temperature=1.0):
    """The teacher's ``count`` most probable tokens at each position."""
    top = (logits_of(batch)[1] / temperature).log_softmax(-1).topk(count)
    return {"teacher_log_probs": top.values, "teacher_token_ids": top.indices}


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
def test_top_tokens_and_the_rest(kind):
    batch, count, temperature = make_batch(), 3, 1.5
    top = top_of(batch, count, temperature)
    options = {"divergence": kind, "beta": 0.3, "temperature": temperature, "logits_budget_mib": TINY_BUDGET}
    student = (logits_of(batch)[0] / temperature).softmax(-1)
    losses = []
    for i, t in batch.active.nonzero().tolist():
        p, q = top["teacher_log_probs"][i, t].exp(), student[i, t][top["teacher_token_ids"][i, t]]
        p, q = (torch.cat((part, 1 - part.sum().reshape(1))) for part in (p, q))
        losses.append(definition(kind, p, q))
    assert_same(batch, distillation_loss(*batch.args, **top, **options), torch.stack(losses).mean(), rtol=2e-5)
    double = make_batch(torch.float64)
    gradcheck(partial(distillation_loss, **top_of(double, count, temperature), **options), double)


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
def test_positions_with_fewer_top_tokens(kind):
    batch = make_batch()
    top = top_of(batch, 2)
    padded = {
        "teacher_log_probs": F.pad(top["teacher_log_probs"], (0, 2), value=-float("inf")),
        "teacher_token_ids": F.pad(top["teacher_token_ids"], (0, 2), value=-1).int(),
    }
    loss, same = (distillation_loss(*batch.args, **t, divergence=kind) for t in (padded, top))
    assert_same(batch, loss, same)


def test_all_tokens_as_top_tokens_are_the_whole_distribution():
    batch = make_batch()
    top = distillation_loss(*batch.args, **top_of(batch, VOCAB), divergence="forward_kl")
    torch.testing.assert_close(top, distillation_loss(*batch.args, **teacher_of(batch)), atol=1e-5, rtol=1e-5)


def test_masks_empty_batches_and_micro_batches():
    batch = make_batch()
    loss = partial(distillation_loss, hard_weight=0.5)
    keep = torch.ones_like(batch.labels)
    keep[:, 3:] = 0
    cut = loss(batch.hidden, batch.weight, batch.labels.where(keep != 0, -100), batch.bias, **teacher_of(batch))
    assert_same(batch, loss(*batch.args, **teacher_of(batch), mask=keep), cut)
    empty = loss(*batch.args, **teacher_of(batch), mask=0 * keep)
    assert empty == 0
    assert all((g == 0).all() for g in torch.autograd.grad(empty, batch.params))
    halves = [
        loss(
            batch.hidden[rows], batch.weight, batch.labels[rows], batch.bias, num_items=batch.active.sum(),
            **teacher_of(batch) | {"teacher_hidden": batch.reference["ref_hidden"][rows]},
        )
        for rows in ([0, 1], [2, 3])
    ]  # fmt: skip
    assert_same(batch, sum(halves), loss(*batch.args, **teacher_of(batch)))


def test_frozen_parts_get_no_gradient():
    batch = make_batch()
    teacher = {name: t.requires_grad_() for name, t in teacher_of(batch).items()}
    loss = distillation_loss(batch.hidden.detach(), batch.weight, batch.labels, None, **teacher)
    loss.backward()
    assert batch.hidden.grad is None
    assert batch.weight.grad.abs().sum() > 0
    assert all(t.grad is None for t in teacher.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_is_no_worse_than_torch(kind, dtype):
    batch = make_batch(scale=0.5)
    results = []
    for ours, kind_dtype in ((True, dtype), (False, dtype), (False, torch.float64)):
        # all start from the same rounded numbers
        params, ref = (as_dtype(as_dtype(t, dtype), kind_dtype) for t in (batch.params, batch.reference.values()))
        case = batch._replace(
            hidden=params[0], weight=params[1], bias=params[2], reference=dict(zip(batch.reference, ref, strict=True))
        )
        if ours:
            options = {"divergence": kind, "beta": 0.3, "logits_budget_mib": TINY_BUDGET, "hard_weight": 0.5}
            loss = distillation_loss(*case.args, **teacher_of(case), **options)
            assert loss.dtype == torch.float32
        else:
            loss = expected(case, kind, hard_weight=0.5)
        results.append(torch.autograd.grad(loss, case.params))
    for got, same, exact in zip(*results, strict=True):
        assert got.dtype == dtype
        assert_no_worse_than_torch(got, same, exact)


def test_autocast_sets_the_dtype_of_the_products():
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(*batch.args, **teacher_of(batch))
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, batch.params)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    exact = torch.autograd.grad(expected(batch, "forward_kl"), batch.params)
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.05)


WRONG = [
    ({"divergence": "kl"}, "divergence: got 'kl'"),
    ({"beta": 1.0}, "beta: got 1.0"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"softcap": -1.0}, "softcap: got -1.0"),
    ({"logits_budget_mib": 0.0}, "logits_budget_mib: got 0.0"),
    ({"num_items": 0}, "num_items: got 0"),
    ({"teacher_hidden": None}, "teacher: got teacher_weight, teacher_bias; must be"),
    ({"teacher_token_ids": torch.zeros(4, 5, 2)}, "teacher: got teacher_hidden"),
    ({"teacher_weight": torch.zeros(VOCAB + 1, 2)}, "teacher_weight: got a vocabulary of 8; must be the student's, 7"),
    ({"teacher_hidden": torch.zeros(4, 5, 3)}, "hidden: got shape"),
    ({"mask": torch.ones(4)}, "mask: got shape"),
]
WRONG_TOP = [
    ({"divergence": "cosine"}, "divergence: got 'cosine' with teacher_log_probs"),
    ({"teacher_token_ids": None}, "teacher_token_ids: got None"),
    ({"teacher_token_ids": torch.zeros(4, 5, 3)}, "teacher_token_ids: got shape"),
    ({"teacher_token_ids": torch.full((4, 5, 2), VOCAB)}, "teacher_token_ids: got torch.int64 up to 7"),
    ({"teacher_log_probs": torch.zeros(4, 5)}, "teacher_log_probs: got shape"),
]


@pytest.mark.parametrize(("options", "message", "top"), [(*w, False) for w in WRONG] + [(*w, True) for w in WRONG_TOP])
def test_wrong_arguments(options, message, top):
    batch = make_batch()
    teacher = top_of(batch, 2) if top else teacher_of(batch)
    with pytest.raises(ValueError, match=message):
        distillation_loss(*batch.args, **teacher | options)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.DIVERGENCES)
def test_on_a_gpu_in_bf16_without_logits(kind):
    vocab, tokens = 128256, 2048
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, device="cuda", generator=generator) * scale).bfloat16()

    hidden, weight = draw(2, tokens // 2, 64).requires_grad_(), draw(vocab, 64, scale=0.2).requires_grad_()
    teacher = {"teacher_hidden": draw(2, tokens // 2, 128), "teacher_weight": draw(vocab, 128, scale=0.2)}
    labels = torch.randint(0, vocab, (2, tokens // 2), device="cuda", generator=generator)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = distillation_loss(hidden, weight, labels, **teacher, divergence=kind, hard_weight=0.5, logits_budget_mib=64)
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert torch.cuda.max_memory_allocated() - before < tokens * vocab * 2 / 2  # half of bf16 logits
    rows = slice(0, 8)  # whose gradients do not depend on the others
    x = hidden[0, rows].detach().double().requires_grad_()
    student = F.linear(x, weight.detach().double())
    target = F.linear(teacher["teacher_hidden"][0, rows].double(), teacher["teacher_weight"].double())
    exact = reference.divergence(student, target, kind=kind, reduction="sum")
    exact = exact + 0.5 * F.cross_entropy(student, labels[0, rows], reduction="sum")
    (exact_grad,) = torch.autograd.grad(exact / tokens, x)
    assert (grads[0][0, rows].double() - exact_grad).norm() < 0.02 * exact_grad.norm()
