"""One arm of the kernel benchmark: measures shapes one after the other and sends a row for each.

``python -m benchmarks.op_worker JOB``, where JOB is JSON. Times, memory and errors of a call are measured here.
"""

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.common import INFINITE, software
from benchmarks.peers import NotMeasured, op_call
from benchmarks.workers import emit
from liger_trainer.environment import nvidia_driver

# The check is coarse on purpose: it keeps a wrong kernel from winning; the tests check precision.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.05, "float32": 2e-3}
WARMUP_MS, REP_MS, MIN_REPS, MAX_REPS = 25, 100, 7, 200
FLUSH_BYTES = 1 << 28  # several times any L2 cache
CLOCK_HZ = 2e9  # about an H100's; converts a time into the cycles for which the device waits
MAX_LEAD_MS = 5.0  # a call that waits for the device itself cannot be queued ahead
MIB = 1 << 20


def messages(job: dict) -> Iterator[dict]:
    """Facts about the device, then a row for each of ``job["shapes"]``.

    The job also has ``arm``, ``device`` and ``host``, which says whether host times are measured.
    """
    device = job["device"]
    yield describe_device(device)
    copy_speed = copy_bytes_per_ms(device)
    release_memory(device)
    for spec in job["shapes"]:
        fatal = None
        try:
            row = measured(job["arm"], spec, job["host"], device, copy_speed)
        except NotMeasured as answer:
            row = {"status": answer.status, "note": str(answer)}
        except torch.OutOfMemoryError as error:
            row = {"status": "oom", "note": str(error)[:200]}
        except Exception as error:  # one arm's failure on one shape is a result, not the end of the run
            row = {"status": "error", "note": f"{type(error).__name__}: {error}"[:400]}
            fatal = error if isinstance(error, torch.AcceleratorError) else None
        yield {"kind": "row", "spec": spec, **row}
        if fatal:  # the process cannot launch anything any more
            raise fatal
        release_memory(device)


def measured(arm: str, spec: dict, host: bool, device: str, copy_speed: float) -> dict:
    """All numbers of one arm at one shape."""
    case = cases.build(spec, device)
    call = op_call(arm, case)  # before the costly parts: it may raise NotMeasured
    row = check(case, call)
    if host:
        return row | host_times(call, case)
    held = [t for t in (*case.tensors.values(), *case.upstream) if t is not None]
    row["extra_mib"] = extra_peak_mib(lambda: forward_backward(call, case)[1], held, device)
    return row | floors(case, device, copy_speed) | times(call, case, device)


def forward_backward(call: Callable[[], Any], case: cases.Case) -> tuple[tuple, tuple[Tensor, ...]]:
    """One forward and one backward pass; returns the outputs and the gradients of the leaves.

    Gradients are not accumulated into the leaves: in a model these tensors are not leaves, and for two leaves with the
    same gradient autograd would make a copy.
    """
    outputs = as_tuple(call())
    return outputs, torch.autograd.grad(outputs, case.leaf_tensors(), list(case.upstream))


def as_tuple(output: Any) -> tuple:
    """The outputs of an op."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def check(case: cases.Case, call: Callable[[], Any]) -> dict:
    """Error of the outputs and gradients against fp32, on the inputs as they were built."""
    checks = cases.expected(case)  # first: some arms write into their inputs
    case.upstream, upstream = tuple(None if u is None else u.clone() for u in case.upstream), case.upstream
    outputs, gradients = forward_backward(call, case)
    case.upstream = upstream
    by_name = dict(zip(case.leaves, gradients, strict=True))
    errors = {name: relative_error(actual(outputs, by_name), want) for name, want, actual in checks}
    worst = max(errors, key=lambda name: errors[name])
    status = "ok" if errors[worst] <= TOLERANCE[case.spec["dtype"]] else "inexact"
    return {"status": status, "max_rel_err": round(errors[worst], 6), "worst": worst}


def floors(case: cases.Case, device: str, copy_speed: float) -> dict:
    """Lower bound of the op's time, per pass: bytes over copy speed, or the matrix multiplications alone."""
    moved = cases.bytes_moved(case)
    if moved is not None:
        return {f"floor_{name}_ms": size / copy_speed for name, size in moved.items()} | {"copy_tb_s": copy_speed / 1e9}
    row = {f"floor_{name}_ms": median_ms(alone, device) for name, alone in cases.gemms(case).items()}
    release_memory(device)  # gigabytes of logits that an arm may need
    return row


def times(call: Callable[[], Any], case: cases.Case, device: str) -> dict:
    """Medians by pass.

    Heads have no ``bwd`` of their own, since some compute their gradients in forward; their ``fwd`` is without
    gradients, as in evaluation.
    """
    head = case.op.startswith("linear")
    with torch.set_grad_enabled(not head):
        row = {"fwd_ms": median_ms(call, device)}
    if not head:
        outputs, leaves, upstream = as_tuple(call()), case.leaf_tensors(), list(case.upstream)
        row["bwd_ms"] = median_ms(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True), device)
        del outputs
    return row | {"full_ms": median_ms(lambda: forward_backward(call, case), device)}


def host_times(call: Callable[[], Any], case: cases.Case) -> dict:
    """Host microseconds of a call without gradients, with the graph recorded, and of forward and backward."""
    with torch.no_grad():
        alone = host_us(call)
    recorded, full = host_us(call), host_us(lambda: forward_backward(call, case))
    return {"host_us": alone, "host_autograd_us": recorded, "host_full_us": full}


def describe_device(device: str) -> dict:
    """The message with which a worker introduces itself: device, driver and package versions."""
    about = {"kind": "hello", "device": "cpu", "driver": None, "cuda": torch.version.cuda, **software()}
    if device == "cuda":
        about |= {"device": torch.cuda.get_device_name(), "driver": nvidia_driver()}
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


def median_ms(fn: Callable[[], object], device: str) -> float:
    """Median time of ``fn`` in ms, at least ``MIN_REPS`` calls after a warm-up.

    On a GPU: time on the device between two events, with L2 flushed before every call as in
    ``triton.testing.do_bench``, but with the device kept busy until the host has queued the whole call. Otherwise the
    host's time would be part of every number below about 0.3 ms; ``host_us`` measures it on its own.
    """
    issue, once = math.inf, 0.0
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        fn()
        issue = min(issue, (time.perf_counter() - start) * 1e3)
        synchronize(device)
        once = (time.perf_counter() - start) * 1e3
    if device == "cuda":
        return _median_device_ms(fn, lead_ms=min(2 * issue + 0.1, MAX_LEAD_MS), once=once)
    times = []
    for _ in range(MIN_REPS):
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _median_device_ms(fn: Callable[[], object], lead_ms: float, once: float) -> float:
    calls = max(MIN_REPS, min(MAX_REPS, round(REP_MS / once)))
    warmup = max(1, round(WARMUP_MS / once))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    lead = int(lead_ms * 1e-3 * CLOCK_HZ)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(warmup + calls)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(lead)  # the device waits here while the host queues what follows
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[warmup:])


def copy_bytes_per_ms(device: str) -> float:
    """Bytes read plus bytes written by a large copy, per millisecond: the speed of the memory-bound floor."""
    source = torch.randn((1 << 28) if device == "cuda" else (1 << 18), device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / median_ms(lambda: target.copy_(source), device)


def extra_peak_mib(run: Callable[[], Sequence[Tensor]], held: Sequence[Tensor], device: str) -> float | None:
    """Peak memory of ``run`` over what was allocated before it and the gradients it returns; None off GPU.

    A gradient that lies in the memory of one of the ``held`` tensors was written in place and costs nothing.
    """
    if device != "cuda":
        return None
    release_memory(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = run()
    torch.cuda.synchronize()
    storages = {s.data_ptr(): s.nbytes() for s in (g.untyped_storage() for g in gradients)}
    own = sum(storages[p] for p in storages.keys() - {t.untyped_storage().data_ptr() for t in held})
    return (torch.cuda.max_memory_allocated() - before - own) / MIB


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; ``INFINITE`` for a wrong shape, NaN or infinity."""
    if actual.shape != expected.shape:
        return INFINITE
    error = float((actual.detach().float() - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else INFINITE


def host_us(fn: Callable[[], object], calls: int = 100, rounds: int = 30) -> float:
    """Host microseconds per call of ``fn`` in its fastest round.

    The queue is drained between rounds, never inside one. Slower rounds contain other work of the machine: their median
    differed by half from run to run.
    """
    fastest = math.inf
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        fastest = min(fastest, time.perf_counter() - start)
    torch.cuda.synchronize()
    return fastest / calls * 1e6


if __name__ == "__main__":
    for message in messages(json.loads(sys.argv[1])):
        emit(message)
