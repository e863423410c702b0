"""Probe copies, skips and rebinding: the module that is probed never changes, and reasons are kept."""

import functools

import pytest
import torch
from torch import nn

from liger_trainer.probing.probe import difference, probe_copy, settings_key
from liger_trainer.probing.rebinding import free_attribute, rebind
from liger_trainer.probing.rule import Skip, errors_skip

factor = 2


def scaled(x):
    return x * factor


def test_a_rebound_function_sees_other_globals_also_inside_a_wrapper():
    def wrap(function):
        @functools.wraps(function)
        def wrapper(x):
            return function(x) + 1

        return wrapper

    wrapped = wrap(scaled)
    assert rebind(scaled, {"factor": 5})(3) == 15
    assert rebind(wrapped, {"factor": 5})(3) == 16
    assert (scaled(3), wrapped(3)) == (6, 7)
    elsewhere = functools.wraps(scaled)(lambda x: x)  # does not hold the function it wraps
    with pytest.raises(Skip, match="cannot be rebuilt"):
        rebind(elsewhere, {"factor": 5})


def test_errors_become_skips_with_the_reason():
    reason = r"^its forward does more than the known forms, in test_probing.py, line \d+: `raise KeyError\(.x.\)`$"
    with pytest.raises(Skip, match=reason), errors_skip():
        raise KeyError("x")
    with pytest.raises(Skip, match=r"^because$"), errors_skip():
        raise Skip("because")


def test_a_probe_copy_has_random_parameters_and_the_module_keeps_its_own():
    module = nn.Sequential(nn.LayerNorm(8)).to("meta")
    copied = probe_copy(module[0], torch.bfloat16)
    assert copied.weight.device.type == "cpu"
    assert copied.weight.dtype == torch.bfloat16
    assert module[0].weight.is_meta
    assert copied.eps == module[0].eps
    assert settings_key(nn.LayerNorm(8)) == settings_key(nn.LayerNorm(8)) != settings_key(nn.LayerNorm(8, eps=1.0))


def test_where_a_forward_is_bound():
    module = nn.Linear(2, 2)
    assert free_attribute(module, "forward") == "forward"
    module._old_forward, module.forward = module.forward, lambda x: x  # as accelerate's device hooks do
    assert free_attribute(module, "forward") == "_old_forward"
    del module._old_forward
    with pytest.raises(Skip, match="its forward was already replaced on the instance"):
        free_attribute(module, "forward")


def test_outputs_of_another_form_do_not_agree():
    x = torch.ones(2)
    assert difference(x, x) == 0
    for other in (x[:1], x.double(), None, x * float("nan")):
        assert difference(x, other) == float("inf")
