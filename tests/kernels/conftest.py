"""Fixtures that choose between the kernels and what runs without Triton."""

import pytest

from liger_trainer.kernels.runtime import launch


@pytest.fixture
def without_triton(monkeypatch):
    """Every op runs as it does where Triton is not installed."""
    monkeypatch.setattr(launch, "HAS_TRITON", False)


@pytest.fixture(params=["kernels", "without Triton"])
def backend(request):
    """Run a test with the kernels, and again without Triton."""
    if request.param == "without Triton":
        request.getfixturevalue("without_triton")
