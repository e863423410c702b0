"""Which children a forward calls on one input, from its source."""

import functools

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from liger_trainer.probing.shared_inputs import shared_inputs


class Forms(nn.Module):
    """Methods, each with the groups that it has."""

    def chained(self, x, y):
        return self.a(self.b(x)) + self.c(x).view(-1) + self.d(y)  # [b, c]

    def assigned(self, x):
        q = self.a(x)
        x = x + 1
        return q + self.b(x)

    def conditional(self, x, flag):
        q = self.a(x) if flag else None
        if flag:
            return self.b(x)
        return [self.c(x) for _ in range(2)], q, flag and self.d(x), lambda: self.e(x)

    def early(self, x, flag):
        q = self.a(x)
        if flag:
            return q
        return q + self.b(x)

    def guarded(self, x):
        if x is None:
            raise ValueError
        return self.a(x) + self.b(x)  # [a, b]

    def twice(self, x):
        return self.a(x) + self.a(x) + self.b(x)

    def other_arguments(self, x):
        return self.a(x, 1) + self.b(x, scale=2) + self.c(x + 1) + x.d(x)


def test_groups():
    assert shared_inputs(Forms.chained) == (("b", "c"),)
    assert shared_inputs(Forms.guarded) == (("a", "b"),)
    for function in (Forms.assigned, Forms.conditional, Forms.early, Forms.twice, Forms.other_arguments):
        assert shared_inputs(function) == ()
    assert shared_inputs(eval("lambda self, x: self.a(x) + self.b(x)")) == ()
    assert shared_inputs(functools.partial(Forms.chained)) == ()


def test_models():
    assert shared_inputs(LlamaAttention.forward) == (("q_proj", "k_proj", "v_proj"),)
    assert shared_inputs(Qwen3Attention.forward) == (("q_proj", "k_proj", "v_proj"),)
    assert shared_inputs(LlamaMLP.forward) == (("gate_proj", "up_proj"),)
