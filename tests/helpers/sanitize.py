"""Run every kernel forward and backward on small odd shapes, for a memory and race checker.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # for memcheck
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/helpers/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/helpers/sanitize.py

The results are compared with the plain definitions, so that a kernel that did not run does not pass. It runs the
variants of ``benchmarks/ops.py``, as ``compile_offline.py`` does.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.cases import Case, build, definition, own_op, parse, small_shape
from benchmarks.ops import OPS, Variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLS = 37, 200


def build_variant(name: str, variant: Variant, rows: int, cols: int, device: str) -> tuple[Case, Callable, Callable]:
    """The inputs of a variant, and the calls of the op and of its definition on them."""
    spec = parse(name, small_shape(name, rows, cols)) | variant.spec
    case = build(spec | {"dtype": "float32" if variant.autocast else "bfloat16"}, device)
    case.tensors |= dict.fromkeys(variant.without.split())
    wanted = case.leaves if variant.leaves is None else variant.leaves.split()
    case.leaves = tuple(leaf for leaf in wanted if case.tensors[leaf] is not None)
    inputs = [t if t is None or n in case.leaves else t.detach() for n, t in case.tensors.items()]

    def values(options: dict[str, Any]) -> dict[str, Any]:
        return {key: value(case["labels"]) if callable(value) else value for key, value in options.items()}

    options = values(variant.options)
    ours = functools.partial(own_op(name), *inputs, **options, **values(variant.ours))
    theirs = functools.partial(definition(name), *inputs, **options)
    if variant.autocast:
        ours = torch.autocast(device, torch.bfloat16)(ours)
    if variant.outputs is not None:
        all_ours, all_theirs = ours, theirs
        return case, lambda: all_ours()[: variant.outputs], lambda: all_theirs()[: variant.outputs]
    return case, ours, theirs


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
