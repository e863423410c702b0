"""Medusa models on two CPU processes under the distributed engines, against a single process with plain heads."""

import pytest
import torch
from launching import two_ranks
from medusa_models import medusa_model
from ranks import medusa_worker
from ranks.cases import STEPS
from training import assert_same_tensors

from liger_trainer import MedusaModel

JOB = [
    ["ddp", 1, "fp32"], ["ddp", 2, "fp32"], ["fsdp2", 1, "fp32"], ["fsdp2", 2, "fp32"], ["fsdp2", 2, "bf16"],
    ["fsdp2", 2, "checkpointed"], ["zero3", 1, "fp32"], ["zero3", 2, "fp32"],
]  # fmt: skip


def test_two_ranks_train_as_one_process_does(tmp_path):
    """Sharded engines gather each head for its own call; losses, gradients and weights match plain heads.

    In bf16, FSDP2 casts what goes in and out of each head, which has to leave the divisor of its loss alone. Where it
    checkpoints activations, each head runs again in backward.
    """
    for stage in (1, 2):
        medusa_model("qwen2", heads=2, stage=stage).save_pretrained(tmp_path / f"medusa-{stage}")
    with two_ranks("ranks.medusa_worker", tmp_path, JOB):
        single = {s: medusa_worker.run(tmp_path, s, False, 1, f"{tmp_path}/single-{s}") for s in (1, 2)}
    for engine, stage, variant in JOB:
        name, theirs, bf16 = f"{engine}-{stage}-{variant}", single[stage], variant == "bf16"
        tolerance = 2e-2 if bf16 else 1e-5
        ours = torch.load(tmp_path / f"{name}.pt")
        assert (ours["engine"], ours["fused"]) == (engine, 4)
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance), name
        for key in ("gradients", "weights"):
            for step in range(STEPS):
                # In bf16 the LM's key biases have gradients of pure rounding: softmax does not see them.
                expected = {n: t for n, t in theirs[key][step].items() if not bf16 or n.startswith("medusa_heads.")}
                where = f"{name}, {key} of step {step}"
                assert_same_tensors(ours[key][step], expected, where, tolerance, all_names=False)
        saved = MedusaModel.from_pretrained(tmp_path / name).state_dict()
        assert_same_tensors(saved, ours["weights"][-1], f"{name}, saved", 1e-7, all_names=False)
