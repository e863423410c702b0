"""Compiles for an H100, without one, every kernel that the calls of ``variants.py`` launch.

    python tests/helpers/compile_offline.py [--every-size]

Launches that differ in nothing but sizes, alignment and tiles are compiled once, or each with ``--every-size``.
The interpreter runs kernels as Python and accepts much that Triton's compiler rejects. Nothing is launched here: ops
run on CPU tensors, and where they would launch, the kernel is compiled for the arguments they pass. Exit status 1 if
one fails, a kernel of the package was never launched or always with the same value of a switch, or a kernel at the
speed of memory has no variant that reads and writes 16 bytes at a time. Needs ``TRITON_INTERPRET=0``.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import sanitize
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from variants import variants

from liger_trainer.kernels import reference
from liger_trainer.kernels.runtime import launch

H100 = GPUTarget("cuda", 90, 32)
H100_SMS = 132
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
# Rows and columns: rows that begin on 16 bytes, narrow, rows that do not, wider than what sums in registers.
SHAPES = ((33, 2048), (37, 200), (33, 3002), (3, 33000))
EVERY_SIZE = "--every-size" in sys.argv
# Kernels at the speed of memory: where rows begin on 16 bytes, they have to be read and written in pieces of 16 bytes.
WIDE = {
    "_norm_fwd_kernel", "_norm_bwd_kernel", "_gated_fwd_kernel", "_gated_bwd_kernel", "_update_kernel",
    "_clamped_swiglu_fwd_kernel", "_clamped_swiglu_bwd_kernel",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]

compiled: dict[tuple, int] = {}
launched: set[str] = set()
wide: set[str] = set()
switches: dict[tuple[str, str], set[bool]] = {}  # a kernel's boolean constants; whether an optional pointer is None


def compile_launch(kernel: triton.JITFunction, grid: tuple[int, int, int]) -> Callable[..., None]:
    """Replaces ``kernel[grid]`` by a function that compiles what it would launch."""
    source = inspect.getsource(kernel.fn)

    def run(*values: Any, **options: int) -> None:
        launched.add(kernel.__name__)
        signature, fixed, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
            name, aligned = parameter.name, False
            if isinstance(value, bool) or f" {name} is not None" in source:
                taken = value if isinstance(value, bool) else value is not None
                switches.setdefault((kernel.__name__, name), set()).add(taken)
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name] = "constexpr"
                fixed[(index,)] = value
            elif torch.is_tensor(value):
                signature[name] = f"*{TYPES[value.dtype]}"
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0
            if aligned:
                attributes[(index,)] = ALIGNED
        sizes = (*attributes, *options.items()) if EVERY_SIZE else ()
        switched = [item for item in fixed.items() if EVERY_SIZE or item[1] is None or isinstance(item[1], bool)]
        key = (kernel.__name__, *signature.values(), *map(str, switched), *sizes)
        if key not in compiled:
            flags = options | ({"debug": True} if kernel.debug else {})
            binary = triton.compile(ASTSource(kernel, signature, fixed, attributes), target=H100, options=flags)
            compiled[key] = len(binary.asm["cubin"])
            ptx = binary.asm["ptx"]
            if re.search(r"(ld\.global[\w.:]*\.v4|cp\.async\.cg)", ptx) and re.search(r"st\.global[\w.:]*\.v4", ptx):
                wide.add(kernel.__name__)

    return run


def main() -> int:
    """Compile everything."""
    root = Path(launch.__file__).parents[1]
    files = sorted(file.relative_to(root).with_suffix("") for file in root.glob("**/*.py"))
    modules = [importlib.import_module(f"liger_trainer.kernels.{'.'.join(file.parts)}") for file in files]
    functions = {v for module in modules for v in vars(module).values() if isinstance(v, triton.JITFunction)}
    kernels = {function.__name__ for function in functions if function.__name__.endswith("_kernel")}
    for module in modules:
        for name, value in (("use_triton", lambda *_: True), ("sm_count", lambda x: H100_SMS)):
            if hasattr(module, name):
                setattr(module, name, value)
    launch.DIRECT_LAUNCH = False
    triton.JITFunction.__getitem__ = compile_launch
    torch.version.cuda = torch.version.cuda or "13.0"  # register limits are for CUDA
    reference.check_labels = lambda *arguments: None
    for rows, cols in SHAPES:
        for _, ours, _, leaves in variants(rows, cols, "cpu"):
            sanitize.run(ours, leaves)
    missing = sorted(kernels - launched)
    narrow = sorted(WIDE - wide)
    print(
        f"{len(compiled)} variants of {len(launched)} kernels compiled; never launched: {', '.join(missing) or 'none'}"
    )
    print(f"accesses of 16 bytes missing: {', '.join(narrow) or 'none'}")
    stuck = [f"{kernel} {name}={values}" for (kernel, name), values in switches.items() if len(values) < 2]
    print(f"always the same: {', '.join(stuck) or 'none'}")
    return int(bool(missing or narrow or stuck))


if __name__ == "__main__":
    sys.exit(main())
