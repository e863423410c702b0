"""Stock TRL trainers with the flag: same losses, weights and logged metrics as without it."""

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tiny_models import batch, kernels_skipped, tiny_config, tiny_model
from training import arguments, assert_same_run, train
from transformers import AutoModelForSequenceClassification
from trl_data import text, tokenizer

import liger_trainer
from liger_trainer import LigerCallback, LigerSFTConfig
from liger_trainer.patching import patch_state
from liger_trainer.rules import padding_mask

METRICS = ("entropy", "mean_token_accuracy", "num_tokens", "grad_norm")


def sft_rows():
    return Dataset.from_list(
        [{"prompt": text(3 + i % 4, i), "completion": text(2 + 5 * i % 11, 50 + i)} for i in range(20)]
    )


def run_sft(output_dir, use_liger, model_type="llama", peft_config=None, **overrides):
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_length": 16, "activation_checkpointing": False}
    trainer = trl.SFTTrainer(
        tiny_model(model_type),
        args=arguments(output_dir, cls=LigerSFTConfig, use_liger=use_liger, **{**settings, **overrides}),
        train_dataset=sft_rows(),
        eval_dataset=sft_rows().select(range(4)),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def assert_same_metrics(theirs, ours, names=METRICS):
    for expected, actual in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        for name in expected.keys() & set(names):
            assert actual[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name
    assert set(names) <= theirs.state.log_history[0].keys()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("granite", {"completion_only_loss": False}),
        ("cohere", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
        ("qwen3", {"packing": True}),
        ("mixtral", {}),
        ("qwen2", {"loss_type": "dft"}),
        ("smollm3", {"padding_free": True, "max_length": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_sft_is_the_same(model_type, options, tmp_path):
    runs = [run_sft(tmp_path, flag, model_type, **options) for flag in (False, True)]
    assert_same_run(*runs)
    assert_same_metrics(*runs)
    evaluations = [run.evaluate() for run in runs]
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert evaluations[1][name] == pytest.approx(evaluations[0][name], rel=1e-5)
    assert patch_state(runs[0].model) is None
    state = patch_state(runs[1].model)
    assert state.trl_head.calls_fused > 0
    assert not kernels_skipped(state.report)


def test_sft_without_masks_of_right_padding(tmp_path, monkeypatch):
    left_out = []

    def spy(*args):
        changed = drop_mask(*args)
        left_out.append(changed is not None)
        return changed

    drop_mask = padding_mask.drop_mask
    monkeypatch.setattr(padding_mask, "drop_mask", spy)
    theirs = run_sft(tmp_path, False)
    ours = run_sft(tmp_path, True, liger_config={"unpad": False})
    assert_same_run(theirs, ours)
    assert_same_metrics(theirs, ours)
    assert left_out == [True] * 5


def test_sft_with_lora(tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "gate_proj"])
    runs = []
    for flag in (False, True):
        torch.manual_seed(11)
        runs.append(run_sft(tmp_path, flag, peft_config=lora))
    assert_same_run(*runs)
    assert_same_metrics(*runs)
    state = patch_state(runs[1].model)
    assert state.trl_head.calls_fused == 5
    assert state.report.counts["rope"] == state.report.counts["glu"] == 2


def test_per_token_gradients_of_dpo(tmp_path):
    runs = [run("DPO", tmp_path, flag) for flag in (False, True)]
    assert_same_run(*runs)
    assert_same_metrics(*runs, names=("rewards/chosen", "rewards/margins", "logps/chosen", "entropy", "grad_norm"))
    assert patch_state(runs[1].model).trl_head.calls_fused == 5


def test_trl_keeps_its_own_head_for_other_models(tmp_path):
    """The dispatcher that one patched model installs is inert for an unpatched one in the same process."""
    run_sft(tmp_path, True, max_steps=1)
    other = run_sft(tmp_path, False, max_steps=1).model
    with torch.no_grad():
        theirs = other(**batch(), fused_lm_head=True)
    reference = tiny_model("llama")
    reference.load_state_dict(other.state_dict())
    logits = reference(input_ids=batch()["input_ids"]).logits[:, :-1]
    labels = batch()["labels"][:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(theirs.log_probs, log_probs, rtol=1e-4, atol=1e-5)


def make_sft(args, model_type, tokens):
    return trl.SFTTrainer(tiny_model(model_type), args=args, train_dataset=sft_rows(), processing_class=tokens)


def make_dpo(args, model_type, tokens):
    lengths = [(2 + i % 4, 3 + 2 * i % 7, 2 + i % 5) for i in range(20)]
    rows = [
        {"prompt": text(p, i), "chosen": text(c, 30 + i), "rejected": text(r, 60 + i)}
        for i, (p, c, r) in enumerate(lengths)
    ]
    models = {"model": tiny_model(model_type), "ref_model": tiny_model(model_type, seed=1)}
    return trl.DPOTrainer(**models, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokens)


def make_kto(args, model_type, tokens):
    rows = [
        {"prompt": text(2 + i % 4, i), "completion": text(2 + 2 * i % 7, 40 + i), "label": i % 2 == 0}
        for i in range(20)
    ]
    models = {"model": tiny_model(model_type), "ref_model": tiny_model(model_type, seed=1)}
    return trl.KTOTrainer(**models, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokens)


def make_online(trainer_class, args, model_type, tokens):
    rows = [{"prompt": text(1 + 6 * i % 13, i)} for i in range(12)]
    reward = lambda completions, **kwargs: [float(len(set(c.split()))) for c in completions]  # noqa: E731
    data = Dataset.from_list(rows)
    model = tiny_model(model_type)
    return trainer_class(model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokens)


def make_reward(args, model_type, tokens):
    rows = [{"chosen": text(3 + 2 * i % 7, i), "rejected": text(2 + i % 5, 40 + i)} for i in range(20)]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels=1))
    return trl.RewardTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokens)


class Case(NamedTuple):
    make: Callable  # the trainer, from its arguments
    options: dict[str, Any]  # of the arguments
    fused_head: bool = True


ONLINE = {
    "num_generations": 4, "max_completion_length": 6, "beta": 0.0, "max_steps": 2, "per_device_train_batch_size": 8
}  # fmt: skip
# Trainers that have TRL's fused head, and RewardTrainer; beta 0: no reference model.
TRAINERS = {
    "SFT": Case(make_sft, {"max_length": 16, "max_steps": 2}),
    "DPO": Case(make_dpo, {}),
    "KTO": Case(make_kto, {"max_steps": 2, "per_device_train_batch_size": 4}),
    "GRPO": Case(partial(make_online, trl.GRPOTrainer), ONLINE),
    "RLOO": Case(partial(make_online, trl.RLOOTrainer), ONLINE),
    "Reward": Case(make_reward, {"max_steps": 3}, fused_head=False),
}


def run(name, output_dir, use_liger, model_type="llama", side="right", **options):
    cls, case = getattr(liger_trainer, f"Liger{name}Config"), TRAINERS[name]
    options = {"optim": "sgd", "activation_checkpointing": False, **case.options, **options}
    args = arguments(output_dir, cls=cls, use_liger=use_liger, **options)
    trainer = case.make(args, model_type, tokenizer(side))
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_is_the_same(name, tmp_path):
    runs = [run(name, tmp_path, flag) for flag in (False, True)]
    assert_same_run(*runs)
    state = patch_state(runs[1].model)
    head = state.trl_head
    assert (head is not None and head.calls_fused > 0) == TRAINERS[name].fused_head
    assert state.report.ran["unpad"] > 0


# Metrics that are means over all logits, padding's included, when they are computed from full logits.
SAME_METRICS = {
    "SFT": METRICS,
    "DPO": ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"),
    "KTO": ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl", "grad_norm"),
    "GRPO": ("reward", "entropy", "grad_norm", "completions/mean_length"),
    "RLOO": ("reward", "entropy", "grad_norm", "completions/mean_length"),
    "Reward": ("accuracy", "margin", "mean_reward", "grad_norm"),
}


@pytest.mark.long
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_un_pads_models_of_three_kinds(name, model_type, side, tmp_path):
    runs = [run(name, tmp_path, flag, model_type, side, max_steps=5) for flag in (False, True)]
    assert_same_run(*runs)
    for expected, actual in zip(*(r.state.log_history[:-1] for r in runs), strict=True):
        assert set(SAME_METRICS[name]) & expected.keys()
        for metric in expected.keys() & set(SAME_METRICS[name]):
            # Some are differences of log-probabilities of whole texts, which are about 50.
            assert actual[metric] == pytest.approx(expected[metric], rel=2e-5, abs=5e-6), metric
    assert patch_state(runs[1].model).report.ran["unpad"] >= 3  # a batch may have hardly any padding


def test_argument_classes_are_subclasses_of_trls():
    names = {name.removeprefix("Liger") for name in liger_trainer.arguments.__all__ if name.endswith("Config")}
    classes = {name: getattr(trl, name, None) or getattr(experimental(name), name) for name in names}
    assert names >= {f"{name}Config" for name in (*TRAINERS, "ORPO", "CPO", "GKD", "TPO", "GOLD", "OnlineDPO")}
    for name, theirs in classes.items():
        cls = getattr(liger_trainer, f"Liger{name}")
        assert issubclass(cls, theirs)
        assert cls is getattr(liger_trainer, f"Liger{name}")
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        expected = {field.name: field.default for field in dataclasses.fields(theirs)}
        assert defaults == expected | {"use_liger": False, "liger_config": None}
    with pytest.raises(ValueError, match="use_liger_kernel"):
        liger_trainer.LigerSFTConfig("out", use_liger=True, use_liger_kernel=True)
    with pytest.raises(AttributeError, match="LigerXConfig"):
        _ = liger_trainer.arguments.LigerXConfig


def experimental(name):
    """The module of ``trl.experimental`` that has an argument class."""
    folder = {"OnlineDPOConfig": "online_dpo"}.get(name, name.removesuffix("Config").lower())
    return importlib.import_module(f"trl.experimental.{folder}")


def test_reward_model_gets_the_layer_kernels(tmp_path):
    report = patch_state(run("Reward", tmp_path, True).model).report
    assert report.counts == {"rms_norm": 5, "rope": 2, "glu": 2, "attention": 2, "unpad": 1}
    reasons = {s.kind: s.reason for s in report.skipped}
    assert reasons.keys() == {"fused_loss", "padding_mask"}
    assert all(reason.startswith("it has no output embeddings") for reason in reasons.values())


@pytest.fixture
def saved(tmp_path):
    """Folder of a model, from which TRL makes the reference by itself."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def with_reference(name, saved, **options):
    """A flagged trainer whose reference is made by TRL, after one step."""
    kinds = {"DPO": trl.DPOTrainer, "KTO": trl.KTOTrainer, "GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}
    online = name in ("GRPO", "RLOO")
    settings = {**(ONLINE | {"beta": 0.1} if online else {"per_device_train_batch_size": 4}), "max_steps": 1, **options}
    peft_config = settings.pop("peft_config", None)
    args = arguments(f"{saved}/out", cls=getattr(liger_trainer, f"Liger{name}Config"), use_liger=True, **settings)
    rows = [
        {"prompt": text(4, i), "chosen": text(5, 30 + i), "rejected": text(6, 60 + i)} if name == "DPO" else
        {"prompt": text(4, i), "completion": text(5, 40 + i), "label": i % 2 == 0} for i in range(12)
    ]  # fmt: skip
    rewards = {"reward_funcs": lambda completions, **kwargs: [float(len(c)) for c in completions]} if online else {}
    data = Dataset.from_list(rows)
    trainer = kinds[name](saved, args=args, train_dataset=data, peft_config=peft_config, **rewards)
    trainer.train()
    return trainer


LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPO", {}), ("DPO", {"precompute_ref_log_probs": True}), ("DPO", {"peft_config": LORA}), ("KTO", {}),
        ("GRPO", {}), ("RLOO", {}), ("GRPO", {"peft_config": LORA}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)  # fmt: skip
def test_policy_and_reference_are_equal_at_the_first_step(name, options, saved):
    trainer = with_reference(name, saved, **options)
    entry = trainer.state.log_history[0]
    if name == "DPO":
        assert entry["rewards/accuracies"] == entry["rewards/margins"] == 0.0
    zeros = {"KTO": ("rewards/chosen", "kl"), "GRPO": ("kl",), "RLOO": ("kl",), "DPO": ("rewards/chosen",)}[name]
    for key in zeros:
        assert entry[key] == 0.0, key
    if not options:
        policy, reference = patch_state(trainer.model), patch_state(trainer.ref_model)
        assert reference is not policy
        assert reference.report.counts == policy.report.counts
        assert reference.config == policy.config
        assert min(policy.trl_head.calls_fused, reference.trl_head.calls_fused) > 0


@pytest.mark.parametrize("added", ["as an argument", "later"])
def test_a_callback_by_hand_patches_the_reference_too(added, saved, caplog):
    args = arguments(f"{saved}/out", cls=trl.DPOConfig, per_device_train_batch_size=4, max_steps=1)
    rows = [{"prompt": text(4, i), "chosen": text(5, 30 + i), "rejected": text(6, 60 + i)} for i in range(8)]
    callbacks = [LigerCallback()] if added == "as an argument" else []
    trainer = trl.DPOTrainer(saved, args=args, train_dataset=Dataset.from_list(rows), callbacks=callbacks)
    if added == "later":
        trainer.add_callback(LigerCallback())
    trainer.train()
    assert patch_state(trainer.model).report.counts["fused_loss"] == 1
    if added == "later":
        assert "a reference model, if there is one, is not patched" in caplog.text
    else:
        assert trainer.state.log_history[0]["rewards/margins"] == 0.0
        assert patch_state(trainer.ref_model).report.counts == patch_state(trainer.model).report.counts


def test_the_reference_of_a_trainer_without_the_flag_stays_as_it_is(tmp_path):
    run("DPO", tmp_path, True)
    trainer = run("DPO", tmp_path, False)
    assert patch_state(trainer.model) is patch_state(trainer.ref_model) is None


@pytest.mark.parametrize("first", ["sft", "plain"])
def test_one_fused_loss_the_one_that_runs(first, tmp_path):
    """Under SFT and afterwards under the plain Trainer, or the other way round."""
    model = tiny_model("llama")
    for kind in ("sft", "plain") if first == "sft" else ("plain", "sft"):
        if kind == "sft":
            args = arguments(tmp_path, cls=LigerSFTConfig, use_liger=True, max_length=16, max_steps=1)
            trainer = trl.SFTTrainer(model, args=args, train_dataset=sft_rows(), processing_class=tokenizer())
            trainer.train()
        else:
            train(tmp_path, True, model=model, max_steps=1)
        [row] = [row for row in patch_state(model).report.applied if row.kind == "fused_loss"]
        assert row.variant.startswith("linear_logprobs" if kind == "sft" else "linear_cross_entropy")
        assert patch_state(model).report.ran["fused_loss"] == 1
