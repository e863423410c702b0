"""Run every kernel forward and backward on small odd shapes, for a memory and race checker.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # for memcheck
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/helpers/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/helpers/sanitize.py

The results are compared with the plain definitions, so that a kernel that did not run does not pass. It runs the
calls of ``variants.py``, as ``compile_offline.py`` does.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from variants import variants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLS = 37, 200


def run(function: Callable, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor], tuple, tuple]:
    """Outputs with and without gradients enabled, and the gradients of two backward passes."""
    with torch.no_grad():
        alone = function()
    out = function()
    pairs = list(zip(out, alone, strict=True)) if isinstance(out, tuple) else [(out, alone)]
    pairs = [(a, b) for a, b in pairs if a.requires_grad]
    total = sum((t.float() * torch.arange(t.numel(), device=DEVICE).view(t.shape).cos()).sum() for t, _ in pairs)
    grads, again = (torch.autograd.grad(total, leaves, retain_graph=first) for first in (True, False))
    return [t.detach() for t, _ in pairs], [t for _, t in pairs], grads, again


def check(name: str, ours: Callable, theirs: Callable, leaves: list[Tensor]) -> None:
    """Compare both in forward, with and without gradients, and in two backward passes."""
    results = []
    for function in (ours, theirs):
        outputs, alone, grads, again = run(function, leaves)
        assert all(map(torch.equal, outputs, alone)), f"{name}: differs without gradients"
        assert all(map(torch.equal, grads, again)), f"{name}: a second backward differs"
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6)
        assert error < 3e-2, f"{name}: {error:.3f}"
    print(name, "ok", flush=True)


if __name__ == "__main__":
    for variant in variants(ROWS, COLS, DEVICE):
        check(*variant)
