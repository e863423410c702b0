"""Rule for activation checkpointing by memory: each batch recomputes as many layers as it must, and no more.

What decides is in ``liger_trainer/memory/``. This rule finds the layers that transformers can checkpoint one by one.
"""

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import LigerConfig
from ..kernels.linear_loss.options import MemoryOptions
from ..memory import card
from ..memory.recompute import Recompute
from ..probing.rebinding import ModuleRef
from ..probing.rule import Acted, Match, Rule, Skip
from .unpad import stack_name

VARIANT = "layers recompute only as far as memory requires"


def matches(model: nn.Module) -> bool:
    """Models that may run on a GPU. Elsewhere there is no budget."""
    return card.has_cards()


def layers_of(model: Any) -> list[nn.Module]:
    """The longest list of layers of the decoder stack that transformers can checkpoint one by one."""
    stack = model.get_submodule(stack_name(model))
    lists = [[*m] for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max((found for found in lists if all(map(_is_layer, found))), key=len, default=[])


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def probe(model: nn.Module, config: LigerConfig) -> Match:
    """The forwards of all layers."""
    if not isinstance(model, PreTrainedModel):
        raise Skip("it is not a transformers model")
    if model.config.is_encoder_decoder:
        raise Skip("its encoder and decoder take turns")
    layers = layers_of(model)
    if not layers:
        raise Skip("it has no list of layers that can be checkpointed one by one")
    acted = Acted()
    of_head = MemoryOptions(config.logits_budget_mib, config.low_memory)
    recompute = Recompute(ModuleRef(model), acted, len(layers), config.memory_margin, of_head)
    return Match(
        "recompute",
        VARIANT,
        wraps=tuple(
            (layer, functools.partial(recompute.wrap, index, type(layer).forward)) for index, layer in enumerate(layers)
        ),
        before=recompute.before_forward,
        after=recompute.after_forward,
        acted=acted,
    )


RULES = (Rule(("recompute",), matches, probe, key=id, whole_model=True, per_batch=True),)
