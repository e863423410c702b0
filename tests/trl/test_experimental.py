"""Stock trainers of trl.experimental that build logits: with the flag they get our op, and the same run."""

import importlib
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_model
from training import arguments, assert_same_run
from trl_data import byte_tokenizer, text, tokenizer

import liger_trainer
from liger_trainer import apply_liger
from liger_trainer.kernels.linear_logprobs import linear_logprobs
from liger_trainer.patching import patch_state
from liger_trainer.trl import stand_ins
from liger_trainer.trl.stand_ins import token_scores

LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])


def trainer_class(name):
    module = {"OnlineDPO": "online_dpo"}.get(name, name.lower())
    package = "trl" if name == "Distillation" else f"trl.experimental.{module}"
    return getattr(importlib.import_module(package), f"{name}Trainer")


def make_pairs(name, args, model_type, tokens, model=None, **kwargs):
    lengths = [(2 + i % 4, 3 + 2 * i % 7, 2 + i % 5) for i in range(24)]
    rows = [
        {"prompt": text(p, i), "chosen": text(c, 30 + i), "rejected": text(r, 60 + i), "reference": text(4, 90 + i)}
        for i, (p, c, r) in enumerate(lengths)
    ]
    rows = [{k: v for k, v in row.items() if k != "reference" or name == "TPO"} for row in rows]
    data = Dataset.from_list(rows)
    model = tiny_model(model_type) if model is None else model
    return trainer_class(name)(model, args=args, train_dataset=data, processing_class=tokens, **kwargs)


def make_pair_of_models(name, args, model_type, tokens, **kwargs):
    if name == "GOLD":
        tokens = byte_tokenizer()
    tokens.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    rows = [
        {
            "messages": [
                {"role": r, "content": text(2 + (s + i) % 5, s + i)} for r, s in (("user", 0), ("assistant", 40))
            ]
        }
        for i in range(24)
    ]
    models = {"model": tiny_model(model_type), "teacher_model": tiny_model(model_type, seed=1)} | kwargs
    data = Dataset.from_list(rows)
    return trainer_class(name)(**models, args=args, train_dataset=data, processing_class=tokens)


def make_distillation(name, args, model_type, tokens, **kwargs):
    data = Dataset.from_list([{"prompt": text(1 + 6 * i % 13, i)} for i in range(16)])
    models = {"model": tiny_model(model_type), "teacher_model": tiny_model(model_type, seed=1)}
    return trainer_class(name)(**models, args=args, train_dataset=data, processing_class=tokens, **kwargs)


def make_online(name, args, model_type, tokens, **kwargs):
    data = Dataset.from_list([{"prompt": text(1 + 6 * i % 13, i)} for i in range(16)])
    reward = lambda completions, **_: [float(len(set(c.split()))) for c in completions]  # noqa: E731
    model = tiny_model(model_type)
    references = {} if "peft_config" in kwargs else {"ref_model": tiny_model(model_type, seed=1)}
    return trainer_class(name)(
        model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokens, **references, **kwargs
    )


class Case(NamedTuple):
    make: Any
    options: dict[str, Any]
    unpads: bool = True
    online: bool = False


BATCH = {"per_device_train_batch_size": 4}
PAIRS = BATCH | {"max_length": 32}
CASES = {
    "ORPO": Case(make_pairs, PAIRS, unpads=False),
    "CPO": Case(make_pairs, PAIRS, unpads=False),
    "TPO": Case(make_pairs, PAIRS),
    "GKD": Case(make_pair_of_models, BATCH | {"max_length": 24, "lmbda": 0.0}),
    "GOLD": Case(make_pair_of_models, BATCH | {"max_length": 64, "lmbda": 0.0, "max_completion_length": 8}),
    "Distillation": Case(make_distillation, BATCH | {"max_completion_length": 6, "beta": 0.5}, online=True),
    "OnlineDPO": Case(make_online, BATCH | {"max_new_tokens": 6, "max_length": 24}, unpads=False, online=True),
}


def run(name, output_dir, use_liger, model_type="llama", peft_config=None, teacher=None, **options):
    case = CASES[name]
    settings = {
        "optim": "sgd", "learning_rate": 0.05, "activation_checkpointing": False, "max_steps": 2, **case.options,
        **options,
    }  # fmt: skip
    args = arguments(output_dir, cls=getattr(liger_trainer, f"Liger{name}Config"), use_liger=use_liger, **settings)
    torch.manual_seed(11)
    kwargs = {k: v for k, v in (("peft_config", peft_config), ("teacher_model", teacher)) if v is not None}
    tokens = tokenizer("left" if case.online else "right")
    trainer = case.make(name, args, model_type, tokens, **kwargs)
    trainer.train()
    return trainer


IGNORED = ("runtime", "per_second", "flos", "padding_removed", "step_time")


def assert_same_logs(theirs, ours):
    """Everything that TRL logs, but for times."""
    for expected, actual in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        names = {n for n in expected if not any(word in n for word in IGNORED)}
        assert names <= actual.keys()
        for name in names:
            assert actual[name] == pytest.approx(expected[name], rel=2e-5, abs=5e-6), name
    assert len(theirs.state.log_history) > 1


def assert_same(name, output_dir, steps=2, **options):
    """With and without the flag; returns the flagged trainer."""
    theirs, ours = (run(name, output_dir, flag, max_steps=steps, **options) for flag in (False, True))
    assert_same_run(theirs, ours)
    assert_same_logs(theirs, ours)
    assert patch_state(theirs.model) is None
    state = patch_state(ours.model)
    micro = options.get("gradient_accumulation_steps", 1)
    adapters = name == "OnlineDPO" and options.get("peft_config") is not None  # the reference is the same model
    assert state.trl_head.calls_fused == steps * micro * (2 if adapters else 1)
    assert state.report.counts["fused_loss"] == 1
    assert (state.report.counts.get("unpad", 0) > 0) == CASES[name].unpads
    return ours


@pytest.mark.parametrize("name", CASES)
def test_every_trainer_is_the_same(name, tmp_path):
    ours = assert_same(name, tmp_path)
    for other in ("teacher_model", "ref_model"):
        model = getattr(ours, other, None)
        if model is not None:
            state = patch_state(model)
            assert state.report.counts == patch_state(ours.model).report.counts
            assert name == "Distillation" or state.trl_head.calls_fused == 2  # that trainer calls one op for both


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ORPO", {"peft_config": LORA, "gradient_accumulation_steps": 2}),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "model_type": "gemma2"}),
        ("TPO", {"model_type": "cohere", "loss_type": "tpo-l"}),
        ("OnlineDPO", {"peft_config": LORA}),  # the same completions, so patching must leave the random numbers alone
        ("GKD", {"model_type": "gemma2", "gradient_accumulation_steps": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_options(name, options, tmp_path):
    assert_same(name, tmp_path, steps=1, **options)


LOSSES = [
    ("ORPO", {}),
    *(("CPO", {"loss_type": kind}) for kind in ("sigmoid", "hinge", "ipo", "simpo")),
    ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.5}),
    *(("TPO", {"loss_type": kind}) for kind in ("sigmoid", "hinge", "ipo", "tpo-l")),
    ("TPO", {"tpo_alpha": 0.0}),
    *((name, {"beta": beta}) for name in ("GKD", "GOLD", "Distillation") for beta in (0.0, 0.5, 1.0)),
    ("GKD", {"lmbda": 1.0, "max_new_tokens": 5}),
    ("GOLD", {"temperature": 2.0}),
    ("Distillation", {"temperature": 0.7}),
    *(("OnlineDPO", {"loss_type": kind}) for kind in ("sigmoid", "ipo")),
]


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(("name", "options"), LOSSES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_ten_steps_of_every_loss(name, options, micro, lora, tmp_path):
    if (
        lora
    ):  # which starts as the reference; a large step brings margins out of the roundings, where accuracies are random
        options = {**options, "peft_config": LORA} | ({"learning_rate": 2.0} if name == "OnlineDPO" else {})
    assert_same(name, tmp_path, steps=10, gradient_accumulation_steps=micro, **options)


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite", "qwen3", "mixtral"])
@pytest.mark.parametrize("name", CASES)
def test_models_of_other_kinds(name, model_type, tmp_path):
    if model_type == "mixtral" and CASES[name].online:
        pytest.skip("transformers 5.23 cannot generate with Mixtral in training mode: its router's loss")
    assert_same(name, tmp_path, steps=3, model_type=model_type)


@pytest.mark.parametrize("name", ["ORPO", "TPO"])
def test_evaluation_is_the_same(name, tmp_path):
    evaluations, heads = [], []
    for flag in (False, True):
        trainer = run(name, tmp_path, flag, max_steps=1)
        data = trainer.train_dataset.select(range(6))
        calls = patch_state(trainer.model).trl_head.calls_fused if flag else 0
        evaluations.append(trainer.evaluate(data))
        heads.append((patch_state(trainer.model).trl_head.calls_fused if flag else 0) - calls)
    for metric in (m for m in evaluations[0] if not any(word in m for word in IGNORED)):
        assert evaluations[1][metric] == pytest.approx(evaluations[0][metric], rel=2e-5, abs=5e-6), metric
    assert heads == [0, 1]


def test_a_trainer_without_the_flag_keeps_trls_functions(tmp_path, monkeypatch):
    run("ORPO", tmp_path, True, max_steps=1)
    module = importlib.import_module("trl.experimental.orpo.orpo_trainer")
    seen = []
    original = module.selective_log_softmax.original
    monkeypatch.setattr(
        module.selective_log_softmax, "original", lambda *args: seen.append(type(args[0])) or original(*args)
    )
    trainer = run("ORPO", tmp_path, False, max_steps=1)
    assert seen == [torch.Tensor]
    assert patch_state(trainer.model) is None


def test_uld_keeps_its_logits_and_says_so(tmp_path):
    tokens = byte_tokenizer()
    tokens.save_pretrained(tmp_path / "teacher")
    options = {"use_uld_loss": True, "teacher_tokenizer_name_or_path": str(tmp_path / "teacher"), "max_steps": 1}
    theirs, ours = (run("GOLD", tmp_path, flag, **options) for flag in (False, True))
    assert_same_run(theirs, ours)
    [skipped] = [s for s in patch_state(ours.model).report.skipped if s.kind == "fused_loss"]
    assert skipped.reason.startswith("use_uld_loss sorts the probabilities")
    assert patch_state(ours.teacher_model).report.counts["rms_norm"] == 5


def test_a_teacher_that_was_patched_by_hand(tmp_path):
    """In bf16, where accelerate replaces the teacher's forward before it is used."""
    losses = []
    for flag in (False, True):
        teacher = tiny_model("llama", seed=1)
        apply_liger(teacher, {"rms_norm": False})
        trainer = run("GKD", tmp_path, flag, teacher=teacher, max_steps=1, bf16=True)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    state, student = patch_state(teacher), patch_state(trainer.model)
    assert state.trl_head.calls_fused == student.trl_head.calls_fused == 1
    assert "rms_norm" not in state.report.counts
    assert student.report.counts["fused_loss"] == 1


@pytest.mark.long
def test_one_model_under_two_trainers(tmp_path):
    """What the first one needed of the model does not stay."""
    model = tiny_model("llama")
    for name, unpads in (("ORPO", 0), ("TPO", 1), ("ORPO", 0)):
        args = arguments(
            tmp_path, cls=getattr(liger_trainer, f"Liger{name}Config"), use_liger=True, max_steps=1,
            activation_checkpointing=False, **PAIRS,
        )  # fmt: skip
        make_pairs(name, args, "llama", tokenizer(), model=model).train()
        state = patch_state(model)
        assert state.report.counts.get("unpad", 0) == unpads
        assert state.report.ran["fused_loss"] == 1
        assert f"linear_logprobs, behind {name}Trainer" in [row.variant for row in state.report.applied]


def test_a_stand_in_is_read_by_known_functions_only():
    labels = torch.tensor([[1, 2, 3]])
    hidden, weight = torch.randn(1, 3, 4), torch.randn(7, 4)
    logits = hidden @ weight.t()
    scores = token_scores(linear_logprobs(hidden, weight, labels), labels)
    torch.testing.assert_close(scores[:, :2].mean(-1), logits[:, :2].mean(-1))
    torch.testing.assert_close(scores.detach().mean(), logits.mean())
    torch.testing.assert_close(F.cross_entropy(scores.view(-1, 5), labels[0]), F.cross_entropy(logits[0], labels[0]))
    assert torch.equal(scores.argmax(-1) == labels, logits.argmax(-1) == labels)
    for misuse in (torch.sum, torch.softmax, lambda s: s + 1, lambda s: s[..., 0], lambda s: s.mean(1)):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            misuse(scores)
    with pytest.raises(ValueError, match="tokens that follow"):
        stand_ins.selective_log_softmax(scores, labels + 1)
    with pytest.raises(ValueError, match="temperature"):
        stand_ins.selective_log_softmax(scores, labels, temperature=2.0)
