"""Tensors on different devices are an error that names the argument, in every loss op and the gated projection."""

import pytest
import torch
from liger_trainer.kernels.cross_entropy import cross_entropy
from liger_trainer.kernels.gated_linear import gated_linear
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear_logprobs import linear_logprobs


@pytest.mark.parametrize(
    ("op", "shapes", "wrong", "name"),
    [
        (cross_entropy, [(3, 8), None], 1, "labels"),
        (linear_cross_entropy, [(3, 4), (8, 4), None], 1, "weight"),
        (linear_cross_entropy, [(3, 4), (8, 4), None], 2, "labels"),
        (linear_logprobs, [(3, 4), (8, 4), None], 1, "weight"),
        (linear_logprobs, [(3, 4), (8, 4), None], 2, "labels"),
        (gated_linear, [(3, 4), (3, 4), (8, 4)], 1, "up"),
        (gated_linear, [(3, 4), (3, 4), (8, 4)], 2, "weight"),
    ],
)
def test_device_mismatch(op, shapes, wrong, name):
    arguments = [torch.zeros(3, dtype=torch.long) if s is None else torch.randn(s) for s in shapes]
    arguments[wrong] = arguments[wrong].to("meta")
    with pytest.raises(ValueError, match=rf"{name}.*meta.*cpu"):
        op(*arguments)
