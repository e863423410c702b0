"""LoRA layers that read one input are one op."""

import copy

import pytest
import torch
from lora_models import lora
from peft import inject_adapter_in_model
from torch import nn

from liger_trainer import apply_liger, revert_liger
from liger_trainer.rules import lora as lora_rule


class Reads(nn.Module):
    """Three layers that read one input, which ``between`` may change."""

    def __init__(self, between=id):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(8, 5), nn.Linear(8, 4, bias=False)
        self.between = between

    def forward(self, x):
        first = self.first(x)
        self.between(x)
        second = self.second(x)
        return torch.cat((first, second, self.third(x)), -1)


def nothing(_):
    """No change."""


@pytest.mark.parametrize(
    ("between", "targets", "change", "ops"),
    [
        (nothing, ["first", "second", "third"], nothing, [3]),
        (nothing, ["first", "third"], nothing, [2]),
        (lambda x: x.add_(1.0), ["first", "second"], nothing, [2, 1]),
        (nothing, ["first", "second"], lambda model: model.second.register_forward_hook(lambda *_: None), [1, 1]),
        (nothing, ["first", "second"], lambda model: model.second.enable_adapters(False), [1]),
    ],
    ids=["all", "two", "changed between", "hook", "disabled"],
)
def test_layers_that_read_one_input_are_one_op(between, targets, change, ops, monkeypatch):
    torch.manual_seed(0)
    plain = inject_adapter_in_model(lora(target_modules=targets), Reads(between))
    model = copy.deepcopy(plain)
    report = apply_liger(model)
    assert [r.variant for r in report.applied if "one op" in r.variant] == [f"{', '.join(targets)} as one op"]
    calls, op = [], lora_rule.unchecked_lora_linears
    monkeypatch.setattr(lora_rule, "unchecked_lora_linears", lambda x, group: calls.append(len(group)) or op(x, group))
    results = []
    for each in (plain, copy.deepcopy(model)):
        change(each)
        with torch.set_grad_enabled(between is nothing):  # a changed input cannot be saved for backward
            results.append([each(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))])
        if between is nothing:
            results[-1] += torch.autograd.grad(results[-1][0].sum(), [p for p in each.parameters() if p.requires_grad])
    torch.testing.assert_close(*results)
    assert calls == ops
    revert_liger(model)
    assert "forward" not in vars(model)


def test_the_report_says_whether_a_group_was_one_op():
    model = inject_adapter_in_model(lora(target_modules=["first", "second"]), Reads())
    report = apply_liger(model)

    def rows():
        model(torch.randn(3, 8))
        return [record.variant for record in report.applied if record.module == ""]

    assert rows() == ["first, second as one op"]
    hook = model.first.register_forward_hook(lambda *_: None)
    assert rows() == ["first, second one by one"]
    model.second.enable_adapters(False)  # for a moment, as in DPO's reference: what training does is what counts
    assert rows() == ["first, second one by one"]
    hook.remove()
    model.second.enable_adapters(True)
    assert rows() == ["first, second as one op"]


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"])
def test_layers_that_are_not_computed_as_a_whole_are_no_group(options):
    model = inject_adapter_in_model(lora(target_modules=["first", "second"], **options), Reads())
    assert not [record for record in apply_liger(model).applied if "one op" in record.variant]


@pytest.mark.long
def test_hotswapped_scaling_compiles():
    """PEFT makes scaling a tensor for it, so that another value does not compile the model again."""
    plain = inject_adapter_in_model(lora(target_modules=["first", "third"]), Reads())
    for layer in (plain.first, plain.third):
        layer.scaling["default"] = torch.tensor(0.5)
    model = copy.deepcopy(plain)
    apply_liger(model)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
