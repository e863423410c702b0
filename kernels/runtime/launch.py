"""The choice of backend and the launch of kernels: only this module knows about devices and Triton's launch path."""

import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    # Triton's own types do not describe kernels: a constant is a tl.constexpr there, never a plain number.
    class _Untyped(type):
        def __getattr__(cls, name: str) -> Any: ...

    class triton(metaclass=_Untyped):
        """The module, to type checkers."""

    class tl(metaclass=_Untyped):
        """``triton.language``, to type checkers."""

        constexpr: TypeAlias = Any
else:
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
DIRECT_LAUNCH_VERSIONS = ((3, 6), (3, 9))  # first and last triton of which we know how a compiled kernel is called


def can_launch_directly(triton_version: str, cuda_version: str | None) -> bool:
    """Whether compiled kernels may be called without Triton's argument binder: CUDA, and a Triton we know inside."""
    first, last = DIRECT_LAUNCH_VERSIONS
    return cuda_version is not None and first <= tuple(map(int, triton_version.split(".")[:2])) <= last


DIRECT_LAUNCH = HAS_TRITON and not INTERPRET and can_launch_directly(triton.__version__, torch.version.cuda)
# The C functions behind torch.cuda.current_device and current_stream; CPU builds of torch have neither.
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all are tensors of torch itself, whose memory holds their values.

    Quantised and distributed tensors are subclasses. Their memory holds something else, or nothing, and where an
    operation is told to write its result (``out=``) they need not do so.
    """
    for tensor in tensors:
        if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter and tensor is not None:
            return False
    return True


def use_triton(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether an op on these tensors runs as Triton kernels; elsewhere it runs its definition in ``reference``."""
    return HAS_TRITON and (x.is_cuda or INTERPRET) and is_plain(x, *others)


def _has_hooks() -> bool:
    """Whether a profiler listens to launches: a chain of hooks, or a single hook assigned in its place."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# The body of a launcher, which is generated per kernel as Triton generates its binder: Python itself then checks the
# names of the arguments, and neither names nor groups of arguments are looked up in a launch.
_LAUNCHER = """
def make(compiled, launch_slowly):
    def launch{kernel}(grid, options, /, *, {names}):
        {addresses}
        key = ({pointer}.get_device(), options, {key})
        known = compiled.get(key)
        if known is None or key[0] != current_device() or _has_hooks():
            return launch_slowly(key, grid, options, ({names},))
        run, function, metadata = known
        # The three Nones: launch metadata, and the hooks that would read it.
        run(*grid, current_stream(key[0]), function, metadata, None, None, None, {values})
    return launch{kernel}
"""
# Where Triton would compile another kernel, the key differs. Triton looks at the dtype of a pointer and whether it is
# a multiple of 16; at whether an int is 1, is a multiple of 16, and fits 32 bits; and at which arguments are None.
# n >> 31 is 0 or -1 for 32-bit numbers and something else for wider ones.
_POINTER_KEY = "None if {0} is None else ({0}.dtype,) if {0}_address & 15 else {0}.dtype"
_INT_KEY = "None if {0} == 1 else {0} >> 31 << 1 | (not {0} & 15)"


def parameter_kinds(kernel: Any) -> dict[str, str]:
    """``"pointer"``, ``"int"``, ``"float"`` or ``"constant"`` for each parameter of ``kernel``, in order.

    A pointer's name ends in ``_ptr``, a constant is annotated ``tl.constexpr`` and a float ``float``, which Triton
    takes as fp32; ints have no annotation, because Triton would no longer specialise on them.
    """
    kinds = {}
    for name, parameter in inspect.signature(getattr(kernel, "fn", kernel)).parameters.items():
        if parameter.annotation is inspect.Parameter.empty:
            kinds[name] = "pointer" if name.endswith("_ptr") else "int"
        elif parameter.annotation in (float, tl.constexpr):
            kinds[name] = "float" if parameter.annotation is float else "constant"
        else:
            raise TypeError(f"{name}: got annotation {parameter.annotation}; must be float, tl.constexpr or none")
    return kinds


def launcher(kernel: Any) -> Callable[..., None]:
    """A function ``launch(grid, options, /, *, ...)`` that takes the arguments of ``kernel`` by name.

    It launches on the device and current stream of the first pointer's tensor, which must not be None. ``grid`` has
    three numbers and ``options`` are Triton's, as a tuple of pairs. From the second launch of a specialization on, it
    calls the compiled kernel past Triton's binder, which takes longer than many kernels run.

    Raises (when called):
        TypeError: an argument is missing or unknown.
    """
    kinds = parameter_kinds(kernel)
    pointers, ints, constants = (
        [name for name, kind in kinds.items() if kind == wanted] for wanted in ("pointer", "int", "constant")
    )
    compiled: dict[tuple, tuple] = {}

    def launch_slowly(key: tuple, grid: tuple[int, int, int], options: tuple, values: tuple) -> None:
        device = key[0]
        if device >= 0 and device != current_device():  # Triton launches on the current device
            with torch.cuda.device(device):
                launch(grid, options, **dict(zip(kinds, values, strict=True)))
            return
        arguments = [float(v) if kind == "float" else v for v, kind in zip(values, kinds.values(), strict=True)]
        binary = kernel[grid](*arguments, **dict(options))
        if DIRECT_LAUNCH and not _has_hooks():
            compiled[key] = (binary.run, binary.function, binary.packed_metadata)

    source = _LAUNCHER.format(
        kernel=kernel.__name__,
        names=", ".join(kinds),
        addresses="; ".join(f"{name}_address = None if {name} is None else {name}.data_ptr()" for name in pointers),
        pointer=pointers[0],
        key=", ".join([*constants, *map(_POINTER_KEY.format, pointers), *map(_INT_KEY.format, ints)]),
        values=", ".join(f"{name}_address" if kind == "pointer" else name for name, kind in kinds.items()),
    )
    scope: dict[str, Any] = {}
    exec(source, globals(), scope)
    launch = scope["make"](compiled, launch_slowly)
    launch.kernel, launch.compiled = kernel, compiled
    return launch


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@cache
def _sm_count(device: int) -> int:
    # 2 under the interpreter, so that tests cover persistent loops of several programs
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 2


def sm_count(x: torch.Tensor) -> int:
    """Streaming multiprocessors of ``x``'s device; 2 under the interpreter."""
    return _sm_count(x.get_device())


def register_limit(count: int) -> tuple[tuple[str, int], ...]:
    """Launch options that cap a kernel at ``count`` registers per thread, so that a known number of programs fits."""
    return (("maxnreg", count),) if torch.version.cuda else ()
