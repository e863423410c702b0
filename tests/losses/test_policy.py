"""grpo_loss against the formulas of its papers, token by token, and its arguments."""

import math
from functools import partial

import pytest
import torch
from loss_inputs import assert_same, gradcheck, log_probs_of, make_batch, reference_of

from liger_trainer.losses import grpo_loss
from liger_trainer.losses.grpo import KL_TYPES, LOSS_TYPES

ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -1.5])
LOW, HIGH = 0.2, 0.3


def old_log_probs(batch):
    """A policy that differs from the present one enough for some tokens to be clipped."""
    gen = torch.Generator().manual_seed(3)
    noise = 0.6 * torch.randn(batch.labels.shape, generator=gen)
    return (log_probs_of(*batch.args) + noise.to(batch.hidden.dtype)).detach()


def policy_loss(loss_type, log_pi, weight, advantage, whole, delta):
    """Loss of one token with importance weight ``weight``; ``whole`` is that of its sequence, not averaged."""
    if loss_type == "cispo":
        return -min(weight.detach(), torch.tensor(HIGH)) * advantage * log_pi
    if loss_type == "sapo":
        t = 1.0 if advantage > 0 else 1.05
        return -4 / t / (1 + torch.exp(-t * (weight - 1))) * advantage
    if loss_type == "vespo":
        k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        return -((whole**k) * torch.exp(rate * (1 - whole))).detach() * advantage * log_pi
    clipped = min(max(weight, torch.tensor(1 - LOW)), torch.tensor(1 + HIGH))
    capped = weight if delta is None else min(weight, torch.tensor(delta))
    return -min(capped * advantage, clipped * advantage)


def kl_estimate(kind, log_ref, log_pi):
    ratio = torch.exp(log_ref - log_pi)
    return {"k1": -torch.log(ratio), "k2": torch.log(ratio) ** 2 / 2, "k3": ratio - 1 - torch.log(ratio)}[kind]


def expected(batch, loss_type, level="token", delta=None, beta=0.0, kl_type="k3", corrected=True, sampling=None):
    log_pi, old, ref = log_probs_of(*batch.args), old_log_probs(batch), reference_of(batch)
    rows = []
    for i, advantage in enumerate(ADVANTAGES):
        tokens = batch.active[i].nonzero().flatten().tolist()
        log_ratio = torch.stack([log_pi[i, t] - old[i, t] for t in tokens])
        whole = torch.exp(log_ratio.sum())
        losses = []
        for n, t in enumerate(tokens):
            weight = torch.exp(log_ratio[n] if level == "token" else log_ratio.mean())
            loss = policy_loss(loss_type, log_pi[i, t], weight, advantage, whole, delta)
            loss = loss if sampling is None else loss * sampling[i, t]
            if beta:
                kl = kl_estimate(kl_type, ref[i, t], log_pi[i, t])
                loss = loss + beta * (kl * weight if corrected else kl)
            losses.append(loss)
        rows.append(torch.stack(losses))
    total = sum(r.sum() for r in rows)
    reduced = {"dr_grpo": total / (4 * 6), "luspo": total / 4}
    reduced |= dict.fromkeys(("grpo", "sapo"), sum(r.mean() for r in rows) / 4)
    return reduced.get(loss_type, total / batch.active.sum())


def options_of(loss_type, **more):
    high = {"epsilon_low": LOW, "epsilon_high": HIGH}
    length = {"max_completion_length": 6} if loss_type == "dr_grpo" else {}
    return {"advantages": ADVANTAGES, "loss_type": loss_type} | high | length | more


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types_are_the_papers(loss_type, level):
    batch, double = make_batch(), make_batch(torch.float64)
    if loss_type == "vespo" and level == "sequence":
        return  # an error, tested below
    options = options_of(loss_type, importance_sampling_level=level)
    loss = grpo_loss(*batch.args, old_log_probs=old_log_probs(batch), **options)
    assert_same(batch, loss, expected(batch, loss_type, level))
    if loss_type not in ("cispo", "vespo"):  # whose weights are constants to the gradient but not to the value
        gradcheck(partial(grpo_loss, old_log_probs=old_log_probs(double), **options), double)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("kl_type", KL_TYPES)
def test_kl(kl_type, corrected):
    kl = {"beta": 0.5, "kl_type": kl_type}
    batch, double = make_batch(scale=0.5), make_batch(torch.float64, scale=0.5)
    options = options_of("grpo", use_bias_correction_kl=corrected, **kl)
    loss = grpo_loss(*batch.args, old_log_probs=old_log_probs(batch), **batch.reference, **options)
    assert_same(batch, loss, expected(batch, "grpo", corrected=corrected, **kl))
    gradcheck(partial(grpo_loss, old_log_probs=old_log_probs(double), **double.reference, **options), double)


def test_delta_and_sampling_ratio():
    batch, sampling = make_batch(), 0.5 + torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    options = options_of("dapo", delta=1.5, sampling_ratio=sampling)
    old = old_log_probs(batch)
    assert ((log_probs_of(*batch.args) - old).exp() > 1.5).any()
    loss = grpo_loss(*batch.args, old_log_probs=old, **options)
    assert_same(batch, loss, expected(batch, "dapo", delta=1.5, sampling=sampling))


def test_clip_ratio_counts_the_tokens_that_delta_caps():
    batch = make_batch()
    old = old_log_probs(batch) - 0.4
    _, stats = grpo_loss(*batch.args, old_log_probs=old, **options_of("dapo", delta=1.5), return_stats=True)
    weight, advantage = (log_probs_of(*batch.args) - old).exp(), ADVANTAGES.unsqueeze(1).expand(4, 5)
    capped = (weight > 1.5) & (advantage < 0) & batch.active
    assert capped.any()
    clipped = capped | ((weight < 1 - LOW) & (advantage < 0)) | ((weight > 1 + HIGH) & (advantage > 0))
    torch.testing.assert_close(stats.clip_ratio, clipped[batch.active].float().mean())


@pytest.mark.parametrize("per_token", [True, False])
def test_vespo_takes_the_sampling_ratio_into_its_weight(per_token):
    batch, ratio = make_batch(), torch.tensor([[1.3], [0.8], [1.1], [0.7]])
    given = ratio.expand(4, 5) if per_token else ratio
    loss = grpo_loss(*batch.args, old_log_probs=old_log_probs(batch), sampling_ratio=given, **options_of("vespo"))
    # W with the ratio is W of an old policy whose log-probs are lower by the ratio's logarithm
    share = ratio.log() / (1 if per_token else batch.active.sum(1, keepdim=True))
    shifted = grpo_loss(*batch.args, old_log_probs=old_log_probs(batch) - share, **options_of("vespo"))
    assert_same(batch, loss, shifted)


def test_entropy_bonus_and_statistics():
    batch = make_batch(scale=0.7)
    p = torch.nn.functional.linear(*batch.params).softmax(-1)[batch.active]
    entropy = -(p * p.log()).sum(-1).mean()
    old = old_log_probs(batch)
    options = options_of("grpo", entropy_coef=0.3, beta=0.1)
    loss, stats = grpo_loss(*batch.args, old_log_probs=old, **batch.reference, **options, return_stats=True)
    assert_same(batch, loss, expected(batch, "grpo", beta=0.1) - 0.3 * entropy)
    torch.testing.assert_close(stats.entropy, entropy.detach())
    log_pi = log_probs_of(*batch.args).detach()
    torch.testing.assert_close(stats.log_probs, log_pi)
    weight, advantage = (log_pi - old).exp(), ADVANTAGES.unsqueeze(1).expand(4, 5)
    clipped = ((weight < 1 - LOW) & (advantage < 0)) | ((weight > 1 + HIGH) & (advantage > 0))
    torch.testing.assert_close(stats.clip_ratio, clipped[batch.active].float().mean())
    kl = kl_estimate("k3", reference_of(batch), log_pi) * weight
    torch.testing.assert_close(stats.kl, kl[batch.active].mean())


def test_the_first_step_needs_no_old_log_probs_and_advantages_may_be_per_token():
    batch = make_batch()
    present = grpo_loss(*batch.args, **options_of("dapo"))
    given = grpo_loss(*batch.args, old_log_probs=log_probs_of(*batch.args).detach(), **options_of("dapo"))
    assert_same(batch, present, given)
    spread = options_of("dapo") | {"advantages": ADVANTAGES.unsqueeze(1).expand(4, 5)}
    assert_same(batch, grpo_loss(*batch.args, **spread), present)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "bnpo"])
def test_micro_batches_add_up(loss_type):
    batch, old = make_batch(), old_log_probs(make_batch())
    by_token = loss_type in ("dapo", "cispo", "vespo")
    parts = []
    for rows in ([0, 1, 2], [3]):
        options = options_of(loss_type) | {"advantages": ADVANTAGES[rows]}
        count = batch.active.sum() if by_token else 4
        parts.append(
            grpo_loss(
                batch.hidden[rows], batch.weight, batch.labels[rows], batch.bias, old_log_probs=old[rows],
                num_items=count, entropy_coef=0.1 if by_token else 0.0, **options,
            )
        )  # fmt: skip
    coef = {"entropy_coef": 0.1 if by_token else 0.0}
    assert_same(batch, sum(parts), grpo_loss(*batch.args, old_log_probs=old, **options_of(loss_type), **coef))


def test_entropy_of_sequence_means_counts_each_micro_batch_by_its_sequences():
    batch = make_batch()
    options = options_of("grpo", entropy_coef=1.0) | {"advantages": torch.zeros(4)}
    whole = grpo_loss(*batch.args, **options)
    assert_same(batch, 2 * grpo_loss(*batch.args, **options, num_items=8), whole)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masks_empty_batches_and_dtypes(loss_type):
    batch = make_batch()
    keep = torch.ones_like(batch.labels)
    keep[:, 3:] = 0
    options = options_of(loss_type, entropy_coef=0.1, beta=0.1)
    masked = grpo_loss(*batch.args, mask=keep, **batch.reference, **options)
    labels = batch.labels.where(keep != 0, -100)
    cut = grpo_loss(batch.hidden, batch.weight, labels, batch.bias, **batch.reference, **options)
    assert_same(batch, masked, cut)
    empty = grpo_loss(*batch.args, mask=0 * keep, **batch.reference, **options)
    assert empty == 0
    assert all((g == 0).all() for g in torch.autograd.grad(empty, batch.params))
    unknown = torch.zeros(4, 5).masked_fill(~batch.active, math.nan)  # what is not a completion may hold anything
    assert torch.isfinite(grpo_loss(*batch.args, old_log_probs=unknown, ref_log_probs=unknown, **options))
    half = make_batch(torch.bfloat16)
    loss = grpo_loss(
        half.hidden, half.weight.detach(), half.labels, None, **half.reference | {"ref_bias": None}, **options
    )
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, half.hidden)[0].dtype == torch.bfloat16


WRONG = [
    ({"loss_type": "ppo"}, "loss_type: got 'ppo'"),
    ({"importance_sampling_level": "batch"}, "importance_sampling_level: got 'batch'"),
    ({"importance_sampling_level": "sequence", "loss_type": "vespo"}, "must be 'token'"),
    ({"kl_type": "k4"}, "kl_type: got 'k4'"),
    ({"epsilon_low": 1.5}, "epsilon_low: got 1.5"),
    ({"epsilon_high": -1.0}, "epsilon_high: got -1.0"),
    ({"loss_type": "cispo"}, "epsilon_high: got None"),
    ({"delta": 1.1}, "delta: got 1.1"),
    ({"delta": 2.0, "loss_type": "sapo"}, "delta: got 2.0"),
    ({"loss_type": "dr_grpo"}, "max_completion_length: got None"),
    ({"max_completion_length": 8}, "max_completion_length: got 8; must be None"),
    ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length: got 0"),
    ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos: got 0.0"),
    ({"beta": -0.1}, "beta: got -0.1"),
    ({"beta": 0.1}, "reference: got nothing"),
    ({"beta": 0.1, "ref_log_probs": torch.zeros(4)}, "ref_log_probs: got shape"),
    ({"ref_log_probs": torch.zeros(4, 5)}, "beta: got 0.0 with a reference"),
    ({"loss_type": "bnpo", "num_items": 3}, "num_items: got a divisor"),
    ({"num_items": -3}, "num_items: got -3"),
    ({"advantages": torch.zeros(3)}, "advantages: got shape"),
    ({"old_log_probs": torch.zeros(4)}, "old_log_probs: got shape"),
    ({"sampling_ratio": torch.ones(4)}, "sampling_ratio: got shape"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(*make_batch().args, **({"advantages": ADVANTAGES} | options))
