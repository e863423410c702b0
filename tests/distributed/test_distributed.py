"""Two processes on the CPU (gloo) against a single one without the flag, for every engine users launch with."""

from dataclasses import asdict, replace

import pytest
import torch
from launching import two_ranks
from ranks.cases import STEPS, Case, run, save_models
from tiny_models import batch, tiny_model
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from training import assert_same_tensors

from liger_trainer import apply_liger
from liger_trainer.head.sharded_weights import check_materialized
from liger_trainer.patching import patch_state

# With the kernels where a sharded engine hands them its weights; all others are as right with the ops' definitions.
# The second rank has no label that counts in the first eight micro-batches, see cases.valid_labels.
CASES = [
    Case("ddp", checkpoint=True),
    Case("ddp", model_type="qwen2"),
    Case("ddp", lora=True, accumulation=4),
    Case("ddp", "sft", accumulation=4),
    Case("ddp", "sft", "qwen2", lora=True),
    Case("fsdp2", model_type="qwen2", checkpoint=True),
    Case("fsdp2", triton=True),
    Case("fsdp2", model_type="qwen2", accumulation=4),
    Case("fsdp2", lora=True, accumulation=4),
    Case("fsdp2", "sft", triton=True),
    Case("fsdp2", "sft", "qwen2", accumulation=4),
    Case("fsdp2", "sft", lora=True),
    Case("fsdp2", "dpo"),
    Case("zero2", model_type="qwen2"),
    Case("zero2", lora=True, accumulation=4),
    Case("zero2", "sft", accumulation=4),
    Case("zero2", "sft", "qwen2", lora=True),
    Case("zero3", checkpoint=True),
    Case("zero3", triton=True),
    Case("zero3", model_type="qwen2", accumulation=4),
    Case("zero3", lora=True, accumulation=4),
    Case("zero3", "sft"),
    Case("zero3", "sft", "qwen2", accumulation=4),
    Case("zero3", "sft", "qwen2", lora=True),
    Case("zero3", "dpo"),
    *(Case(engine, model_type="deep", recompute=True) for engine in ("ddp", "fsdp2", "zero3")),
]
CHECKS = [
    ["throughput_over_ranks", "ddp"], ["fsdp2_units", "fsdp2"], ["evaluation_logits", "fsdp2"],
    ["evaluation_logits", "zero3"], ["head_gathered_for_one_call", "zero3"],
]  # fmt: skip


@pytest.mark.parametrize("kernels", ["some", pytest.param("more", marks=pytest.mark.long)])
def test_two_ranks_train_as_one_process_does(kernels, tmp_path):
    """All engines in one launch: most of its time goes into starting processes."""
    save_models(tmp_path)
    cases = list(CASES)
    if kernels == "more":  # under each engine and trainer, once
        short = [
            case for case in CASES if not (case.lora or case.checkpoint or case.recompute) and case.accumulation == 1
        ]
        cases = [replace(case, triton=case in short) for case in CASES]
    alone = {case: replace(case, engine="", triton=False) for case in cases}
    with two_ranks("ranks.worker", tmp_path, {"cases": [asdict(case) for case in cases], "checks": CHECKS}):
        single = {case: run(case, tmp_path / "single", False, 1, origin=tmp_path) for case in set(alone.values())}
    for case in cases:
        actual = torch.load(tmp_path / f"{case.name}.pt")
        assert actual["engine"] == case.engine, case.name
        assert actual["calls_fused"] == STEPS * case.accumulation, case.name
        assert not actual["skipped"], case.name
        # Alone with its row of SFT's data, a rank has no padding; otherwise one of the ranks has in each step.
        assert (actual["steps_unpadded"] > 0) == (case.trainer != "sft"), case.name
        assert_same(actual, single[alone[case]], case.name)
        if case.recompute:  # the first rank wants one layer; under ZeRO-3 it recomputes as many as the second wants
            assert actual["recomputed"][-1] == (3 if case.engine == "zero3" else 1), case.name
        if case.checkpoint:
            assert_same_tensors(actual["resumed"], actual["weights"][-1], f"{case.name}, resumed", all_names=False)


def assert_same(actual, expected, name, tolerance=1e-5):
    assert actual["losses"] == pytest.approx(expected["losses"], rel=tolerance), name
    assert actual["norms"] == pytest.approx(expected["norms"], rel=tolerance), name
    assert actual["metrics"] == pytest.approx(expected["metrics"], rel=tolerance), name
    assert len(actual["gradients"]) == len(actual["weights"]) == STEPS
    for key in ("gradients", "weights"):
        for step, (ours, theirs) in enumerate(zip(actual[key], expected[key], strict=True)):
            assert_same_tensors(ours, theirs, f"{name}, {key} of step {step}", tolerance)
    moved = [(actual["weights"][-1][n] - w).abs().max() for n, w in actual["start"].items()]
    assert min(moved) > 0, f"{name}: a parameter that was not trained"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_losses_of_sequence_shards_add_up(model_type):
    """Context and sequence parallel: ``shift_labels`` and the count of all shards' labels; one shard has none.

    A model without layers, whose tokens do not see each other, is exact when cut into shards of the sequence.
    """
    whole = batch(rows=2, tokens=12)
    whole["labels"][:, 4:9] = -100
    shift_labels = torch.nn.functional.pad(whole["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    num_items = (shift_labels != -100).sum()
    plain = tiny_model(model_type, num_hidden_layers=0).train()
    expected = plain(**whole, num_items_in_batch=num_items).loss
    expected.backward()
    patched = tiny_model(model_type, num_hidden_layers=0).train()
    apply_liger(patched)
    total = 0.0
    for start in (0, 4, 8):
        shard = {k: v[:, start : start + 4] for k, v in whole.items()}
        part = {"shift_labels": shift_labels[:, start : start + 4], "num_items_in_batch": num_items}
        loss = patched(**shard, **part).loss
        loss.backward()
        total += loss.item()
    assert patch_state(patched).fused.calls_fused == 3
    assert total == pytest.approx(expected.item(), rel=1e-5)
    gradients = ({n: p.grad for n, p in model.named_parameters()} for model in (patched, plain))
    assert_same_tensors(*gradients, model_type)


def test_a_weight_that_is_not_materialised_is_rejected():
    model = tiny_model("llama").train()
    apply_liger(model)
    model.lm_head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it outside lm_head's call
    with pytest.raises(ValueError, match=r"lm_head\.weight: got an empty tensor of shape \(0,\); must be materialised"):
        model(**batch())


def test_a_vocabulary_sharded_head_is_not_fused():
    model = tiny_model("llama")
    model._tp_size = 2  # what transformers' tensor-parallel loading sets
    (skipped,) = apply_liger(model).skipped
    assert skipped.kind == "fused_loss"
    assert "tensor-parallel (tp_size 2)" in skipped.reason


def test_a_sharded_weight_is_rejected(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"lm_head\.weight: got a DTensor"):
            check_materialized("lm_head.weight", sharded)
    finally:
        torch.distributed.destroy_process_group()
