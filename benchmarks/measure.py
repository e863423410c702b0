"""Times, memory and errors of one call, and what the device is. Used inside the workers."""

import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.common import describe_software

WARMUP_MS, REP_MS, MIN_REPS = 25, 100, 7
MIB = 1 << 20
HOPELESS = 1e9  # stands for an infinite error, which JSON cannot say


def describe_device(device: str) -> dict:
    """The message with which a worker introduces itself: device, driver and package versions."""
    about = {"kind": "hello", "device": "cpu", "driver": None, "cuda": torch.version.cuda, **describe_software()}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            driver = f"unknown: {type(error).__name__}"
        about |= {"device": torch.cuda.get_device_name(), "driver": driver}
    return about


def synchronize(device: str) -> None:
    """Wait for everything that was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


def release_memory(device: str) -> None:
    """Give cached memory back, so that one case's blocks are not counted or needed by the next."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def median_ms(fn: Callable[[], object], device: str, grad_to_none: Sequence[Tensor] = ()) -> float:
    """Median time of ``fn`` in ms, at least ``MIN_REPS`` calls after a warm-up, gradients dropped before each.

    On a GPU this is ``triton.testing.do_bench``: device time, L2 flushed before every call.
    """
    fn()
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    once = (time.perf_counter() - start) * 1e3
    if device == "cuda":
        from triton.testing import do_bench

        rep = max(REP_MS, MIN_REPS * once)
        return do_bench(fn, warmup=WARMUP_MS, rep=rep, grad_to_none=list(grad_to_none), return_mode="median")
    times = []
    for _ in range(MIN_REPS):
        for tensor in grad_to_none:
            tensor.grad = None
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def copy_bytes_per_ms(device: str) -> float:
    """Bytes read plus bytes written by a large copy, per millisecond: the speed of the memory-bound floor."""
    source = torch.randn((1 << 28) if device == "cuda" else (1 << 18), device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / median_ms(lambda: target.copy_(source), device)


def extra_peak_mib(
    run: Callable[[], object], leaves: Sequence[Tensor], held: Sequence[Tensor], device: str
) -> float | None:
    """Peak memory of ``run`` over what was allocated before it and the gradients it leaves behind; None off GPU.

    A gradient that lies in the memory of one of the ``held`` tensors was written in place and costs nothing.
    """
    if device != "cuda":
        return None
    for leaf in leaves:
        leaf.grad = None
    release_memory(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    storages = {s.data_ptr(): s.nbytes() for s in (x.grad.untyped_storage() for x in leaves if x.grad is not None)}
    gradients = sum(storages[p] for p in storages.keys() - {t.untyped_storage().data_ptr() for t in held})
    return (torch.cuda.max_memory_allocated() - before - gradients) / MIB


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; ``HOPELESS`` for a wrong shape, NaN or infinity."""
    if actual.shape != expected.shape:
        return HOPELESS
    error = float((actual.detach().float() - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else HOPELESS


def host_us(fn: Callable[[], object], calls: int = 200, rounds: int = 15) -> float:
    """Host microseconds per call: the queue is drained between rounds, never inside one."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def captured_launches(fn: Callable[[], object]) -> Callable[[], None] | None:
    """The Triton launches that one call of ``fn`` makes, without anything around them; None where it makes none.

    What remains is what any Triton op must pay on the host.
    """
    from triton.runtime import JITFunction

    from liger_trainer.kernels import launch

    launches = []
    run = JITFunction.run

    def record(self, *args, **kwargs):
        launches.append((self, args, kwargs))
        return run(self, *args, **kwargs)

    JITFunction.run = record
    direct, launch.DIRECT_LAUNCH = launch.DIRECT_LAUNCH, False  # ours goes past JITFunction.run
    try:
        fn()
    finally:
        JITFunction.run, launch.DIRECT_LAUNCH = run, direct
    if not launches:
        return None

    def replay() -> None:
        for kernel, args, kwargs in launches:
            kernel.run(*args, **kwargs)

    return replay
