"""What the probe of the head finds in a model's own forward, and what it leaves to the ordinary path."""

import pytest
import torch
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_config, tiny_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from liger_trainer import apply_liger
from liger_trainer.config import KINDS
from liger_trainer.head.form import probe_head


class AddsTerm(LlamaForCausalLM):
    """Changes the loss by its logits after ``loss_function``."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = self.change(out.loss, out.logits)
        return out


class ZLoss(AddsTerm):
    change = staticmethod(lambda loss, logits: loss + 0.1 * logits.float().logsumexp(-1).square().mean())


class Penalty(AddsTerm):
    change = staticmethod(lambda loss, logits: loss + 0.1 * logits.square().sum())


class Gated(AddsTerm):
    change = staticmethod(lambda loss, logits: loss * 2 if logits.max() > 0 else loss)


class Own(LlamaForCausalLM):
    """Gives the loss function arguments of its own."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.project(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)
        args, more = self.arguments(labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, *args, **more), logits=logits)

    def project(self, hidden):
        return self.lm_head(hidden)


class OwnIgnoreIndex(Own):
    def arguments(self, labels, num_items):
        return (), {"vocab_size": 131, "ignore_index": self.config.pad_token_id}


class OwnCount(Own):
    def arguments(self, labels, num_items):
        return (), {"vocab_size": 131, "num_items_in_batch": labels.shape[0]}


class PositionalCount(Own):
    def arguments(self, labels, num_items):
        return (131, labels.shape[0]), {}


class ChangedCount(Own):
    def arguments(self, labels, num_items):
        return (131,), {"num_items_in_batch": None if num_items is None else 2 * num_items}


class OwnShift(Own):
    def arguments(self, labels, num_items):
        return (131,), {"shift_labels": labels}


class CountsLabels(Own):
    def arguments(self, labels, num_items):
        return (131,), {"num_items_in_batch": (labels != -100).sum() if bool((labels == -100).any()) else None}


class LearnedScale(Own):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def arguments(self, labels, num_items):
        return (131,), {}

    def project(self, hidden):
        return self.lm_head(hidden) * self.scale


REASONS = {
    ZLoss: "adds a term of the logits to the loss", Penalty: "adds a term of the logits", Gated: "reads the logits",
    OwnIgnoreIndex: "ignore_index of its own", OwnCount: "num_items_in_batch of its own",
    PositionalCount: "num_items_in_batch of its own", ChangedCount: "changes num_items_in_batch",
    LearnedScale: "scales them by a tensor", OwnShift: "shift_labels of its own",
    CountsLabels: "num_items_in_batch of its own",
}  # fmt: skip


@pytest.mark.parametrize("cls", REASONS)
def test_a_forward_that_does_more_than_the_fused_loss_is_skipped(cls):
    torch.manual_seed(0)
    model, inputs = cls(tiny_config("llama")), batch(ignored=0.0) | {"num_items_in_batch": torch.tensor(9)}
    theirs = loss_and_gradients(model, inputs)
    (reason,) = (s.reason for s in apply_liger(model).skipped if s.kind == "fused_loss")
    assert REASONS[cls] in reason
    assert_same_training(theirs, loss_and_gradients(model, inputs))


def test_terms_that_do_not_read_the_logits_are_fine():
    class Doubled(AddsTerm):
        change = staticmethod(lambda loss, logits: 2 * loss + 1)

    model, inputs = Doubled(tiny_config("llama")), batch()
    theirs = loss_and_gradients(model, inputs)
    assert apply_liger(model).counts["fused_loss"] == 1
    assert_same_training(theirs, loss_and_gradients(model, inputs))


def test_arguments_that_depend_on_the_batch_are_an_error():
    class LateCount(Own):
        def arguments(self, labels, num_items):
            return (131,), {"num_items_in_batch": num_items if labels.shape[1] < 10 else 5}

    model = LateCount(tiny_config("llama"))
    assert apply_liger(model).counts["fused_loss"] == 1
    with pytest.raises(ValueError, match=r"num_items_in_batch: got another value in loss_function.*fused_loss: false"):
        loss_and_gradients(model, batch())


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", []),
        ("gemma2", [(("config",), "final_logit_softcapping", 2.0)]),
        ("gemma3_text", [(("config",), "final_logit_softcapping", 1.5)]),
        ("granite", [(("config",), "logits_scaling", 8.0)]),
        ("cohere", [((), "logit_scale", 0.25)]),
        ("falcon_h1", [(("model",), "lm_head_multiplier", 1.0)]),
    ],
)
def test_the_settings_behind_scale_and_softcap_are_found(model_type, settings):
    model = tiny_model(model_type)
    assert [tuple(setting) for setting in probe_head(model, "lm_head", model.lm_head).settings] == settings


def test_hooks_do_not_fire_on_the_probes_numbers():
    class WithDropout(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.dropout = nn.Sequential(nn.Dropout(0.0))

        def forward(self, input_ids=None, labels=None, **kwargs):
            hidden = self.dropout(self.model(input_ids).last_hidden_state)
            logits = self.lm_head(hidden)
            return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, vocab_size=131), logits=logits)

    model, fired = WithDropout(tiny_config("llama")), []
    for module in model.modules():
        if module is not model.lm_head:
            module.register_forward_hook(lambda module, args, out: fired.append(type(module).__name__))
    others = {kind: False for kind in KINDS if kind != "fused_loss"} | {"recompute": "all"}
    assert apply_liger(model, others).counts == {"fused_loss": 1}
    assert not fired
