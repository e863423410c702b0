"""Stock Trainer with the flag: same losses and weights as without it, in every mode users train in."""

import inspect
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MODEL_TYPES, batch, kernels_skipped, tiny_model
from training import Rows, arguments, assert_same_run, losses, train
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from liger_trainer import LigerCallback, LigerTrainingArguments, apply_liger
from liger_trainer.head.unbuilt_logits import LossOnlyLogits
from liger_trainer.patching import patch_state


def ragged(i):
    return (12, 3, 7, 0, 1, 9)[i % 6]


# SGD: Adam divides by the gradient's size, which blows rounding up where a gradient is nearly zero.
SGD = {"optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_five_steps_are_the_same(model_type, tmp_path):
    data = Rows(valid=lambda i: max(2, ragged(i)))  # transformers' loss is 0 / 0 on a batch without any label
    runs = [train(tmp_path, flag, model_type, dataset=data, **SGD) for flag in (False, True)]
    assert patch_state(runs[0].model) is None
    state = patch_state(runs[1].model)
    assert not kernels_skipped(state.report)
    assert state.fused.calls_fused == 5
    assert_same_run(*runs)


@pytest.mark.triton
@pytest.mark.parametrize(("model_type", "checkpointing"), [("gemma2", False), ("llama", True)])
def test_two_steps_with_the_triton_kernels(model_type, checkpointing, tmp_path):
    settings = {**SGD, "max_steps": 2, "dataset": Rows(valid=ragged), "activation_checkpointing": checkpointing}
    assert_same_run(*(train(tmp_path, flag, model_type, **settings) for flag in (False, True)))


def test_adam_too(tmp_path):
    assert_same_run(*(train(tmp_path, flag, "qwen3") for flag in (False, True)), tolerance=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_gradient_accumulation_over_ragged_labels(steps, tmp_path):
    """Micro-batches differ in how many labels count; one has none at all."""
    settings = {**SGD, "gradient_accumulation_steps": steps, "per_device_train_batch_size": 1, "max_steps": 6}
    settings["logging_nan_inf_filter"] = False
    runs = [train(tmp_path, flag, dataset=Rows(valid=ragged), **settings) for flag in (False, True)]
    if steps == 1:  # transformers' own loss is 0 / 0 on a batch without a label; ours is 0, and trains on
        assert not all(np.isfinite(losses(runs[0])))
        assert 0.0 in losses(runs[1])
        assert all(np.isfinite(losses(runs[1])))
        assert all(torch.isfinite(p).all() for p in runs[1].model.parameters())
    else:
        assert_same_run(*runs)


def test_accumulation_equals_a_large_batch(tmp_path):
    """Four micro-batches of one row give the step of one batch of four, whatever their labels."""
    data = Rows(valid=ragged)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    large = {"per_device_train_batch_size": 4}
    assert_same_run(*(train(tmp_path, True, dataset=data, **SGD, **shape) for shape in (small, large)))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["projections", "saved head", "saved norm", "lora on head"],
)
def test_lora(lora, tmp_path):
    runs = []
    for flag in (False, True):
        model = tiny_model("llama")
        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora))
        runs.append(train(tmp_path, flag, model=model, **SGD))
    assert_same_run(*runs)
    report = patch_state(runs[1].model).report
    saved_norms = lora.get("modules_to_save") == ["model.norm"]  # the original and its trainable copy
    assert report.counts == report.counts | {"rope": 2, "glu": 2, "rms_norm": 5 + saved_norms}
    if "lm_head" in lora["target_modules"]:
        assert [s.kind for s in report.skipped] == ["fused_loss"]
        assert "adapter" in report.skipped[0].reason
    else:
        assert not report.skipped
        assert patch_state(runs[1].model).fused.calls_fused == 5


def test_wrapping_with_peft_after_patching_keeps_the_fused_loss():
    model = tiny_model("llama")
    apply_liger(model)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).train()
    wrapped(**batch()).loss.backward()
    assert patch_state(wrapped).fused.calls_fused == 1


def test_forward_called_past_the_hooks_is_noticed(caplog):
    model = tiny_model("llama").train()
    apply_liger(model)
    assert model.forward(**batch()).logits.shape[-1] == model.config.vocab_size
    assert "the fused loss did not act" in caplog.text


@pytest.mark.parametrize("with_metrics", [False, True])
def test_evaluation(with_metrics, tmp_path):
    def accuracy(prediction):
        hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": hits[prediction.label_ids[:, 1:] != -100].mean()}

    metrics = []
    for flag in (False, True):
        trainer = Trainer(
            tiny_model("gemma2"),
            arguments(tmp_path, use_liger=flag),
            eval_dataset=Rows(valid=ragged),
            compute_metrics=accuracy if with_metrics else None,
        )
        metrics.append({k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_accuracy")})
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    assert ("eval_accuracy" in metrics[0]) == with_metrics


@pytest.mark.parametrize("asks", ["loss", "logits", "logits in compute_loss"])
def test_only_a_loss_only_evaluation_builds_no_logits(asks, tmp_path):
    class ReadsLogits(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + 0 * outputs.logits.mean()
            return (loss, outputs) if return_outputs else loss

    seen, losses = [], []
    for flag in (False, True):
        trainer = (ReadsLogits if asks == "logits in compute_loss" else Trainer)(
            tiny_model("llama"),
            arguments(tmp_path, use_liger=flag, bf16=True),
            eval_dataset=Rows(valid=ragged),
            compute_metrics=(lambda prediction: {"size": prediction.predictions.size}) if asks == "logits" else None,
        )
        trainer.model.register_forward_hook(lambda module, args, out: seen.append(type(out.logits)))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert seen[-1] is (LossOnlyLogits if asks == "loss" else torch.Tensor)


def test_label_smoothing_takes_the_ordinary_path_and_says_so(tmp_path, capsys):
    runs = [train(tmp_path, flag, label_smoothing_factor=0.1, **SGD) for flag in (False, True)]
    assert_same_run(*runs)
    assert "label_smoothing_factor is set" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        train(tmp_path, True, label_smoothing_factor=0.1, liger_config={"strict": True})


def test_model_init_is_patched_each_time_and_printed_once(tmp_path, capsys):
    trainers = []
    for flag in (False, True):
        args = arguments(tmp_path, use_liger=flag, **SGD)
        trainers.append(Trainer(args=args, train_dataset=Rows(), model_init=lambda: tiny_model("llama")))
        first = trainers[-1].model
        trainers[-1].train()
        assert trainers[-1].model is not first
    assert patch_state(trainers[1].model).fused.calls_fused == 5
    assert capsys.readouterr().out.count("linear_cross_entropy") == 1
    assert_same_run(*trainers)


def test_checkpoint_is_that_of_a_plain_model(tmp_path):
    trainer = train(tmp_path, True, **SGD, save_strategy="steps", save_steps=3)
    trainer.save_model(str(tmp_path / "final"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert plain.state_dict().keys() == tiny_model("llama").state_dict().keys()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name])
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert not any("liger" in key for key in config)

    resumed = Trainer(tiny_model("llama"), arguments(tmp_path, use_liger=True, **SGD), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(losses(resumed)[3:], losses(trainer)[3:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, tmp_path):
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same_run(train(tmp_path, False, **SGD), train(tmp_path, True, **SGD, **settings))


def test_callback_by_hand_with_stock_arguments(tmp_path):
    args = arguments(tmp_path, cls=TrainingArguments, **SGD)
    callback = LigerCallback({"rope": False})
    trainer = Trainer(tiny_model("llama"), args, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    assert "rope" not in patch_state(trainer.model).report.counts
    assert_same_run(train(tmp_path, False, **SGD), trainer)


def test_a_callback_by_hand_announces_loss_only_steps(monkeypatch):
    monkeypatch.setattr(Trainer, "prediction_step", inspect.unwrap(Trainer.prediction_step))
    LigerCallback()
    once = Trainer.prediction_step
    assert once is not inspect.unwrap(once)
    LigerCallback()
    assert Trainer.prediction_step is once


def test_labels_that_never_reach_the_model_are_noticed(tmp_path, caplog):
    def own_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    kwargs = {"trainer_kwargs": {"compute_loss_func": own_loss}}
    assert_same_run(train(tmp_path, False, **SGD, **kwargs), train(tmp_path, True, **SGD, **kwargs))
    assert "fused loss was not used" in caplog.text


def test_argument_errors(tmp_path):
    with pytest.raises(ValueError, match=r"use_liger=True and use_liger_kernel=True"):
        LigerTrainingArguments(str(tmp_path), use_liger=True, use_liger_kernel=True)
    with pytest.raises(ValueError, match=r"unknown key 'ropes' \(did you mean 'rope'\?\)"):
        LigerTrainingArguments(str(tmp_path), use_liger=True, liger_config='{"ropes": true}')
    with pytest.raises(ValueError, match=r"liger_config: got .*; must be None unless use_liger=True"):
        LigerTrainingArguments(str(tmp_path), liger_config={"rope": False})
    args = LigerTrainingArguments(str(tmp_path), use_liger=True, liger_config='{"rope": false}')
    assert args.to_dict()["liger_config"]["rope"] is False


def test_several_gpus_in_one_process_are_an_error(tmp_path):
    args = arguments(tmp_path, use_liger=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch"):
        LigerCallback().on_init_end(args, None, None, model=tiny_model("llama"))
