"""Settings of every test: Triton's interpreter if there is no GPU, no network, poisoned uninitialised memory."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

torch.set_num_threads(1)  # pytest-xdist runs one worker per core


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """``torch.empty`` gives NaN, so a kernel that leaves an element unwritten is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def plain_definitions(request, monkeypatch):
    """The ops' definitions in place of Triton's interpreter, which takes a hundred times as long.

    The tests of the kernels run the kernels, and so do those with the mark ``triton``.
    """
    from liger_trainer.kernels.runtime import launch  # not before TRITON_INTERPRET is set

    if request.path.parent.name != "kernels" and "triton" not in request.keywords:
        monkeypatch.setattr(launch, "INTERPRET", False)


@pytest.fixture(autouse=True)
def no_card(request, monkeypatch):
    """Reports on a machine with a GPU are those of one without, but in the tests that need it."""
    from liger_trainer.memory import card

    if "gpu" not in request.keywords:
        monkeypatch.setattr(card, "has_cards", lambda: False)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: every size, every model, random sequences; runs with `-m long` only")


def pytest_collection_modifyitems(config, items):
    # Folders whose tests start processes, and so take longest, first: then the workers end together.
    items.sort(key=lambda item: item.path.parent.name not in ("distributed", "benchmarks", "training"))
    if "long" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if "long" in item.keywords])
        items[:] = [item for item in items if "long" not in item.keywords]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
