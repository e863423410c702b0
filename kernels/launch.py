"""Where an op runs and how its kernel is launched: the one place that knows about devices and block sizes."""

import os
from contextlib import nullcontext
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, minimal installs: every op then runs its reference definition

    class _NoTriton:
        """Lets the kernel files be imported, and their functions defined, where triton is not installed."""

        constexpr = object

        @staticmethod
        def jit(fn=None, **options):
            return fn if fn is not None else (lambda f: f)

    triton = tl = _NoTriton()

HAS_TRITON = type(triton).__name__ != "_NoTriton"
# Triton's CPU interpreter, used by the tests; the variable is read by triton when a kernel is defined.
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


_HERE = nullcontext()


def use_triton(x: torch.Tensor) -> bool:
    """Whether ops on ``x`` run as Triton kernels; elsewhere they run their definition in ``reference``."""
    return HAS_TRITON and (x.is_cuda or INTERPRET)


def on_device(x: torch.Tensor):
    """Context in which kernels launch on ``x``'s device: Triton launches on the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@cache
def _sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(x: torch.Tensor) -> int:
    """Streaming multiprocessors of ``x``'s device; 2 under the interpreter, so that persistent loops take turns."""
    return _sm_count(x.device.index) if x.is_cuda else 2


def register_limit(count: int) -> dict[str, int]:
    """Launch options that cap a kernel at ``count`` registers a thread, so that a known number of programs fits."""
    return {"maxnreg": count} if torch.version.cuda else {}
