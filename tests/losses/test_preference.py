"""Preference losses against their papers' formulas, written out pair by pair, and their arguments."""

import math
from functools import partial

import pytest
import torch
from loss_inputs import assert_same, gradcheck, log_probs_of, make_batch, reference_of

from liger_trainer.losses import cpo_loss, dpo_loss, kto_loss, kto_reference_point, orpo_loss, simpo_loss
from liger_trainer.losses.dpo import F_DIVERGENCES, LOSS_TYPES, OF_AVERAGES, OF_DIFFERENCE, SMOOTHED

BETA, EPSILON = 0.3, 0.1


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def nls(x):
    return -torch.log(sigma(x))


def kl_of_two(p, q):
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


# log-ratios of the chosen (c) and rejected (r) sequence, and their lengths -> loss
PAIR_LOSSES = {
    "sigmoid": lambda c, r, *_: nls(BETA * (c - r)),
    "hinge": lambda c, r, *_: torch.clamp(1 - BETA * (c - r), min=0),
    "ipo": lambda c, r, nc, nr: (c / nc - r / nr - 1 / (2 * BETA)) ** 2,
    "robust": lambda c, r, *_: (
        ((1 - EPSILON) * nls(BETA * (c - r)) - EPSILON * nls(BETA * (r - c))) / (1 - 2 * EPSILON)
    ),
    "exo_pair": lambda c, r, *_: kl_of_two(sigma(BETA * (c - r)), torch.tensor(1 - EPSILON)),
    "nca_pair": lambda c, r, *_: nls(BETA * c) + (nls(-BETA * c) + nls(-BETA * r)) / 2,
    "bco_pair": lambda c, r, *_: nls(BETA * c) + nls(-BETA * r),
    "sppo_hard": lambda c, r, *_: (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda c, r, *_: 1 - sigma(BETA * c) + sigma(BETA * r),
    "apo_down": lambda c, r, *_: sigma(BETA * c) + 1 - sigma(BETA * (c - r)),
    "discopop": lambda c, r, *_: (
        (1 - sigma(BETA * (c - r) / 0.05)) * nls(BETA * (c - r))
        + sigma(BETA * (c - r) / 0.05) * torch.exp(-BETA * (c - r))
    ),
    "sigmoid_norm": lambda c, r, nc, nr: nls(BETA * (c / nc - r / nr)),
}


def smoothed(h):
    return (1 - EPSILON) * nls(h) + EPSILON * nls(-h)


def pairs_of(batch):
    """Log-ratios and lengths of each pair."""
    ratio = (log_probs_of(*batch.args) - reference_of(batch)).sum(1)
    length = batch.active.sum(1)
    return [(ratio[i], ratio[i + 2], length[i], length[i + 2]) for i in range(2)]


def expected_dpo(batch, loss_type, score=lambda r: r):
    policy, ref = log_probs_of(*batch.args).sum(1), reference_of(batch).sum(1)
    if loss_type == "sft":
        return -log_probs_of(*batch.args)[:2][batch.active[:2]].mean()
    if loss_type == "aot":
        ours, theirs = ((x[:2] - x[2:]).sort().values for x in (policy, ref))
        return smoothed(BETA * (ours - theirs)).mean()
    if loss_type == "aot_unpaired":
        chosen, rejected = (part.sort().values for part in (policy - ref).chunk(2))
        return smoothed(BETA * (chosen - rejected)).mean()
    losses = [PAIR_LOSSES[loss_type](score(c), score(r), nc, nr) for c, r, nc, nr in pairs_of(batch)]
    return sum(losses) / 2


def options_of(loss_type):
    return {"loss_type": loss_type, "beta": BETA, "label_smoothing": EPSILON if loss_type in SMOOTHED else 0.0}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dpo_is_the_papers(loss_type):
    batch = make_batch()
    assert_same(
        batch, dpo_loss(*batch.args, **batch.reference, **options_of(loss_type)), expected_dpo(batch, loss_type)
    )
    double = make_batch(torch.float64)
    gradcheck(partial(dpo_loss, **double.reference, **options_of(loss_type)), double)


SCORES = {
    "reverse_kl": lambda r: r,
    "forward_kl": lambda r: 1 - 1 / torch.exp(r),
    "js_divergence": lambda r: torch.log(2 * torch.exp(r) / (1 + torch.exp(r))),
    "alpha_divergence": lambda r: (torch.exp(r) ** (0.7 - 1) - 1) / (0.7 - 1),
}


@pytest.mark.parametrize("kind", F_DIVERGENCES)
@pytest.mark.parametrize("loss_type", [*OF_DIFFERENCE, *OF_AVERAGES])
def test_f_divergences(kind, loss_type):
    batch = make_batch(scale=0.5)
    loss = dpo_loss(
        *batch.args, **batch.reference, **options_of(loss_type), f_divergence_type=kind, f_alpha_divergence_coef=0.7
    )
    assert_same(batch, loss, expected_dpo(batch, loss_type, SCORES[kind]), rtol=2e-5)


def test_an_extreme_forward_kl_stays_finite():
    batch = make_batch()
    loss = dpo_loss(*batch.args, ref_log_probs=torch.full((4,), 300.0), f_divergence_type="forward_kl")
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, batch.params))


def test_several_losses_with_weights():
    batch = make_batch()
    loss = dpo_loss(*batch.args, **batch.reference, beta=BETA, loss_type=["sigmoid", "sft"], loss_weights=[0.5, 2.0])
    assert_same(batch, loss, 0.5 * expected_dpo(batch, "sigmoid") + 2 * expected_dpo(batch, "sft"))


def test_ld_alpha_weighs_the_longer_sequences_tail():
    batch, alpha = make_batch(), 0.25
    ratio = log_probs_of(*batch.args) - reference_of(batch)
    losses = []
    for i in range(2):
        pair = [ratio[row][batch.active[row]] for row in (i, i + 2)]
        shared = min(map(len, pair))
        chosen, rejected = (part[:shared].sum() + alpha * part[shared:].sum() for part in pair)
        losses.append(nls(BETA * (chosen - rejected)))
    assert_same(batch, dpo_loss(*batch.args, **batch.reference, beta=BETA, ld_alpha=alpha), sum(losses) / 2)


def wpo_weight(batch, row):
    """exp of the mean over tokens of log pi(y) - log sum_v pi(v)^2, eq. 2 of WPO."""
    p = torch.nn.functional.linear(*batch.params).softmax(-1)[row][batch.active[row]]
    chosen = p.gather(-1, batch.labels[row][batch.active[row]].unsqueeze(-1)).squeeze(-1)
    return torch.exp((chosen.log() - p.square().sum(-1).log()).mean()).detach()


def test_wpo_weighting():
    batch = make_batch()
    losses = [nls(BETA * (c - r)) for c, r, *_ in pairs_of(batch)]
    weights = [wpo_weight(batch, i) * wpo_weight(batch, i + 2) for i in range(2)]
    expected = sum(a * b for a, b in zip(losses, weights, strict=True)) / 2
    assert_same(batch, dpo_loss(*batch.args, **batch.reference, beta=BETA, use_weighting=True), expected)
    nll = -log_probs_of(*batch.args)[:2]
    expected = sum(weights[i] * nll[i].sum() for i in range(2)) / batch.active[:2].sum()
    assert_same(batch, dpo_loss(*batch.args, **batch.reference, loss_type="sft", use_weighting=True), expected)


@pytest.mark.triton
def test_dpo_on_the_kernels():
    batch = make_batch()
    loss = dpo_loss(*batch.args, **batch.reference, beta=BETA, logits_budget_mib=1e-4)
    assert_same(batch, loss, expected_dpo(batch, "sigmoid"))


def means_of(batch):
    return log_probs_of(*batch.args).sum(1) / batch.active.sum(1)


def expected_orpo(batch):
    m = means_of(batch)
    odds = torch.exp(m) / (1 - torch.exp(m))
    ratio = sum(nls(torch.log(odds[i] / odds[i + 2])) for i in range(2)) / 2
    return -log_probs_of(*batch.args)[:2][batch.active[:2]].mean() + BETA * ratio


def expected_simpo(batch):
    m = means_of(batch)
    return sum(smoothed(BETA * m[i] - BETA * m[i + 2] - 0.5) for i in range(2)) / 2


def expected_cpo(batch, loss_type):
    p, m = log_probs_of(*batch.args).sum(1), means_of(batch)
    nll = -log_probs_of(*batch.args)[:2][batch.active[:2]].mean()
    form = {
        "sigmoid": lambda i: smoothed(BETA * (p[i] - p[i + 2])),
        "hinge": lambda i: torch.clamp(1 - BETA * (p[i] - p[i + 2]), min=0),
        "ipo": lambda i: (m[i] - m[i + 2] - 1 / (2 * BETA)) ** 2,
    }[loss_type]
    return (form(0) + form(1)) / 2 + 0.5 * nll


REFERENCE_FREE = [
    (orpo_loss, {"beta": BETA}, expected_orpo),
    (simpo_loss, {"beta": BETA, "gamma": 0.5, "label_smoothing": EPSILON}, expected_simpo),
    *(
        (
            cpo_loss,
            {"beta": BETA, "nll_weight": 0.5, "loss_type": t, "label_smoothing": EPSILON if t == "sigmoid" else 0.0},
            partial(expected_cpo, loss_type=t),
        )
        for t in ("sigmoid", "hinge", "ipo")
    ),
]


@pytest.mark.parametrize(("loss", "options", "expected"), REFERENCE_FREE)
def test_reference_free_losses_are_the_papers(loss, options, expected):
    batch = make_batch()
    assert_same(batch, loss(*batch.args, **options), expected(batch))
    gradcheck(partial(loss, **options), make_batch(torch.float64))


@pytest.mark.parametrize("logit", [30.0, 0.0, -30.0])
def test_odds_of_certain_and_impossible_sequences_are_finite(logit):
    hidden = torch.ones(2, 1, 1, requires_grad=True)
    weight = torch.tensor([[logit], [0.0]], requires_grad=True)
    loss = orpo_loss(hidden, weight, torch.tensor([[0], [1]]))
    assert all(torch.isfinite(t).all() for t in (loss, *torch.autograd.grad(loss, (hidden, weight))))


def test_nll_of_prompt_and_completion():
    batch = make_batch()
    labels = batch.labels.clamp(min=0)
    loss = orpo_loss(batch.hidden, batch.weight, labels, batch.bias, mask=batch.active, nll_mask=labels >= 0, beta=BETA)
    m = means_of(batch)
    odds = torch.log(torch.exp(m) / (1 - torch.exp(m)))
    nll = -log_probs_of(batch.hidden, batch.weight, labels, batch.bias)[:2].mean()
    assert_same(batch, loss, nll + BETA * (nls(odds[0] - odds[2]) + nls(odds[1] - odds[3])) / 2)


DESIRABLE = torch.tensor([True, False, True, False])


def expected_kto(batch, loss_type, kl):
    ratio = (log_probs_of(*batch.args) - reference_of(batch)).sum(1)
    z = kl if loss_type == "kto" else 0.0
    value = [sigma(BETA * (r - z)) if good else sigma(BETA * (z - r)) for r, good in zip(ratio, DESIRABLE, strict=True)]
    return sum((1.5 if good else 0.5) * (1 - v) for v, good in zip(value, DESIRABLE, strict=True)) / 4


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_is_the_papers(loss_type):
    options = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.5, "loss_type": loss_type}
    options |= {"desirable": DESIRABLE} | ({"kl": torch.tensor([0.7])} if loss_type == "kto" else {})
    batch = make_batch()
    assert_same(batch, kto_loss(*batch.args, **batch.reference, **options), expected_kto(batch, loss_type, 0.7))
    double = make_batch(torch.float64)
    gradcheck(partial(kto_loss, **double.reference, **options), double)


def test_kto_reference_point():
    batch = make_batch()
    mean = (log_probs_of(*batch.args) - reference_of(batch)).sum(1).mean().detach()
    for sign in (1, -1):
        ref = reference_of(batch) if mean * sign > 0 else 2 * log_probs_of(*batch.args).detach() - reference_of(batch)
        point = kto_reference_point(*batch.args, ref_log_probs=ref)
        assert not point.requires_grad
        torch.testing.assert_close(point, (mean.abs() if sign > 0 else mean * 0))


LOSSES = [
    (dpo_loss, {}),
    (dpo_loss, {"loss_type": ("ipo", "sft")}),
    (dpo_loss, {"loss_type": "aot"}),
    (orpo_loss, {}),
    (simpo_loss, {}),
    (cpo_loss, {}),
    (kto_loss, {"kl": 0.1}),
]


def call(loss, batch, options, rows=(0, 1, 2, 3), labels=None, **more):
    """The loss of some of the batch's rows."""
    rows, labels = list(rows), batch.labels if labels is None else labels
    if loss in (dpo_loss, kto_loss):
        more |= batch.reference | {"ref_hidden": batch.reference["ref_hidden"][rows]}
    if loss is kto_loss:
        more["desirable"] = DESIRABLE[rows]
    return loss(batch.hidden[rows], batch.weight, labels[rows], batch.bias, **options, **more)


@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_masks_empty_batches_frozen_weights_and_dtypes(loss, options):
    batch = make_batch()
    keep = torch.ones_like(batch.labels)
    keep[:, 3:] = 0
    masked = call(loss, batch, options, mask=keep)
    assert_same(batch, masked, call(loss, batch, options, labels=batch.labels.where(keep != 0, -100)))

    empty = call(loss, batch, options, mask=torch.zeros_like(keep))
    assert empty == 0
    assert all((g == 0).all() for g in torch.autograd.grad(empty, batch.params))

    batch.weight.requires_grad_(False)
    call(loss, batch, options).backward()
    assert batch.weight.grad is None
    assert batch.hidden.grad.abs().sum() > 0

    half = make_batch(torch.bfloat16)
    out = call(loss, half, options)
    assert out.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(out, half.params)] == [torch.bfloat16] * 3


@pytest.mark.parametrize(("loss", "options"), [case for case in LOSSES if case[1].get("loss_type") != "aot"])
def test_micro_batches_add_up(loss, options):
    """With the divisors of the whole batch, the losses of its halves add up to its own."""
    batch = make_batch()
    divisors = {"num_items": torch.tensor(4 if loss is kto_loss else 2)}
    if loss in (orpo_loss, cpo_loss) or "sft" in options.get("loss_type", ()):
        divisors["num_nll_items"] = 6
    halves = [call(loss, batch, options, rows, **divisors) for rows in ((0, 2), (1, 3))]
    assert_same(batch, sum(halves), call(loss, batch, options))


@pytest.mark.parametrize(
    ("loss", "options"), [case for case in LOSSES[:-1] if "sft" not in case[1].get("loss_type", ())]
)
def test_a_pair_with_an_empty_side_does_not_count(loss, options):
    batch = make_batch()
    labels = batch.labels.clone()
    labels[[1, 3]] = -100
    options = options | ({"nll_weight": 0.0} if loss in (orpo_loss, cpo_loss) else {})
    whole = call(loss, batch, options, (0, 2))
    assert_same(batch, call(loss, batch, options, labels=labels), whole)
    labels[1] = batch.labels[1]
    assert_same(batch, call(loss, batch, options, labels=labels), whole)


def test_statistics_and_summed_reference():
    batch = make_batch()
    loss, stats = dpo_loss(*batch.args, ref_log_probs=reference_of(batch).sum(1), beta=BETA, return_stats=True)
    assert_same(batch, loss, expected_dpo(batch, "sigmoid"))
    ratio = (log_probs_of(*batch.args) - reference_of(batch)).sum(1)
    torch.testing.assert_close(torch.cat((stats.chosen_rewards, stats.rejected_rewards)), BETA * ratio.detach())
    p = torch.nn.functional.linear(*batch.params).softmax(-1)[batch.active]
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(-1).mean().detach())
    assert not any(t.requires_grad for t in stats)
    _, stats = kto_loss(*batch.args, ref_log_probs=reference_of(batch), desirable=DESIRABLE, kl=0.0, return_stats=True)
    torch.testing.assert_close(stats.rewards, 0.1 * ratio.detach())


REF = {"ref_log_probs": torch.zeros(4, 5)}
WRONG = [
    (dpo_loss, REF | {"loss_type": "kto"}, "loss_type: got 'kto'; must be one of 'sigmoid'"),
    (dpo_loss, REF | {"loss_type": []}, "loss_type: got ''"),
    (dpo_loss, REF | {"loss_type": ["ipo"], "loss_weights": [1, 2]}, "loss_weights: got 2 numbers; must be 1"),
    (dpo_loss, REF | {"beta": 0}, "beta: got 0; must be greater than 0"),
    (dpo_loss, REF | {"label_smoothing": 0.1}, "label_smoothing: got 0.1 with"),
    (dpo_loss, REF | {"label_smoothing": 0.5, "loss_type": "robust"}, "label_smoothing: got 0.5; must be in"),
    (dpo_loss, REF | {"loss_type": "exo_pair"}, "label_smoothing: got 0 with"),
    (dpo_loss, REF | {"f_divergence_type": "kl"}, "f_divergence_type: got 'kl'"),
    (dpo_loss, REF | {"f_divergence_type": "forward_kl", "loss_type": "aot"}, "must be 'reverse_kl'"),
    (dpo_loss, REF | {"ld_alpha": 1.5}, "ld_alpha: got 1.5"),
    (dpo_loss, REF | {"use_weighting": True, "loss_type": "aot"}, "use_weighting: got True"),
    (dpo_loss, REF | {"num_items": 0}, "num_items: got 0; must be greater than 0"),
    (dpo_loss, REF | {"num_nll_items": 3}, "num_nll_items: got 3; must be None"),
    (dpo_loss, REF | {"num_items": 3, "loss_type": "sft"}, "num_nll_items: got None; must be given"),
    (dpo_loss, REF | {"mask": torch.ones(4, 6)}, r"mask: got shape \(4, 6\); must be \(4, 5\)"),
    (dpo_loss, {"ref_log_probs": torch.zeros(2)}, "ref_log_probs: got shape"),
    (dpo_loss, {}, "reference: got nothing"),
    (dpo_loss, REF | {"ref_weight": torch.zeros(7, 2)}, "reference: got ref_weight, ref_log_probs"),
    (dpo_loss, {"ref_hidden": torch.zeros(4, 5, 2)}, "reference: got ref_hidden; must be"),
    (orpo_loss, {"beta": -1}, "beta: got -1"),
    (orpo_loss, {"num_items": 2}, "num_nll_items: got None"),
    (cpo_loss, {"loss_type": "simpo"}, "loss_type: got 'simpo'"),
    (cpo_loss, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing: got 0.1"),
    (cpo_loss, {"nll_weight": -1.0}, "nll_weight: got -1.0"),
    (cpo_loss, {"nll_weight": 0.0, "num_nll_items": 2}, "num_nll_items: got 2; must be None"),
    (simpo_loss, {"label_smoothing": 0.7}, "label_smoothing: got 0.7"),
    (kto_loss, REF | {"desirable": DESIRABLE}, "kl: got None"),
    (kto_loss, REF | {"desirable": DESIRABLE, "loss_type": "apo_zero_unpaired", "kl": 0.0}, "kl: got 0.0"),
    (kto_loss, REF | {"desirable": DESIRABLE, "kl": torch.zeros(2)}, "kl: got a tensor"),
    (kto_loss, REF | {"desirable": DESIRABLE[:2], "kl": 0.0}, "desirable: got shape"),
]


@pytest.mark.parametrize(("loss", "options", "message"), WRONG)
def test_wrong_arguments(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*make_batch().args, **options)


def test_wrong_shapes_and_unknown_options():
    batch = make_batch()
    with pytest.raises(ValueError, match="hidden: got shape"):
        simpo_loss(batch.hidden[0, :4], batch.weight, batch.labels[0, :4], batch.bias)
    with pytest.raises(ValueError, match="labels: got 3 sequences; must be an even number"):
        simpo_loss(batch.hidden[:3], batch.weight, batch.labels[:3], batch.bias)
    with pytest.raises(ValueError, match="labels: got shape"):
        simpo_loss(batch.hidden, batch.weight, batch.labels[:, :4], batch.bias)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        simpo_loss(*batch.args, gama=1.0)
    assert math.isfinite(simpo_loss(*batch.args, temperature=0.7, softcap=5.0, logit_scale=2.0).detach())


@pytest.mark.gpu
def test_no_logits_on_a_gpu():
    vocab, width = 128256, 64
    hidden, ref_hidden = (torch.randn(4, 512, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocab, (4, 512), device="cuda")
    hidden.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options = {"ref_hidden": ref_hidden, "ref_weight": weight.detach(), "logits_budget_mib": 64}
    dpo_loss(hidden, weight, labels, **options).backward()
    assert torch.cuda.max_memory_allocated() - before < labels.numel() * vocab * 2 / 2  # half of bf16 logits
