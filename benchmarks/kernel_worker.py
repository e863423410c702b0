"""One arm of the kernel benchmark: measures its shapes one after the other and emits a row for each."""

import importlib
import importlib.util
import time
from collections.abc import Callable

import torch

from benchmarks import arms, cases
from benchmarks.common import emit
from benchmarks.measure import (
    captured_launches,
    copy_bytes_per_ms,
    describe_device,
    extra_peak_mib,
    host_us,
    median_ms,
    relative_error,
    release_memory,
    synchronize,
)

# The check is coarse on purpose: it keeps a wrong kernel from winning; the tests judge precision.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.05, "float32": 2e-3}


def stand_by(arm: str) -> None:
    """Do the imports of ``arm`` that take long."""
    for module in arms.IMPORTS.get(arm, ()):
        if importlib.util.find_spec(module.split(".")[0]):
            importlib.import_module(module)


def main(job: dict) -> None:
    """Measure ``job["shapes"]`` with ``job["arm"]`` for the modes ``job["modes"]``, for ``job["seconds"]`` at most."""
    start = time.monotonic()
    device = job["device"]
    emit(describe_device(device))
    copy_speed = copy_bytes_per_ms(device)
    release_memory(device)
    for spec in job["shapes"]:
        if time.monotonic() - start > job["seconds"]:
            emit({"kind": "row", "spec": spec, "status": "dropped", "note": "device budget spent"})
            continue
        try:
            row = measure(job["arm"], spec, job["modes"], device, copy_speed)
        except arms.Unsupported as answer:
            row = {"status": "unsupported", "note": str(answer)}
        except arms.Absent as answer:
            row = {"status": "absent", "note": str(answer)}
        except torch.OutOfMemoryError as error:
            row = {"status": "oom", "note": str(error)[:200]}
        except torch.AcceleratorError as error:  # the process cannot launch anything any more
            emit({"kind": "row", "spec": spec, "status": "error", "note": f"{type(error).__name__}: {error}"[:400]})
            raise
        except Exception as error:  # one arm's failure on one shape is a result, not the end of the run
            row = {"status": "error", "note": f"{type(error).__name__}: {error}"[:400]}
        emit({"kind": "row", "spec": spec, **row})
        release_memory(device)


def measure(arm: str, spec: dict, modes: list[str], device: str, copy_speed: float) -> dict:
    """All numbers of one arm at one shape."""
    case = cases.build(spec, device)
    call = arms.make(arm, case)  # before the costly parts: it may say Absent or Unsupported
    row = check(case, call)
    if "host" in modes:
        return row | host_times(call, case)
    if "full" in modes:
        held = [*case.tensors.values(), *(u for u in case.upstream if u is not None)]
        row["extra_mib"] = extra_peak_mib(lambda: forward_backward(call, case)[1], held, device)
    row |= floors(case, modes, device, copy_speed)
    return row | times(call, case, modes, device)


def forward_backward(call: Callable[[], tuple], case: cases.Case) -> tuple[tuple, tuple]:
    """One forward and one backward pass; returns the outputs and the gradients of the leaves.

    Gradients are not accumulated into the leaves: in a model these tensors are none, and for two leaves with the same
    gradient autograd would make a copy.
    """
    outputs = tuple(call())
    return outputs, torch.autograd.grad(outputs, case.leaf_tensors(), list(case.upstream))


def check(case: cases.Case, call: Callable[[], tuple]) -> dict:
    """Error of the outputs and gradients against fp32, on the inputs as they were built."""
    checks = cases.expected(case)  # first: some arms write into their inputs
    case.upstream, upstream = tuple(None if u is None else u.clone() for u in case.upstream), case.upstream
    outputs, gradients = forward_backward(call, case)
    case.upstream = upstream
    gradients = dict(zip(case.leaves, gradients, strict=True))
    errors = {name: relative_error(actual(outputs, gradients), want) for name, want, actual in checks}
    worst = max(errors, key=errors.get)
    status = "ok" if errors[worst] <= TOLERANCE[case.spec["dtype"]] else "inexact"
    return {"status": status, "max_rel_err": round(errors[worst], 6), "worst": worst}


def floors(case: cases.Case, modes: list[str], device: str, copy_speed: float) -> dict:
    """Time below which the op cannot be, by mode: bytes over copy speed, or the matrix multiplications alone."""
    moved = cases.bytes_moved(case)
    if moved is not None:
        moved["full"] = moved["fwd"] + moved["bwd"]
        return {f"floor_{m}_ms": moved[m] / copy_speed for m in modes} | {"copy_tb_s": copy_speed / 1e9}
    alone = cases.gemms(case)
    row = {f"floor_{m}_ms": median_ms(alone[m], device) for m in modes if m in alone}
    del alone
    release_memory(device)  # gigabytes of logits that an arm may need
    return row


def times(call: Callable[[], tuple], case: cases.Case, modes: list[str], device: str) -> dict:
    """Medians by mode.

    Heads have no ``bwd`` of their own, since some compute their gradients in forward; their ``fwd`` is without
    gradients, as in evaluation.
    """
    row: dict = {}
    head = case.op.startswith("linear")
    if "fwd" in modes:
        with torch.set_grad_enabled(not head):
            row["fwd_ms"] = median_ms(call, device)
    if "bwd" in modes and not head:
        outputs, leaves, upstream = tuple(call()), case.leaf_tensors(), list(case.upstream)
        row["bwd_ms"] = median_ms(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True), device)
        del outputs
    if "full" in modes:
        row["full_ms"] = median_ms(lambda: forward_backward(call, case), device)
    synchronize(device)
    return row


def host_times(call: Callable[[], tuple], case: cases.Case) -> dict:
    """Host microseconds of a call without gradients, with the graph recorded, and of the bare Triton launches."""
    with torch.no_grad():
        bare = captured_launches(call)
        row = dict(zip(("host_us", "host_launch_us"), host_us([call] if bare is None else [call, bare]), strict=False))
    recorded, full = host_us([call, lambda: forward_backward(call, case)])
    return {"host_launch_us": None, **row, "host_autograd_us": recorded, "host_full_us": full}
