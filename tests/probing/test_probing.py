"""Probe copies, skips and rebinding: the module that is probed never changes, and reasons are kept."""

import functools
import weakref

import pytest
import torch
from torch import nn

from liger_trainer.probing.probe import difference, probe_copy, settings_key
from liger_trainer.probing.rebinding import cached_weakly, free_attribute, rebind
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


def test_copies_of_one_function_are_compiled_apart():
    """torch.compile keeps its code with the code object; taken by another copy, it misses what was put in globals."""

    def forward(x):
        x = helper(x)
        torch._dynamo.graph_break()
        return helper(x)

    torch.compiler.reset()
    for factor in (2, 3, 5):
        copied = rebind(forward, {"helper": lambda x, factor=factor: x * factor})
        assert torch.compile(copied, backend="eager")(torch.ones(2)).tolist() == [factor**2] * 2


def helper(x):
    raise AssertionError("each copy has another")


def test_a_cache_does_not_keep_what_a_function_closes_over():
    calls = []

    def make():
        big = nn.Linear(2, 2)
        return lambda: big, weakref.ref(big)

    function, big = make()
    cached = cached_weakly(lambda function: calls.append(1) or len(calls))
    assert (cached(function), cached(function)) == (1, 1)
    del function
    assert big() is None


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
