"""Right padding needs no mask in causal attention, where no token sees what comes after it.

A mask makes SDPA compute the whole square of scores where the causal half would do, and transformers repeat keys and
values for each query head. With padding on the right only, causal attention and no label at padding, the loss and its
gradients are the same without it: padded positions get other hidden states, and nothing depends on those.

Whether a batch is like that is read off it at each training forward. That makes the host wait once, as transformers'
own look at a mask does, which falls away. In a compiled forward nothing can be read, and masks stay.
"""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedConfig, PreTrainedModel

from .fused_head import IGNORE_INDEX, why_other_loss

# What the forward may be called with: other arguments might say where tokens are, or ask for hidden states.
KNOWN = {
    "input_ids", "inputs_embeds", "attention_mask", "labels", "num_items_in_batch", "use_cache", "return_dict",
    "fused_lm_head",
}  # fmt: skip
NEED_NO_MASK = ("sdpa", "eager")  # others leave padding out by it


def why_masks_stay(core: nn.Module) -> str | None:
    """Why padding masks cannot be left out of ``core``'s training forward, or None where they can."""
    if not isinstance(core, PreTrainedModel) or type(core).__module__.partition(".")[0] != "transformers":
        return "it is no model of transformers: what else it does with a mask is not known"
    config = core.config.get_text_config()
    says_so = all(getattr(each, "is_causal", True) for each in (core.config, config))  # a config can turn it off
    attentions = [module for module in core.modules() if hasattr(module, "is_causal")]
    causal = says_so and bool(attentions) and all(module.is_causal for module in attentions)
    if core.config.is_encoder_decoder or not causal:
        return "not all of its attention says that it is causal"
    if config._attn_implementation not in NEED_NO_MASK:
        return f"{config._attn_implementation} attention leaves padding out by the mask"
    if any(map(_has_dropout, attentions)):
        return "its attention has dropout, whose random numbers depend on the mask"
    if _has_router_loss(config):
        return "its router's loss leaves padding out by the mask"
    if core.get_output_embeddings() is None:
        return "it has no output embeddings, and what its loss is made of is not known"
    return why_other_loss(core)


def _has_router_loss(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "output_router_logits", False))


def _has_dropout(module: nn.Module) -> bool:
    """Whether the module, or a ``nn.Dropout`` in it, has a dropout rate that is not zero, by whatever name."""
    rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return any(rates) or any(child.p for child in module.modules() if isinstance(child, nn.Dropout))


def leave_out_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook: the same arguments without ``attention_mask``, where it changes neither loss nor gradients."""
    mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    if args or not module.training or not torch.is_tensor(mask) or not torch.is_tensor(labels):
        return None
    if torch.compiler.is_compiling() or isinstance(mask, FakeTensor) or mask.dim() != 2 or mask.shape != labels.shape:
        return None
    config = module.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if _has_router_loss(config) or (positions and mask.shape[1] > positions):  # OPT has none for padding beyond
        return None
    if any(name not in KNOWN and value is not None and value is not False for name, value in kwargs.items()):
        return None
    if why_other_loss(module):  # one that was set since may depend on logits without label
        return None
    return (args, {**kwargs, "attention_mask": None}) if _is_right_padding(mask, labels) else None


def _is_right_padding(mask: Tensor, labels: Tensor) -> bool:
    held = mask != 0
    gaps = held[:, 1:] & ~held[:, :-1]
    labelled = ~held & (labels != IGNORE_INDEX).to(mask.device)
    return not bool(gaps.any() | labelled.any())
