"""Tiny Medusa models and their inputs."""

import torch
from tiny_models import batch, tiny_model

from liger_trainer import MedusaConfig, MedusaModel, apply_liger


def medusa_model(model_type="llama", patched=False, head_loss=None, **settings):
    """A tiny LM with heads that are not all alike any more, as after some training."""
    lm = tiny_model(model_type)
    model = MedusaModel.from_causal_lm(lm, MedusaConfig(**settings), head_loss).train()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.medusa_heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if patched:
        assert not apply_liger(model).skipped
    return model


def inputs_of(kind):
    inputs = batch(rows=3, tokens=9)
    if kind == "ragged":
        for row, length in enumerate((9, 5, 3)):  # the last is too short for head 3, and has one label for head 1
            inputs["attention_mask"][row, length:] = 0
            inputs["labels"][row, length:] = -100
        inputs["labels"][:, :2] = -100
    elif kind == "short":
        inputs = {name: tensor[:, :3].clone() for name, tensor in inputs.items()}
        inputs["labels"] = inputs["input_ids"].clone()
    else:
        inputs["labels"].fill_(-100)
        inputs["num_items_in_batch"] = torch.tensor(1)  # without it, transformers' own loss is 0 / 0
    return inputs
