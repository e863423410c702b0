"""Tiny models with LoRA adapters, and what the tests of the rule do with them."""

import torch
from model_pair import gradients
from peft import LoraConfig, get_peft_model
from tiny_models import batch, tiny_model

from liger_trainer.patching import patch_state

TARGETS = ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**options):
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 3, "target_modules": TARGETS, "init_lora_weights": False} | options
    )


def wrapped(model_type="qwen2", **options):
    """A tiny model of one layer, whose q and k have biases, with random adapters."""
    model = tiny_model(model_type, num_hidden_layers=1)
    return get_peft_model(model, lora(**options)).train()


def step(model, inputs=None):
    """Loss and gradients of one training forward."""
    model.zero_grad()
    loss = model(**(inputs or batch())).loss
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def layers_of(report):
    """How many LoRA layers are ours; modules in which some of them are one op do not count."""
    return sum(record.kind == "lora" and "as one op" not in record.variant for record in report.applied)


def acts(model):
    """Whether the op runs in a forward of ``model``."""
    state = patch_state(model)
    state.forget_acted()
    with torch.no_grad():
        model(**batch())
    return any(acted.on for acted in state.acted.get("lora", []))


def a_layer(model):
    return next(m for n, m in model.named_modules() if n.endswith("q_proj"))
