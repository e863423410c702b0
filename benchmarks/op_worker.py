"""One arm of the kernel benchmark: measures shapes one after the other and sends a row for each.

``python -m benchmarks.op_worker JOB``, where JOB is JSON.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, measure
from benchmarks.peers import NotMeasured, op_call
from benchmarks.workers import emit

# The check is coarse on purpose: it keeps a wrong kernel from winning; the tests judge precision.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.05, "float32": 2e-3}


def messages(job: dict) -> Iterator[dict]:
    """Facts about the device, then a row for each of ``job["shapes"]``.

    The job also has ``arm``, ``modes`` and ``device``.
    """
    device = job["device"]
    yield measure.describe_device(device)
    copy_speed = measure.copy_bytes_per_ms(device)
    measure.release_memory(device)
    for spec in job["shapes"]:
        fatal = None
        try:
            row = measured(job["arm"], spec, job["modes"], device, copy_speed)
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
        measure.release_memory(device)


def measured(arm: str, spec: dict, modes: list[str], device: str, copy_speed: float) -> dict:
    """All numbers of one arm at one shape."""
    case = cases.build(spec, device)
    call = op_call(arm, case)  # before the costly parts: it may raise NotMeasured
    row = check(case, call)
    if "host" in modes:
        return row | host_times(call, case)
    if "full" in modes:
        held = [t for t in (*case.tensors.values(), *case.upstream) if t is not None]
        row["extra_mib"] = measure.extra_peak_mib(lambda: forward_backward(call, case)[1], held, device)
    row |= floors(case, modes, device, copy_speed)
    return row | times(call, case, modes, device)


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
    errors = {name: measure.relative_error(actual(outputs, by_name), want) for name, want, actual in checks}
    worst = max(errors, key=lambda name: errors[name])
    status = "ok" if errors[worst] <= TOLERANCE[case.spec["dtype"]] else "inexact"
    return {"status": status, "max_rel_err": round(errors[worst], 6), "worst": worst}


def floors(case: cases.Case, modes: list[str], device: str, copy_speed: float) -> dict:
    """Time below which the op cannot be, by mode: bytes over copy speed, or the matrix multiplications alone."""
    moved = cases.bytes_moved(case)
    if moved is not None:
        return {f"floor_{m}_ms": moved[m] / copy_speed for m in modes} | {"copy_tb_s": copy_speed / 1e9}
    alone = cases.gemms(case)
    row = {f"floor_{m}_ms": measure.median_ms(alone[m], device) for m in modes if m in alone}
    del alone
    measure.release_memory(device)  # gigabytes of logits that an arm may need
    return row


def times(call: Callable[[], Any], case: cases.Case, modes: list[str], device: str) -> dict:
    """Medians by mode.

    Heads have no ``bwd`` of their own, since some compute their gradients in forward; their ``fwd`` is without
    gradients, as in evaluation.
    """
    row: dict = {}
    head = case.op.startswith("linear")
    if "fwd" in modes:
        with torch.set_grad_enabled(not head):
            row["fwd_ms"] = measure.median_ms(call, device)
    if "bwd" in modes and not head:
        outputs, leaves, upstream = as_tuple(call()), case.leaf_tensors(), list(case.upstream)
        row["bwd_ms"] = measure.median_ms(
            lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True), device
        )
        del outputs
    if "full" in modes:
        row["full_ms"] = measure.median_ms(lambda: forward_backward(call, case), device)
    measure.synchronize(device)
    return row


def host_times(call: Callable[[], Any], case: cases.Case) -> dict:
    """Host microseconds of a call without gradients, with the graph recorded, and of the bare Triton launches."""
    with torch.no_grad():
        bare = measure.captured_launches(call)
        alone = measure.host_us([call] if bare is None else [call, bare])
    recorded, full = measure.host_us([call, lambda: forward_backward(call, case)])
    launch = alone[1] if bare is not None else None
    return {"host_us": alone[0], "host_launch_us": launch, "host_autograd_us": recorded, "host_full_us": full}


if __name__ == "__main__":
    for message in messages(json.loads(sys.argv[1])):
        emit(message)
