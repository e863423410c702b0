"""Time of memory-bound ops against the tiles and warps of their kernels, for shapes that a peer still wins.

    python benchmarks/experiments/tiles.py --ops rope,swiglu --seconds 60

Prints the product's choice and every other one that is faster, forward and backward; needs a GPU. All variants are
compiled first, by several processes, which is not part of those seconds.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from liger_trainer.kernels.runtime.launch import register_limit

from benchmarks.measure import median_ms

SHAPES = {
    "swiglu": [(64, 8192), (1023, 5461), (16384, 14336)],
    "rope": [(1, 64, 32, 8, 64), (2, 333, 32, 8, 128), (2, 333, 6, 2, 96), (4, 2048, 32, 8, 128)],
    "add_rms_norm": [(4097, 3001), (64, 2048), (16384, 4096)],
    "layer_norm": [(4097, 3001), (4096, 16384)],
    "rms_norm": [(4097, 3001), (4096, 16384)],
    "cross_entropy": [(64, 32000), (1024, 32003), (8192, 32000), (8192, 128256)],
}
# What is varied: (module, name, values); "num_warps" of a launcher is that of its launch options.
NORMS = [("shared.norm_tiles", "row_tiling persistent_tiling", "num_warps", (2, 4, 8, 16, 32))]
KNOBS = {
    "swiglu": [
        ("shared.gated", "SMALL_GRID", None, (0,)),  # its rule would halve the next one
        ("shared.gated", "BLOCK_SIZE", None, (512, 1024, 2048, 4096)),
        ("shared.gated", "_launch_fwd _launch_bwd", "num_warps", (1, 2, 4, 8)),
    ],
    "rope": [
        ("rope", "TILE_SIZE", None, (1024, 2048, 4096)),
        ("rope", "TILE_HEADS", None, (4, 8)),
        ("rope", "PROGRAMS_PER_SM", None, (8, 16)),
        ("rope", "_launch_rope", "num_warps", (2, 4, 8)),
    ],
    "cross_entropy": [
        ("linear_loss.softmax_rows", "STREAM_WARPS", None, (4, 8, 16, 32)),
        ("linear_loss.softmax_rows", "ALONE_WARPS", None, (8, 16, 32)),
    ],
    "add_rms_norm": NORMS,
    "layer_norm": NORMS,
    "rms_norm": NORMS,
}  # fmt: skip


def kernels(name: str):
    """A module of the product's kernels."""
    return import_module(f"liger_trainer.kernels.{name}")


def call(op: str, shape: tuple[int, ...]) -> tuple[Callable, list[torch.Tensor]]:
    """The op on random bf16 inputs, and the inputs that get gradients."""

    def make(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16).requires_grad_()

    function = getattr(kernels(op), op)
    if op == "rope":
        batch, tokens, q_heads, k_heads, dim = shape
        q, k = (make(batch, tokens, heads, dim).transpose(1, 2) for heads in (q_heads, k_heads))
        q, k = (t.detach().requires_grad_() for t in (q, k))
        cos, sin = (make(1, tokens, dim).detach() for _ in range(2))
        return lambda: function(q, k, cos, sin), [q, k]
    if op == "cross_entropy":
        logits, labels = make(*shape), torch.randint(0, shape[1], shape[:1], device="cuda")
        return lambda: (function(logits, labels),), [logits]
    if op == "swiglu":
        gate, up = make(*shape), make(*shape)
        return lambda: (function(gate, up),), [gate, up]
    inputs = [make(*shape) for _ in range(2 if op == "add_rms_norm" else 1)]
    inputs += [make(shape[-1]) for _ in range(2 if op == "layer_norm" else 1)]
    return lambda: (lambda out: out if isinstance(out, tuple) else (out,))(function(*inputs)), inputs


def times(op: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    run, inputs = call(op, shape)
    forward = median_ms(run, "cuda")
    out = run()
    grads = [torch.randn_like(t) for t in out]
    return forward, median_ms(lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True), "cuda")


def with_warps(function: Callable, warps: int) -> Callable:
    """A tiling function, or a launcher, whose launch has ``warps`` warps."""

    def tiling(*args):
        found = function(*args)
        cap = register_limit(min(65536 // (32 * warps), 255)) if len(found.options) > 1 else ()
        return found._replace(options=(("num_warps", warps), *cap))

    def launch(grid, options, **arguments):
        return function(grid, (("num_warps", warps), *options[1:]), **arguments)

    return launch if hasattr(function, "compiled") else tiling


@contextmanager
def changed(knobs: list[tuple], values: tuple) -> Iterator[None]:
    """The kernels with ``values`` in the place of what ``knobs`` name."""
    patches = []
    for (module, names, what, _), value in zip(knobs, values, strict=True):
        for name in names.split():
            old = getattr(kernels(module), name)
            new = value if what is None else with_warps(old, value)
            users = [module, "shared.norm"] if module == "shared.norm_tiles" else [module]
            patches += [mock.patch.object(kernels(user), name, new) for user in users if hasattr(kernels(user), name)]
    caches = [kernels("rope")._tiling, kernels("linear_loss.softmax_rows")._block]
    for patch in patches:
        patch.start()
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        for patch in patches:
            patch.stop()
        for cache in caches:
            cache.cache_clear()


def variants(op: str) -> Iterator[tuple]:
    """All values of the op's knobs together."""
    return itertools.product(*(knob[3] for knob in KNOBS[op]))


def compile_variant(op: str, shape: tuple[int, ...], values: tuple) -> None:
    """Run one variant once, so that Triton's cache has it; its failure shows when it is measured."""
    with contextlib.suppress(Exception), changed(KNOBS[op], values):
        run, inputs = call(op, shape)
        out = run()
        torch.autograd.grad(out, inputs, [torch.ones_like(t) for t in out])


def main() -> None:
    """Sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=600, help="shared by the shapes")
    parser.add_argument("--processes", type=int, default=6, help="that compile")
    args = parser.parse_args()
    jobs = [(op, shape) for op in args.ops.split(",") for shape in SHAPES[op]]
    todo = [(op, shape, values) for op, shape in jobs for values in variants(op)]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_variant, *zip(*todo, strict=True), chunksize=4))
    end = time.monotonic() + args.seconds
    for index, (op, shape) in enumerate(jobs):
        stop = time.monotonic() + (end - time.monotonic()) / (len(jobs) - index)
        base = times(op, shape)
        print(f"{op} {shape}: {base[0] * 1e3:.1f} us forward, {base[1] * 1e3:.1f} us backward", flush=True)
        for values in variants(op):
            if time.monotonic() > stop:
                print("  time is up", flush=True)
                break
            try:
                with changed(KNOBS[op], values):
                    found = times(op, shape)
            except Exception as error:  # a tile that does not compile is one that is not taken
                print(f"  {values}: {type(error).__name__}", flush=True)
                continue
            if found[0] < 0.98 * base[0] or found[1] < 0.98 * base[1]:
                print(f"  {values}: {found[0] * 1e3:.1f} us forward, {found[1] * 1e3:.1f} us backward", flush=True)


if __name__ == "__main__":
    main()
