"""Rule for the fused loss: ``lm_head`` computes the causal-LM loss, and the logits are never materialised.

What is replaced is in ``liger_trainer/head/``; this rule decides whether it fits a model.
"""

from torch import nn
from transformers import PreTrainedModel

from ..config import LigerConfig
from ..head.form import HeadForm, probe_head
from ..head.fused_head import FusedHead, check_loss_function, check_weights, has_hooks_on_logits, head_linears
from ..probing.probe import name_in
from ..probing.rebinding import free_attribute
from ..probing.rule import Match, Rule, Skip


def matches(model: nn.Module) -> bool:
    """Every model is a candidate, so the report says why the fused loss is missing."""
    return True


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def head_name(model: nn.Module) -> str:
    """Name of the output embeddings in ``model``; empty if there are none."""
    return name_in(model, _head(model))


def probe(model: nn.Module, config: LigerConfig) -> Match:
    """The replacement of ``lm_head.forward`` and of the loss function."""
    causal_lm, form, places = probe_places(model, with_loss=True)
    fused = FusedHead(causal_lm, form, config.options_of("fused_loss"))
    heads = [(linear, place, fused.head_forward) for linear, place in places]
    return Match(
        "fused_loss",
        str(form),
        attributes=(*heads, (model, "_loss_function", fused.loss_function)),
        before=fused.before_forward,
        after=fused.after_forward,
        acted=fused.acted,
    )


def probe_places(
    model: nn.Module, with_loss: bool = False
) -> tuple[PreTrainedModel, HeadForm, list[tuple[nn.Linear, str]]]:
    """``(model, form of its logits, (linear, attribute to set) of each lm_head)``, if the head may be replaced.

    ``with_loss`` also checks the model's loss function.

    Raises:
        Skip: It may not.
    """
    head = _head(model)
    if head is None or not isinstance(model, PreTrainedModel):
        raise Skip("it has no output embeddings")
    linears = head_linears(model)
    places = [_place(model, linear) for linear in linears]
    tp_size = getattr(model, "tp_size", None) or 1
    if tp_size > 1:
        raise Skip(f"its weights are tensor-parallel (tp_size {tp_size}), and a vocabulary-sharded head is not fused")
    name = head_name(model)
    if "." in name:
        raise Skip(f"its output embeddings are nested ({name})")
    if with_loss:  # before the probe, whose reason would differ on the meta device
        check_loss_function(model)
    return model, probe_head(model, name, linears[0]), list(zip(linears, places, strict=True))


def _place(model: PreTrainedModel, linear: nn.Module) -> str:
    """The attribute to set on ``linear``, a plain Linear.

    Raises:
        Skip: It is not plain, or its forward is taken.
    """
    if has_hooks_on_logits(model, linear):
        raise Skip("it has hooks on its output, which the fused loss does not compute")
    if hasattr(linear, "base_layer"):
        raise Skip(f"it carries an adapter ({type(linear).__module__.split('.')[-2]}): ordinary path")
    if type(linear).forward is not nn.Linear.forward:
        raise Skip(f"its forward is {type(linear).__qualname__}'s, not torch.nn.Linear's")
    check_weights(model, linear)
    return free_attribute(linear, "forward")


RULES = (Rule(("fused_loss",), matches, probe, key=id, whole_model=True, part=head_name),)
