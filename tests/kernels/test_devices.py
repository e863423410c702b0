"""A tensor on another device than the first is an error that names the argument, in every op."""

import pytest
from variants import Variant, calls

from benchmarks.cases import own_op
from benchmarks.ops import OPS

ARGUMENTS = [(op, name) for op in OPS for name in list(calls(op, Variant(), 5, 48, "cpu")[0].tensors)[1:]]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_device_mismatch(op, name):
    tensors = {n: t.detach() for n, t in calls(op, Variant(), 5, 48, "cpu")[0].tensors.items()}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name}.*meta.*cpu"):
        own_op(op)(*tensors.values())
