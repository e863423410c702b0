"""Medusa heads with what they are combined with: checkpointed heads, fp16, other LMs, packed rows, PEFT."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from medusa_models import inputs_of, medusa_model
from peft import LoraConfig, get_peft_model
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import set_checkpoint_early_stop
from training import Rows, arguments
from transformers import Trainer

from liger_trainer import MedusaConfig, MedusaModel, apply_liger
from liger_trainer.medusa import heads as medusa_heads
from liger_trainer.medusa import loss as medusa_loss
from liger_trainer.medusa.loss import plain_head_loss


def checkpointed(model, **settings):
    """Every head in a wrapper of its own, as accelerate makes them of ``_no_split_modules`` under FSDP2."""
    for k, head in enumerate(model.medusa_heads):
        model.medusa_heads[k] = checkpoint_wrapper(head, preserve_rng_state=False, **settings)
    return model


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_heads_that_run_again_in_backward(stage, patched, early_stop):
    """Under activation checkpointing of the heads, each one's share of the gradients still counts once."""
    inputs = inputs_of("ragged")
    expected = loss_and_gradients(medusa_model(heads=3, stage=stage), inputs)
    model = medusa_model(heads=3, stage=stage, patched=patched)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    checkpointed(model)
    for twice in (False, True):
        model.zero_grad()
        blocks = mock.patch.object(medusa_loss, "residual_blocks", wraps=medusa_loss.residual_blocks)
        with set_checkpoint_early_stop(early_stop), blocks as blocks:
            loss = model(**inputs).loss
            if twice:
                (0.25 * loss).backward(retain_graph=True)
            ((0.75 if twice else 1.0) * loss).backward()
        assert_same_training(expected, (loss.detach(), {n: p.grad for n, p in parameters.items()}))
        assert blocks.call_count == (3 * (2 + twice) if patched else 0)  # none to take the gradients in forward


@pytest.mark.parametrize("patched", [False, True])
def test_reentrant_checkpointing_of_heads_is_rejected(patched):
    model = checkpointed(medusa_model(heads=2, stage=2, patched=patched), checkpoint_impl=CheckpointImpl.REENTRANT)
    with pytest.raises(ValueError, match=r"use_reentrant=True: a Medusa head .* with use_reentrant=False"):
        model(**inputs_of("ragged"))
    with torch.no_grad():
        assert model(**inputs_of("ragged")).loss.isfinite()


def test_fp16_sums_over_many_tokens_stay_finite():
    """A channel far off and a label that always comes: the gradients' sums leave fp16's range, their means do not."""
    tokens = 64 * 256
    hidden = torch.randn(64, 256, 64, generator=torch.Generator().manual_seed(0))
    hidden[..., 3] += 30
    gradients = []
    for head_loss in (plain_head_loss, None):
        torch.manual_seed(0)
        heads = medusa_heads.MedusaHeads(0.5 * torch.randn(131, 64), MedusaConfig(heads=1))
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            loss, _ = heads(states, torch.full((64, 256), 5), torch.tensor(tokens), head_loss, {})
        (1024 * loss).backward()
        gradients.append({"hidden": states.grad} | {n: p.grad for n, p in heads.named_parameters()})
    plain, fused = gradients
    assert max(g.abs().max() for g in plain.values()) * tokens / 1024 > torch.finfo(torch.float16).max
    for name, gradient in plain.items():
        error = (fused[name] - gradient).norm() / gradient.norm()
        assert error < 1e-2, f"{name}: {error:.1e}"


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere"])  # soft-cap, division, factor
def test_heads_scale_and_cap_logits_as_the_lm_does(model_type):
    inputs = batch(rows=3, tokens=9)
    labels, results = inputs["labels"], []
    for patched in (False, True):
        model = MedusaModel.from_causal_lm(tiny_model(model_type), MedusaConfig(heads=2, stage=2)).train()
        if patched:
            assert any(done.kind == "fused_loss" for done in apply_liger(model).applied)
        results.append(loss_and_gradients(model, inputs))
        with torch.no_grad():  # every new head predicts what the LM does
            output = model(**inputs)
            logits = tiny_model(model_type).train()(inputs["input_ids"]).logits
        for k in (1, 2):
            loss = F.cross_entropy(logits[:, : -1 - k].flatten(0, 1), labels[:, 1 + k :].flatten(), reduction="sum")
            torch.testing.assert_close(output.head_losses[k - 1], loss / (labels[:, 1:] != -100).sum())
    assert_same_training(*results)
    model.head_loss = plain_head_loss
    with pytest.raises(ValueError, match=r"head_loss: got .*, whose logits have .*softcap.*; must be None"):
        model(**inputs)


def test_lms_of_which_no_heads_can_be_made(monkeypatch):
    with pytest.raises(ValueError, match="lm: got PhiForCausalLM, whose output embeddings have a bias; must have none"):
        MedusaModel.from_causal_lm(tiny_model("phi"), MedusaConfig())
    lm = tiny_model("llama")
    forward = type(lm).forward

    def shifted(self, *args, labels=None, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = self.loss_function(output.logits + 1 / (1 + output.logits**2), labels, None)
        return output

    monkeypatch.setattr(type(lm), "forward", shifted)
    with pytest.raises(ValueError, match=r"lm: .* as LlamaForCausalLM does: its logits go through more than"):
        MedusaModel.from_causal_lm(lm, MedusaConfig())


def test_a_plain_lm_is_no_medusa_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.medusa: got None from .*; must be .*from_causal_lm"):
        MedusaModel.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"call lm\.resize_token_embeddings before"):
        medusa_model().resize_token_embeddings(140)


def test_the_trainer_keeps_position_ids(tmp_path):
    """The Trainer drops columns that forward does not name; rows of two texts then train on other positions."""
    positions = torch.arange(6).repeat(2)
    rows = [{n: t.tolist() for n, t in row.items()} | {"position_ids": positions.tolist()} for row in Rows().rows]
    model = medusa_model(heads=2, stage=2)
    seen = []
    model.lm.model.register_forward_pre_hook(lambda m, a, inputs: seen.append(inputs["position_ids"]), with_kwargs=True)
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=Dataset.from_list(rows)).train()
    assert torch.equal(seen[0].cpu(), positions.expand(2, -1))


@pytest.mark.parametrize("stage", [1, 2])
def test_embeddings_in_the_place_of_ids(stage):
    inputs = inputs_of("ragged")
    model = medusa_model("llama", heads=2, stage=stage)
    expected = model(**inputs).loss
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeddings, **inputs).loss, expected)


def test_adapters_on_the_lm_and_whole_heads_beside_them():
    inputs = inputs_of("ragged")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["medusa_heads.0", "medusa_heads.1"])
    results = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(medusa_model("llama", heads=2, stage=2), config)
        if patched:
            assert not apply_liger(model).skipped
        results.append(loss_and_gradients(model, inputs))
    assert_same_training(*results)
    trained = {name.split(".")[2] for name in results[1][1]}
    assert trained == {"lm", "medusa_heads"}
