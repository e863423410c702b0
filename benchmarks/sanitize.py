"""Run every kernel forward and backward on small odd shapes, for a memory and race checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py

The results are compared with the plain definitions, so that a kernel that did not run does not pass. The
variants in the table of ops (``ops.py``) are run.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.cases import build_variant
from benchmarks.ops import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLS = 37, 200


def variants(rows: int, cols: int) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """Name, our call, the definition's call, and the leaves of every variant of every op."""
    for name, op in OPS.items():
        for variant in op.variants:
            case, ours, theirs = build_variant(name, variant, rows, cols, DEVICE)
            yield f"{name} {variant.note}".rstrip(), ours, theirs, case.leaf_tensors()


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
    for variant in variants(ROWS, COLS):
        check(*variant)
