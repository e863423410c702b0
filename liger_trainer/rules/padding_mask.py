"""Rule for padding masks: causal attention does not need one if all padding is on the right.

With a mask, SDPA computes the whole square of scores instead of the causal half, and transformers repeats keys and
values for each query head. In causal attention no token sees the tokens after it. So if padding is on the right and has
no labels, loss and gradients are the same without the mask. Hidden states at padding change, but nothing reads them.

A forward pre-hook reads mask and labels of each training batch, for which the host waits once. transformers then skips
its own check of the mask; without a cache it checks the positions instead. Masks stay where values cannot be read: in a
compiled or traced forward and in a captured graph.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import LigerConfig
from ..head.fused_head import check_loss_function
from ..probing.hooks import reader_of_outputs
from ..probing.probe import is_known, submodules
from ..probing.rebinding import forward_function
from ..probing.rule import Acted, Match, Rule, Skip
from ..unpadding.attention import IMPLEMENTATIONS
from ..unpadding.layout import read_mask
from ..unpadding.stack import cannot_be_read
from .unpad import unpadded_stack

# Arguments of a forward whose mask may be dropped. Others might say where tokens are, or ask for hidden states.
HARMLESS_ARGUMENTS = {
    "input_ids", "inputs_embeds", "attention_mask", "labels", "num_items_in_batch", "use_cache", "return_dict",
    "fused_lm_head",
}  # fmt: skip
HIDDEN_STATES = ("output_hidden_states", "output_attentions")
NOT_CAUSAL = "not all of its attention says that it is causal"


def matches(model: nn.Module) -> bool:
    """Every model is a candidate, so the report says why masks stay."""
    return True


def probe(model: nn.Module, config: LigerConfig) -> Match:
    """The pre-hook that drops masks, for a model in which nothing else depends on them."""
    if not isinstance(model, PreTrainedModel):
        raise Skip("it is not a transformers model, so it is not known what else it does with a mask")
    for module in model.modules():
        if not isinstance(module, nn.Linear) and not is_known(type(module)):
            raise Skip(f"it is not known what {type(module).__name__} does with a mask")
    if model.config.is_encoder_decoder or not _attentions(model):
        raise Skip(NOT_CAUSAL)
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise Skip(f"{implementation} attention uses the mask to skip padding")
    if _warns_without_mask(model.base_model):
        raise Skip("it warns of padding that has no mask")
    if model.get_output_embeddings() is None:
        raise Skip("it has no output embeddings, so it is not known how its loss is computed")
    _check_settings(model)
    _check_attention(model)
    acted = Acted()
    before = functools.partial(_drop_mask, acted)
    return Match("padding_mask", "dropped where padding is on the right", before=before, acted=acted)


def _drop_mask(
    acted: Acted, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    unpadded = unpadded_stack(module)
    if unpadded is not None and unpadded.may_unpad():  # it reads the mask anyway
        unpadded.may_drop_mask.slot.value = functools.partial(_noted, acted, module, args, kwargs)
        return None
    changed = drop_mask(module, args, kwargs)
    if changed is not None:
        acted.note()
    return changed


def _noted(acted: Acted, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> bool:
    """``may_drop``; if so, note that the mask is dropped."""
    drops = may_drop(module, args, kwargs)
    if drops:
        acted.note()
    return drops


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The modules that say whether they are causal."""
    return [m for m in submodules(model) if "is_causal" in m.__dict__ or _says_causal(type(m))]


@functools.cache
def _says_causal(cls: type) -> bool:
    return hasattr(cls, "is_causal")


def _check_attention(model: nn.Module) -> None:
    """Check the attention modules, which may also change later.

    Raises:
        Skip: One of them needs the mask.
    """
    attentions = _attentions(model)
    if not all(module.is_causal for module in attentions):
        raise Skip(NOT_CAUSAL)
    if any(map(_has_dropout, attentions)):
        raise Skip("its attention has dropout, whose random numbers depend on the mask")


def _has_dropout(attention: nn.Module) -> bool:
    """Whether its own dropout, by whatever name, has a rate above zero; LoRA's dropout is in its projections."""
    if any(value and "drop" in name and isinstance(value, float) for name, value in attention.__dict__.items()):
        return True
    return any(child.p for child in attention._modules.values() if isinstance(child, nn.Dropout))


def _warns_without_mask(module: nn.Module) -> bool:
    function = forward_function(module)
    return function is not None and "warn_if_padding_and_no_attention_mask" in function.__code__.co_names


def _check_settings(model: PreTrainedModel) -> None:
    """Check the settings that may change later, so each forward checks them again.

    Raises:
        Skip: One of them needs the mask.
    """
    configs = (model.config, model.config.get_text_config())
    if not all(getattr(config, "is_causal", True) for config in configs):
        raise Skip(NOT_CAUSAL)
    if any(getattr(config, "output_router_logits", False) for config in configs):
        raise Skip("its router's loss uses the mask to skip padding")
    if any(getattr(config, name, False) for config in configs for name in HIDDEN_STATES):
        raise Skip("it returns its hidden states, including the padding's")
    check_loss_function(model)


def drop_mask(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: the arguments without ``attention_mask`` if loss and gradients are the same without it."""
    if not may_drop(module, args, kwargs):
        return None
    lengths = read_mask(kwargs["attention_mask"], kwargs["labels"])
    drops = lengths is not None and lengths.are_padded_right()
    return (args, {**kwargs, "attention_mask": None}) if drops else None


def may_drop(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the mask makes no difference if all padding is on the right and has no labels."""
    mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    if args or not module.training or not torch.is_tensor(mask) or not torch.is_tensor(labels):
        return False
    if reader_of_outputs(module) is not None:  # of logits at padding, for instance
        return False
    if cannot_be_read(mask) or cannot_be_read(labels):
        return False
    if not all(map(_is_harmless, kwargs, kwargs.values())) or mask.dim() != 2 or mask.shape != labels.shape:
        return False
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if positions and mask.shape[1] > positions:  # OPT has no embedding for padding beyond its table
        return False
    try:
        _check_settings(module)
        _check_attention(module)
    except Skip:
        return False
    return True


def _is_harmless(name: str, value: Any) -> bool:
    return name in HARMLESS_ARGUMENTS or value is None or (name in HIDDEN_STATES and value is False)


RULES = (Rule(("padding_mask",), matches, probe, key=id, whole_model=True, per_batch=True),)
