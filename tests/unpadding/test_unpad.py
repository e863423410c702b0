"""Padded batches that run as one row: the same numbers, in every model and with everything around it."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    MODEL_TYPES,
    SIDES,
    assert_same_training,
    loss_and_gradients,
    padded_batch,
    sdpa_model,
    tiny_config,
    tiny_model,
)
from torch import nn
from training import Rows, assert_same_run, train
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from liger_trainer import apply_liger, revert_liger
from liger_trainer.medusa.heads import MedusaConfig
from liger_trainer.medusa.model import MedusaModel
from liger_trainer.patching import patch_state
from liger_trainer.rules.unpad import unpadded_stack

with pytest.MonkeyPatch.context() as patch:  # it imports benchmarks, a checkout's folder that is not installed
    patch.syspath_prepend(str(Path(__file__).parents[2]))
    import survey

ALONE = {
    **dict.fromkeys(("rms_norm", "layer_norm", "rope", "glu", "attention", "fused_loss"), False), "padding_mask": False
}  # fmt: skip
OWN_ATTENTION = {"gptj", "codegen", "gemma2", "cohere", "gpt_oss"}  # no SDPA
FURTHER = ("lfm2", "bamba", "gpt_oss", "glm4_moe_lite", "qwen3_next", "falcon")  # of the survey's models


def model_of(model_type, **overrides):
    return (tiny_model if model_type in OWN_ATTENTION else sdpa_model)(model_type, **overrides)


def assert_unpadded(totals, times, rows=2):
    """The layers saw the real tokens, and at most one place before each row; on a CPU nothing is rounded up."""
    assert len(totals) == times
    assert all(real <= total <= real + rows for total, real in totals)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_same_loss_and_gradients(model_type, side, totals):
    model = model_of(model_type)
    inputs = padded_batch(SIDES[side])
    theirs = loss_and_gradients(model, inputs)
    report = apply_liger(model)
    assert report.counts["unpad"] == 1
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert_unpadded(totals, 1)
    revert_liger(model)
    assert_same_training(theirs, loss_and_gradients(model, inputs), 1e-7)
    assert_unpadded(totals, 1)


@pytest.mark.parametrize("labels_given", [True, False], ids=["labels", "own loss"])
@pytest.mark.parametrize("side", SIDES)
def test_the_first_token_of_a_left_padded_row_is_predicted(side, labels_given, totals):
    """Its loss needs the hidden state of the padding before it, whether or not the model is told the labels."""
    model = sdpa_model()
    inputs = padded_batch(SIDES[side])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def loss():
        model.train().zero_grad()
        if labels_given:
            value = model(**{**inputs, "labels": labels}).loss
        else:
            logits = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits
            value = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        value.backward()
        return value.detach(), {name: p.grad for name, p in model.named_parameters()}

    theirs = loss()
    apply_liger(model)
    assert_same_training(theirs, loss())
    assert_unpadded(totals, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs.update(position_ids=(torch.arange(11) * 2)[None].repeat(2, 1)),
        lambda inputs: inputs.update(position_ids=torch.arange(11)[None]),
        lambda inputs: inputs.update(inputs_embeds=torch.randn(2, 11, 64), input_ids=None),
        lambda inputs: inputs.update(output_hidden_states=True),
        lambda inputs: inputs.update(num_items_in_batch=torch.tensor(5)),
        lambda inputs: inputs.update(return_dict=False),
    ],
    ids=["positions", "one row of positions", "embeddings", "hidden states", "items", "tuple"],
)
def test_ways_to_call(change, totals):
    inputs = padded_batch(SIDES["left"])
    change(inputs)
    results = []
    for config in (None, {}):
        model = sdpa_model().train()
        if config is not None:
            apply_liger(model, config)
        output = model(**inputs)
        loss = output[0] if isinstance(output, tuple) else output.loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, output))
    assert_same_training(results[0][:2], results[1][:2])
    assert_unpadded(totals, 1)
    if inputs.get("output_hidden_states"):
        real = inputs["attention_mask"] != 0
        for theirs, ours in zip(*(result[2].hidden_states for result in results), strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "inputs",
    [
        {"use_cache": True},
        {"output_attentions": True},
        {"labels": torch.zeros(2, 11, dtype=torch.long)},
        {"attention_mask": torch.tensor([[1] * 11, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]])},
        {"attention_mask": torch.ones(2, 11, dtype=torch.long)},
    ],
    ids=["cache", "attentions", "labelled padding", "gap", "full"],
)
def test_batches_that_stay_padded(inputs, totals):
    inputs = {**padded_batch(SIDES["right"]), **inputs}
    model = tiny_model("llama", attn_implementation="eager")
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model)
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert not totals
    assert model(**inputs).past_key_values.get_seq_length() == 11


def test_evaluation_is_padded_where_logits_may_be_read(totals):
    model = sdpa_model()
    inputs = padded_batch(SIDES["left"])
    with torch.no_grad():
        theirs = model.eval()(**inputs)
        apply_liger(model)
        ours = model(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    assert not totals


@pytest.mark.parametrize("side", SIDES)
def test_sequence_classifiers_in_training_and_evaluation(side, totals):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("qwen3", num_labels=3))
    inputs = {**padded_batch(SIDES[side]), "labels": torch.tensor([0, 2])}
    odd = dict(inputs)  # what is padding by the mask has other ids than padding's: the model reads it
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    theirs, theirs_odd = loss_and_gradients(model, inputs), loss_and_gradients(model, odd)
    logits = model.eval()(**inputs).logits
    apply_liger(model)
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    torch.testing.assert_close(model.eval()(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    assert_unpadded(totals, 2)
    assert_same_training(theirs_odd, loss_and_gradients(model, odd))
    assert_unpadded(totals, 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_medusa_heads_predict_from_further_before_a_row(stage, totals):
    inputs = padded_batch(lambda mask: mask[1, :9].zero_())
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    results = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = MedusaModel.from_causal_lm(sdpa_model(), MedusaConfig(heads=3, stage=stage))
        if patched:
            apply_liger(model)
        results.append(loss_and_gradients(model, inputs))
    assert_same_training(*results)
    assert_unpadded(totals, 1, rows=4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gptj", "bamba", "jamba"])
def test_activation_checkpointing(model_type, reentrant, totals):
    inputs = padded_batch(SIDES["left"])
    results = []
    for patched in (False, True):
        model = model_of(model_type) if model_type in MODEL_TYPES else zoo_model(model_type)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if patched:
            apply_liger(model)
        # Two batches of different shapes are alive at once, so recomputation has to find its own rows.
        other = {name: value[:, 2:] for name, value in padded_batch(SIDES["right"]).items()}
        model.train()
        loss = model(**inputs).loss + model(**other).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_same_training(*results)
    assert_unpadded(totals, 2)


def test_lora_and_two_threads_of_models(totals):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj", "gate_proj"])
    inputs = padded_batch(SIDES["both"])
    results = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(sdpa_model(), lora)
        if patched:
            apply_liger(model)
        results.append(loss_and_gradients(model, inputs))
    assert_same_training(*results)
    assert_unpadded(totals, 1)


class Leaky(nn.Module):
    """An MLP that lets each token see its left neighbour, across rows if they are joined."""

    def __init__(self, mlp, strength):
        super().__init__()
        self.mlp, self.strength = mlp, strength

    def forward(self, hidden):
        return self.mlp(hidden) + self.strength * nn.functional.pad(hidden, (0, 0, 1, -1))


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_a_leak_between_rows_is_caught_before_a_step(strength, totals, caplog):
    model = sdpa_model()
    model.model.layers[1].mlp = Leaky(model.model.layers[1].mlp, strength)
    inputs = padded_batch(SIDES["right"])
    theirs = loss_and_gradients(model, inputs)
    report = apply_liger(model)
    assert report.counts["unpad"] == 1
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert not totals
    assert "unpad" not in report.counts
    [reason] = [record.reason for record in report.skipped if record.kind == "unpad"]
    assert "rows" in reason
    assert "does not act" in caplog.text


def not_causal(model):
    """With a padded batch, transformers' mask is causal all the same."""
    model.model.layers[0].self_attn.is_causal = False


def leaky(model):
    model.model.layers[0].mlp = Leaky(model.model.layers[0].mlp, 1.0)


@pytest.mark.parametrize("change", [leaky, not_causal])
def test_a_change_of_the_model_is_checked_again(change, totals):
    model = sdpa_model()
    apply_liger(model)
    inputs = padded_batch(SIDES["right"])
    loss_and_gradients(model, inputs)
    assert_unpadded(totals, 1)
    change(model)
    ours = loss_and_gradients(model, inputs)
    revert_liger(model)
    assert_same_training(loss_and_gradients(model, inputs), ours)
    assert len(totals) == 1 + (change is not_causal)


class Penalised(LlamaForCausalLM):
    """A user's model, whose loss has a term of all logits."""

    def forward(self, labels=None, **kwargs):
        out = super().forward(labels=labels, **kwargs)
        out.loss = out.loss + 0.1 * out.logits.float().logsumexp(-1).square().mean()
        return out


@pytest.mark.parametrize("reader", ["class", "loss function"])
def test_code_of_the_user_that_reads_logits_at_padding(reader, totals):
    """Both were patched for un-padding once, and then read zeros at padding."""
    model, inputs = sdpa_model(), padded_batch(SIDES["right"])
    if reader == "class":
        model.__class__ = Penalised
    report = apply_liger(model)
    if reader == "loss function":
        model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()
    assert ("unpad" in report.counts) == (reader == "loss function")
    ours = loss_and_gradients(model, inputs)
    revert_liger(model)
    if reader == "loss function":
        model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()
    assert_same_training(loss_and_gradients(model, inputs), ours)
    assert not totals


def test_hooks_inside_of_the_stack_see_the_batch(totals):
    model = sdpa_model()
    apply_liger(model)
    shapes = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    inputs = padded_batch(SIDES["right"])
    loss_and_gradients(model, inputs)
    assert shapes == [(2, 11, 64)]
    assert not totals
    handle.remove()
    loss_and_gradients(model, inputs)
    assert_unpadded(totals, 1)


def test_the_check_changes_nothing(totals):
    """It takes no random numbers, and the modes stay."""
    model = sdpa_model(attention_dropout=0.5)
    apply_liger(model)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    unpadded = unpadded_stack(model)
    inputs = padded_batch(SIDES["right"])
    stack = model.model
    assert unpadded._fits(type(stack).forward, stack, {k: v for k, v in inputs.items() if k != "labels"})
    assert not any(acted.on for kinds in patch_state(model).acted.values() for acted in kinds)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_copies_un_pad_by_themselves(totals):
    model = sdpa_model()
    apply_liger(model)
    inputs = padded_batch(SIDES["right"])
    theirs = loss_and_gradients(model, inputs)
    copied = copy.deepcopy(model)
    assert_same_training(theirs, loss_and_gradients(copied, inputs))
    assert_unpadded(totals, 2)
    assert unpadded_stack(copied) is not unpadded_stack(model)


def test_a_window_of_which_attention_is_not_told_limits_rows(monkeypatch, totals):
    """Rows longer than the window stay padded, since only the batch's own mask knows it."""
    model = sdpa_model("mistral", sliding_window=4)
    inputs = padded_batch(SIDES["right"])
    theirs = loss_and_gradients(model, inputs)
    apply_liger(model, ALONE)
    assert_same_training(theirs, loss_and_gradients(model, inputs))
    assert_unpadded(totals, 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_trainer_runs_are_the_same(model_type, side, tmp_path, totals):
    runs = [train(tmp_path, flag, model_type, ragged(side, model_type)) for flag in (False, True)]
    assert_same_run(*runs)
    assert_unpadded(totals, 5)
    assert patch_state(runs[1].model).report.ran["unpad"] == 5
    shares = [entry["padding_removed"] for entry in runs[1].state.log_history if "loss" in entry]
    assert all(0.1 < share < 0.9 for share in shares)


@pytest.mark.long
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "model_type", [*MODEL_TYPES, "lfm2", "bamba", "gpt_oss", "glm4_moe_lite", "qwen3_next", "falcon"]
)
def test_trainer_runs_of_25_architectures(model_type, side, tmp_path, totals):
    runs = []
    for flag in (False, True):
        model = zoo_model(model_type)
        # SGD, because AdamW makes steps of full size from the noise in gradients that are zero, as those of key biases.
        sgd = {"optim": "sgd", "learning_rate": 0.1}
        runs.append(train(tmp_path, flag, dataset=ragged(side, model_type), model=model, **sgd))
    assert_same_run(*runs)
    assert_unpadded(totals, 5)


def zoo_model(model_type):
    if model_type in MODEL_TYPES:
        return tiny_model(model_type)
    return survey.tiny_model(model_type)


def ragged(side, model_type):
    """Rows of 2 to 12 tokens, padded to 12. Eager attention looks at padding to predict a left-padded row's first."""
    rows, first = Rows(), int(model_type in OWN_ATTENTION)
    for i, row in enumerate(rows.rows):
        padding = slice(2 + 5 * i % 11, None) if side == "right" else slice(None, 10 - 5 * i % 11)
        row["attention_mask"][padding] = 0
        row["labels"][padding] = -100
        if side == "left":
            row["labels"][: 10 - 5 * i % 11 + first] = -100
    return rows
