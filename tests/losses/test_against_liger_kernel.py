"""The losses against liger-kernel's chunked ones, where that package is installed."""

import pytest
import torch

from benchmarks.post_training_losses import CASES, Shape, make_inputs, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, device):
    pytest.importorskip("liger_kernel")
    x = make_inputs(Shape(4, 12, 101, 32, 32), device, torch.float32)
    expected = run(CASES[name].arms["liger-kernel"], x)
    for mine, theirs in zip(run(CASES[name].arms["liger_trainer"], x), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_plain_arm(name):
    x = make_inputs(Shape(4, 12, 101, 32, 32), "cpu", torch.float32)
    for mine, plain in zip(*(run(CASES[name].arms[arm], x) for arm in ("liger_trainer", "plain")), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
