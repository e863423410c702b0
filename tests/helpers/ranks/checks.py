"""Checks of two ranks beyond the parity of whole training runs; each check raises if it fails."""

import resource
import time
from types import SimpleNamespace

import torch
import trl.trainer.utils as trl_utils
from ranks.cases import Case, build, full
from tiny_models import batch, tiny_model
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training import Rows, arguments
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from liger_trainer import LigerConfig, LigerSFTConfig, apply_liger
from liger_trainer.head import sharded_weights
from liger_trainer.head.unbuilt_logits import LossOnlyLogits
from liger_trainer.patching import patch_state
from liger_trainer.training import throughput
from liger_trainer.trl import bridge as trl

TRITON = {"head_gathered_for_one_call"}  # the others run the ops' plain definitions
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def fsdp2_units(directory, settings):
    """Gradients do not depend on which FSDP2 unit holds lm_head, in fp32 and in bf16 with fp32 master weights."""
    for model_type, own_unit, reshard in (("llama", True, True), ("llama", False, True), ("qwen2", False, False)):
        options = {"own_unit": own_unit, "reshard_after_forward": reshard}
        theirs = _gradients(tiny_model(model_type), 2)
        ours = _sharded_gradients(model_type, True, MixedPrecisionPolicy(), **options)
        _assert_close(ours, theirs, 1e-5)
        baseline = _sharded_gradients(model_type, False, BF16, **options)
        mixed = _sharded_gradients(model_type, True, BF16, **options)
        assert all(g.dtype == torch.float32 for g in mixed.values())
        for name, exact in theirs.items():
            error, limit = (mixed[name] - exact).norm(), (baseline[name] - exact).norm()
            assert error <= 1.5 * limit + 1e-3 * exact.norm(), f"{name}: {error:.2e}, unpatched {limit:.2e}"


def _sharded_gradients(model_type, patched, policy, own_unit, reshard_after_forward) -> dict[str, torch.Tensor]:
    model = tiny_model(model_type)
    if patched:
        apply_liger(model)
    units = [*model.model.layers, *([model.lm_head] if own_unit else []), model]
    for unit in units:
        fully_shard(unit, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    gradients = _gradients(model, 1)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    if patched:
        assert patch_state(model).fused.calls_fused == 1
        plain = tiny_model(model_type).to(policy.param_dtype or torch.float32)
        _check_logits(model, plain, 1e-4 if policy.param_dtype is None else 3e-2)
    return gradients


def _gradients(model, rows_at_once: int) -> dict[str, torch.Tensor]:
    """Of the mean over both rows' labels: of both at once, or of this rank's row, for engines that average ranks."""
    both = batch(rows=2)
    both["labels"][1] = -100  # nothing to learn on the second rank
    num_items = (both["labels"][:, 1:] != -100).sum()
    mine = slice(None) if rows_at_once == 2 else slice(distributed.get_rank(), distributed.get_rank() + 1)
    loss = model.train()(**{k: v[mine] for k, v in both.items()}, num_items_in_batch=num_items).loss
    (loss * (2 / rows_at_once)).backward()
    return {name: full(p.grad) for name, p in model.named_parameters()}


def _assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        error = (ours[name] - exact).norm() / exact.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


def evaluation_logits(directory, settings):
    """A loss-only evaluation builds no logits. Others read the right ones after the engine has resharded lm_head."""
    trainer = build(Case("any"), directory, True, 2, prediction_loss_only=True, **settings)
    trainer.train()
    trainer.compute_metrics = None
    kinds = []
    trainer.model.register_forward_hook(lambda module, args, out: kinds.append(type(out.logits)))
    assert trainer.evaluate()["eval_loss"] > 0
    assert set(kinds) == {LossOnlyLogits}
    unset_hf_deepspeed_config()  # or the plain model would also be partitioned
    plain = tiny_model("llama")
    plain.load_state_dict({name: full(p) for name, p in trainer.model.named_parameters()})
    _check_logits(trainer.model_wrapped, plain, 1e-4)


def _check_logits(model, plain, tolerance):
    model.eval()  # DeepSpeed's engine returns None here
    plain.eval()
    with torch.no_grad():
        logits, expected = model(**batch(rows=2)).logits, plain(**batch(rows=2)).logits
    assert type(logits) is torch.Tensor
    error = (logits.float() - expected.float()).norm() / expected.float().norm()
    assert error < tolerance, f"logits: {error:.2e}"


def head_gathered_for_one_call(directory, settings):
    """TRL gathers a ZeRO-3 lm_head around our op alone: per-token gradients find it partitioned and gather it again."""
    import deepspeed

    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 16, requires_grad=True), torch.randint(0, 32, (7,))
    plain = torch.nn.Linear(16, 32, bias=False).requires_grad_(False)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        head = torch.nn.Linear(16, 32, bias=False).requires_grad_(False)
    with deepspeed.zero.GatheredParameters([head.weight], modifier_rank=0):
        head.weight.copy_(plain.weight)
    upstream = torch.arange(7.0)
    model = tiny_model("llama")
    trl.apply_for(LigerSFTConfig(directory, use_cpu=True, bf16=False), model, LigerConfig(), {})
    with deepspeed.zero.GatheredParameters([head.weight]):
        trl._ACTIVE.slot.value = patch_state(model).trl_head
        log_probs, *_ = trl_utils._ChunkedLogProbFunction.apply(hidden, head.weight, None, targets, 1.0, 8)
        trl._ACTIVE.slot.value = None
    assert sharded_weights.is_partitioned(head.weight)
    (ours,) = torch.autograd.grad((log_probs * upstream).sum(), hidden)
    expected = plain(hidden).log_softmax(-1)[torch.arange(7), targets]
    (theirs,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class _Clock(TrainerCallback):
    """A training forward takes a second on the first rank and three on the second."""

    def __init__(self, model):
        self.now = 0.0
        throughput.time = SimpleNamespace(perf_counter=lambda: self.now)
        model.register_forward_pre_hook(self.forward)

    def forward(self, module, args):
        self.now += 1 + 2 * distributed.get_rank()


def throughput_over_ranks(directory, settings):
    """Tokens are summed, the slowest rank's time counts, and the largest rank's memory."""
    model = tiny_model("llama")
    rows = Rows(rows=16)
    for i, row in enumerate(rows.rows):  # the second rank's rows are shorter
        row["attention_mask"][12 - 6 * (i % 2) :] = 0
    sampling = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "max_steps": 4}
    args = arguments(directory, per_device_train_batch_size=1, **sampling, **settings)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[throughput.ThroughputCallback])
    clock = _Clock(model)
    ballast = torch.ones(64 * 2**20 * distributed.get_rank())  # 256 MiB on the second rank
    trainer.train()
    del ballast
    throughput.time = time
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert clock.now == 8 * (1 + 2 * distributed.get_rank())
    assert last["step_seconds"] == 6
    assert last["tokens_per_second"] == 2 * (12 + 6) / 6
    assert last["padded_tokens_per_second"] == 2 * (12 + 12) / 6
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert distributed.get_rank() == 1 or last["peak_memory_rss_gib"] > own + 0.1
