"""Two GPUs (NCCL), whose rows are padded differently, against a single process on the CPU without the flag."""

from dataclasses import asdict, replace

import pytest
import torch
from launching import ON_GPUS, two_ranks
from ranks.cases import STEPS, Case, run, save_models
from training import assert_same_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CASES = [
    Case("ddp"), Case("ddp", lora=True, accumulation=4), Case("ddp", "dpo"), Case("fsdp2"),
    Case("fsdp2", model_type="qwen2", accumulation=4), Case("fsdp2", "dpo"), Case("zero2"),
    Case("zero3"), Case("zero3", model_type="qwen2", accumulation=4), Case("zero3", "dpo"),
]  # fmt: skip


def test_two_gpus_train_as_one_process_does(tmp_path):
    save_models(tmp_path)
    alone = {case: replace(case, engine="") for case in CASES}
    with two_ranks("ranks.worker", tmp_path, {"cases": [asdict(case) for case in CASES], "checks": []}, ON_GPUS):
        single = {case: run(case, tmp_path / "single", False, 1, origin=tmp_path) for case in set(alone.values())}
    for case in CASES:
        actual, expected = torch.load(tmp_path / f"{case.name}.pt"), single[alone[case]]
        assert actual["engine"] == case.engine, case.name
        assert actual["calls_fused"] == STEPS * case.accumulation, case.name
        assert actual["steps_unpadded"] > 0, case.name
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-4), case.name
        for step, (ours, theirs) in enumerate(zip(actual["gradients"], expected["gradients"], strict=True)):
            assert_same_tensors(ours, theirs, f"{case.name}, gradients of step {step}", 1e-3)
