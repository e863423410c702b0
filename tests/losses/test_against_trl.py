"""The losses against those of TRL's trainers, which get the same per-token log-probabilities.

A trainer's loss function is called with a stand-in for the trainer that has the settings it reads.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from loss_inputs import assert_same, log_probs_of, make_batch, reference_of
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

from liger_trainer.kernels import reference
from liger_trainer.losses import cpo_loss, distillation_loss, dpo_loss, grpo_loss, kto_loss, orpo_loss, simpo_loss
from liger_trainer.losses.dpo import LOSS_TYPES, SMOOTHED
from liger_trainer.losses.grpo import LOSS_TYPES as POLICY_LOSS_TYPES

BETA = 0.3


def trainer(**settings):
    """Whatever the trainer reads besides ``settings`` is a mock: metrics, and the accelerator of a single process."""
    accelerator = MagicMock(device=torch.device("cpu"), num_processes=1)
    accelerator.gather_for_metrics = accelerator.gather = lambda x: x
    accelerator.reduce = lambda x, reduction: x
    return MagicMock(accelerator=accelerator, aux_loss_enabled=False, **settings)


def outputs_of(batch, hidden, weight, bias):
    """What a model with TRL's fused head returns; TRL's positions start at the token after the first."""
    return reference.linear_logprobs(hidden, weight, batch.labels, bias)


def trl_inputs(batch):
    """The completion mask and the token ids of sequences whose labels are ``batch.labels``."""
    ids = torch.cat((torch.zeros(4, 1, dtype=torch.long), batch.labels.clamp(min=0)), dim=1)
    mask = torch.cat((torch.zeros(4, 1, dtype=torch.long), batch.active.long()), dim=1)
    return {"input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids)}


def trl_dpo(batch, loss_type, **settings):
    options = {
        "loss_types": [loss_type], "loss_weights": [1.0], "beta": BETA, "label_smoothing": 0.1, "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False,
        "precompute_ref_logps": False, "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    }  # fmt: skip
    ref = batch.reference
    stand_in = trainer(**options | settings)
    stand_in.ref_model = lambda **_: outputs_of(batch, ref["ref_hidden"], ref["ref_weight"], ref["ref_bias"])
    policy = MagicMock(side_effect=lambda **_: outputs_of(batch, *batch.params))
    return DPOTrainer._compute_loss(stand_in, policy, trl_inputs(batch), return_outputs=False)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dpo(loss_type):
    batch = make_batch()
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    loss = dpo_loss(*batch.args, **batch.reference, beta=BETA, loss_type=loss_type, label_smoothing=smoothing)
    assert_same(batch, loss, trl_dpo(batch, loss_type))


@pytest.mark.parametrize(
    "settings",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"ld_alpha": 0.25},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_dpo_variants(settings):
    batch = make_batch(scale=0.7)
    for loss_type in ("sigmoid", "ipo"):
        ours = dpo_loss(*batch.args, **batch.reference, beta=BETA, loss_type=loss_type, **settings)
        assert_same(batch, ours, trl_dpo(batch, loss_type, **settings))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type):
    batch, kl_pair = make_batch(), (torch.tensor([0.4, 1.2]), torch.tensor([0.1, 0.2]))
    good = torch.tensor([True, False, False, True])
    stand_in = trainer(
        beta=BETA, desirable_weight=1.5, undesirable_weight=0.5, loss_type=loss_type, calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
    )  # fmt: skip
    stand_in._compute_kl_logps = lambda *_: kl_pair[0]
    inputs = trl_inputs(batch) | {"label": good, "ref_logps": reference_of(batch).sum(1), "ref_KL_logps": kl_pair[1]}
    policy = MagicMock(side_effect=lambda **_: outputs_of(batch, *batch.params))
    theirs = KTOTrainer._compute_loss(stand_in, policy, inputs, return_outputs=False)
    kl = {"kl": (kl_pair[0] - kl_pair[1]).mean()} if loss_type == "kto" else {}
    ours = kto_loss(
        *batch.args, **batch.reference, desirable=good, beta=BETA, loss_type=loss_type, desirable_weight=1.5,
        undesirable_weight=0.5, **kl,
    )  # fmt: skip
    assert_same(batch, ours, theirs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_and_simpo(loss_type):
    batch = make_batch()
    smoothing = 0.1 if loss_type in ("sigmoid", "simpo") else 0.0
    stand_in = trainer(alpha=0.0, loss_type=loss_type, beta=BETA, simpo_gamma=0.5, label_smoothing=smoothing)
    log_probs = log_probs_of(*batch.args)
    sums = log_probs.sum(1) / (batch.active.sum(1) if loss_type in ("ipo", "simpo") else 1)
    theirs = CPOTrainer.cpo_loss(stand_in, sums[:2], sums[2:])[0].mean()
    if loss_type == "simpo":
        ours = simpo_loss(*batch.args, beta=BETA, gamma=0.5, label_smoothing=smoothing)
    else:
        theirs = theirs - 0.5 * log_probs[:2].sum() / batch.active[:2].sum()
        ours = cpo_loss(*batch.args, beta=BETA, loss_type=loss_type, label_smoothing=smoothing, nll_weight=0.5)
    assert_same(batch, ours, theirs)


def test_orpo():
    batch = make_batch()
    log_probs = log_probs_of(*batch.args)
    means = log_probs.sum(1) / batch.active.sum(1)
    losses = ORPOTrainer.odds_ratio_loss(trainer(beta=BETA), means[:2], means[2:])[0]
    theirs = -log_probs[:2].sum() / batch.active[:2].sum() - losses.mean()
    assert_same(batch, orpo_loss(*batch.args, beta=BETA), theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_grpo(loss_type, level):
    if loss_type == "vespo" and level == "sequence":
        return  # an error in both
    batch, advantages = make_batch(scale=0.7), torch.tensor([1.2, -0.7, 0.4, -1.5])
    log_probs = log_probs_of(*batch.args)
    noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    old = (log_probs + 0.6 * noise).detach()
    entropy = outputs_of(batch, *batch.params).entropy
    by_tokens, delta = loss_type in ("cispo", "dapo", "vespo"), loss_type in ("grpo", "dapo")
    stand_in = trainer(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=0.1,
        loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.3, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=6, _entropy_bonus_enabled=True, use_adaptive_entropy=False, entropy_coef=0.05,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        args=SimpleNamespace(
            use_bias_correction_kl=True, delta=1.5 if delta else None, sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
            steps_per_generation=1,
        ),
    )  # fmt: skip
    stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, entropy, None)
    inputs = {
        "prompt_ids": torch.zeros(4, 1), "prompt_mask": torch.ones(4, 1), "completion_ids": batch.labels.clamp(min=0),
        "completion_mask": batch.active.float(), "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": reference_of(batch), "num_items_in_batch": batch.active.sum(),
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(stand_in, None, inputs)
    ours = grpo_loss(
        *batch.args, **batch.reference, advantages=advantages, old_log_probs=old, loss_type=loss_type, beta=0.1,
        importance_sampling_level=level, epsilon_low=0.2, epsilon_high=0.3, delta=1.5 if delta else None,
        max_completion_length=6 if loss_type == "dr_grpo" else None, entropy_coef=0.05,
        num_items=batch.active.sum() if by_tokens else None,
    )  # fmt: skip
    assert_same(batch, ours, theirs)


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (0.3, "jsd"), (1.0, "reverse_kl")])
def test_distillation(beta, divergence):
    batch = make_batch()
    ref = batch.reference
    student = torch.nn.functional.linear(*batch.params)
    teacher = torch.nn.functional.linear(ref["ref_hidden"], ref["ref_weight"], ref["ref_bias"])
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels=batch.labels, beta=beta, temperature=1.5)
    ours = distillation_loss(
        *batch.args, teacher_hidden=ref["ref_hidden"], teacher_weight=ref["ref_weight"], teacher_bias=ref["ref_bias"],
        divergence=divergence, beta=beta if divergence == "jsd" else 0.5, temperature=1.5,
    )  # fmt: skip
    assert_same(batch, ours, theirs)
