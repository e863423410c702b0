"""Right padding needs no mask in causal attention, where no token sees what comes after it.

A mask makes SDPA compute the whole square of scores where the causal half would do, and transformers repeat keys and
values for each query head. With padding on the right only, causal attention and no label at padding, the loss and its
gradients are the same without it: padded positions get other hidden states, and nothing depends on those.

Whether a batch is like that is read off it at each training forward, for which the host waits once. transformers' own
look at a mask falls away; without a cache it looks at the positions instead. Where nothing can be read (in a compiled
or traced forward, in a captured graph) masks stay.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from ..head.fused_head import IGNORE_INDEX, why_other_loss
from ..probing.rebinding import forward_function

# What the forward may be called with: other arguments might say where tokens are, or ask for hidden states.
HARMLESS_ARGUMENTS = {
    "input_ids", "inputs_embeds", "attention_mask", "labels", "num_items_in_batch", "use_cache", "return_dict",
    "fused_lm_head",
}  # fmt: skip
HIDDEN_STATES = ("output_hidden_states", "output_attentions")
DENSE_MASKS = ("sdpa", "eager")  # implementations whose masks only cost time; others leave padding out by them
NOT_CAUSAL = "not all of its attention says that it is causal"
PACKAGES = {"builtins", "abc", "typing", "torch", "transformers", "peft"}  # whose modules are known


def why_masks_stay(core: nn.Module) -> str | None:
    """Why padding masks cannot be left out of ``core``'s training forward, or None where they can."""
    if not isinstance(core, PreTrainedModel):
        return "it is no model of transformers: what else it does with a mask is not known"
    for module in core.modules():
        if not isinstance(module, nn.Linear) and not _is_known(type(module)):
            return f"what {type(module).__name__} does with a mask is not known"
    attentions = [module for module in core.modules() if hasattr(module, "is_causal")]
    if core.config.is_encoder_decoder or not attentions or not all(module.is_causal for module in attentions):
        return NOT_CAUSAL
    implementation = core.config.get_text_config()._attn_implementation
    if implementation not in DENSE_MASKS:
        return f"{implementation} attention leaves padding out by the mask"
    if any(map(_has_dropout, attentions)):
        return "its attention has dropout, whose random numbers depend on the mask"
    if _warns_without_mask(core.base_model):
        return "it warns of padding that has no mask"
    if core.get_output_embeddings() is None:
        return "it has no output embeddings, and what its loss is made of is not known"
    return _why_mask_stays_now(core)


def _is_known(cls: type) -> bool:
    return all(base.__module__.partition(".")[0] in PACKAGES for base in cls.__mro__)


def _has_dropout(attention: nn.Module) -> bool:
    """Whether its own dropout has a rate that is not zero, by whatever name; LoRA's is in its projections."""
    rates = [value for name, value in vars(attention).items() if "drop" in name and isinstance(value, float)]
    return any(rates) or any(child.p for child in attention.children() if isinstance(child, nn.Dropout))


def _warns_without_mask(module: nn.Module) -> bool:
    function = forward_function(module)
    return function is not None and "warn_if_padding_and_no_attention_mask" in function.__code__.co_names


def _why_mask_stays_now(core: nn.Module) -> str | None:
    """Reasons that can come and go with settings, so that each forward asks again."""
    configs = (core.config, core.config.get_text_config())
    if not all(getattr(config, "is_causal", True) for config in configs):
        return NOT_CAUSAL
    if any(getattr(config, "output_router_logits", False) for config in configs):
        return "its router's loss leaves padding out by the mask"
    if any(getattr(config, name, False) for config in configs for name in HIDDEN_STATES):
        return "its hidden states are returned, those of padding, too"
    return why_other_loss(core)


def leave_out_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook: the same arguments without ``attention_mask``, where it changes neither loss nor gradients."""
    mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    if args or not module.training or not torch.is_tensor(mask) or not torch.is_tensor(labels):
        return None
    if _cannot_be_read(mask) or _cannot_be_read(labels):
        return None
    if not all(map(_is_harmless, kwargs, kwargs.values())) or mask.dim() != 2 or mask.shape != labels.shape:
        return None
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if positions and mask.shape[1] > positions:  # OPT has none for padding beyond
        return None
    if _why_mask_stays_now(module) is not None:
        return None
    return (args, {**kwargs, "attention_mask": None}) if _is_right_padding(mask, labels) else None


def _is_harmless(name: str, value) -> bool:
    return name in HARMLESS_ARGUMENTS or value is None or (name in HIDDEN_STATES and value is False)


def _cannot_be_read(tensor: Tensor) -> bool:
    """Whether a look at its values is an error, or would be taken for all later ones."""
    return is_tracing(tensor) or tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_right_padding(mask: Tensor, labels: Tensor) -> bool:
    held = mask != 0
    gaps = held[:, 1:] & ~held[:, :-1]
    labelled = ~held & (labels != IGNORE_INDEX).to(mask.device)
    return not bool(gaps.any() | labelled.any())
