"""The launcher: its key against what Triton specialises on, its direct calls against Triton's own, its fallbacks."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from liger_trainer.kernels.runtime import launch

triton = pytest.importorskip("triton")
tl = triton.language

INTS = (0, 1, 2, 3, 16, 17, 48, -100, -16, -1, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**33, 2**62 + 1)
INTS += (-(2**31), -(2**31) - 16)


def triton_specialization(argument):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    return native_specialize_impl(BaseBackend, argument, False, True, True)


def tensors_of_all_kinds():
    buffers = [torch.empty(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)]
    assert all(b.data_ptr() % 16 == 0 for b in buffers)
    return [None, *buffers, *(b[1:] for b in buffers), buffers[0][4:], buffers[1][8:], buffers[0][:0]]


def launch_keys(launcher, arguments):
    """The key under which a launch with each of ``arguments`` finds its compiled kernel."""
    start, _ = launcher
    keys = []
    for changed in arguments:
        start.compiled.clear()
        start((5, 1, 1), (), **CALL | changed)
        keys += start.compiled
    return keys


def test_key_separates_all_that_triton_separates(launcher):
    for name, values in (("num_cols", INTS), ("bias_ptr", tensors_of_all_kinds())):
        keys = launch_keys(launcher, [{name: value} for value in values])
        group = [(v, triton_specialization(v), key) for v, key in zip(values, keys, strict=True)]
        assert len({repr(theirs) for _, theirs, _ in group}) > 4
        for (a, theirs_a, ours_a), (b, theirs_b, ours_b) in combinations(group, 2):
            assert theirs_a == theirs_b or ours_a != ours_b, f"one key for {a!r:.40} and {b!r:.40}"
    # and no more than that for everyday values, or every sequence length would be a slow first launch
    assert len(set(launch_keys(launcher, [{"num_cols": n} for n in range(2, 4096)]))) == 2


def test_addresses_are_those_of_the_tensors(launcher):
    start, kernel = launcher
    for tensor in tensors_of_all_kinds():
        for _ in range(2):
            start((5, 1, 1), (), **CALL | {"bias_ptr": tensor})
        assert kernel.direct[-1][1][10] == (None if tensor is None else tensor.data_ptr())


@pytest.mark.parametrize(
    ("triton_version", "cuda_version", "allowed"),
    [
        ("3.6.0", "13.0", True),
        ("3.9.1+git1", "12.8", True),
        ("3.5.1", "13.0", False),
        ("3.10.0", "13.0", False),
        ("4.0.0", "13.0", False),
        ("3.6.0", None, False),
    ],
)
def test_only_known_tritons_are_launched_directly(triton_version, cuda_version, allowed):
    assert launch.can_launch_directly(triton_version, cuda_version) is allowed


# Plain, and jitted where it is used: the tests of this process may have Triton interpret what it jits.
def scale_rows(
    x_ptr, bias_ptr, y_ptr, x_row_stride, num_cols, factor: float, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row_stride + cols, mask=cols < num_cols, other=0.0).to(tl.float32) * factor
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_cols + cols, x.to(y_ptr.dtype.element_ty), mask=cols < num_cols)


class Kernel:
    """Stands for a jitted kernel: records launches through Triton, and those that go straight to what it compiled."""

    fn, __name__ = staticmethod(scale_rows), "_scale_rows_kernel"

    def __init__(self):
        self.ordinary, self.direct = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.ordinary.append((grid, args, options))
            number = len(self.ordinary)
            return SimpleNamespace(
                run=lambda *a: self.direct.append((number, a)), function=f"f{number}", packed_metadata=f"m{number}"
            )

        return run


X, ODD = torch.zeros(64), torch.zeros(65)[1:]
CALL = {
    "x_ptr": X, "bias_ptr": None, "y_ptr": X, "x_row_stride": 16, "num_cols": 3, "factor": 2, "HAS_BIAS": True,
    "BLOCK": 128,
}  # fmt: skip
OPTIONS = (("num_warps", 4),)


@pytest.fixture
def launcher(monkeypatch):
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", True)
    monkeypatch.setattr(launch, "current_stream", lambda device: 77)
    monkeypatch.setattr(launch, "current_device", lambda: -1)
    kernel = Kernel()
    return launch.launcher(kernel), kernel


def test_second_launch_goes_straight_to_the_compiled_kernel(launcher):
    start, kernel = launcher
    for grid in ((5, 1, 1), (6, 2, 1), (7, 1, 1)):
        start(grid, OPTIONS, **CALL)
    ((grid, args, options),) = kernel.ordinary
    assert (grid, args, options) == ((5, 1, 1), (X, None, X, 16, 3, 2.0, True, 128), {"num_warps": 4})
    assert isinstance(args[5], float), "an int in the place of a float would be an int in the interpreter"
    rest = (77, "f1", "m1", None, None, None, X.data_ptr(), None, X.data_ptr(), 16, 3, 2, True, 128)
    assert kernel.direct == [(1, (6, 2, 1, *rest)), (1, (7, 1, 1, *rest))]


def test_order_of_names_is_free(launcher):
    start, kernel = launcher
    start((5, 1, 1), OPTIONS, **CALL)
    start((5, 1, 1), OPTIONS, **dict(reversed(CALL.items())))
    start((6, 1, 1), OPTIONS, **CALL)
    assert len(kernel.ordinary) == 1
    (_, first), (_, second) = kernel.direct
    assert first[1:] == second[1:]


@pytest.mark.parametrize("name", CALL)
def test_missing_argument_is_named(launcher, name):
    start, kernel = launcher
    with pytest.raises(TypeError, match=rf"launch_scale_rows_kernel.*'{name}'"):
        start((5, 1, 1), OPTIONS, **{other: value for other, value in CALL.items() if other != name})
    assert not kernel.ordinary


@pytest.mark.parametrize("name", ["num_col", "X_ptr", "num_warps"])
def test_unknown_argument_is_named(launcher, name):
    start, kernel = launcher
    with pytest.raises(TypeError, match=rf"launch_scale_rows_kernel.*'{name}'"):
        start((5, 1, 1), OPTIONS, **CALL, **{name: 1})
    assert not kernel.ordinary


def test_parameters_of_unknown_kind_are_rejected():
    def kernel(x_ptr, num_cols: int):
        pass

    with pytest.raises(TypeError, match="num_cols"):
        launch.launcher(kernel)


@pytest.mark.parametrize(
    "change",
    [
        {"x_ptr": ODD},
        {"x_ptr": X.int()},
        {"bias_ptr": X},
        {"num_cols": 1},
        {"x_row_stride": 17},
        {"num_cols": 2**31 + 3},
        {"HAS_BIAS": False},
        {"BLOCK": 64},
    ],
    ids=str,
)
def test_another_specialization_is_another_kernel(launcher, change):
    start, kernel = launcher
    for call in (CALL, CALL | change, CALL, CALL | change):
        start((5, 1, 1), OPTIONS, **call)
    assert len(kernel.ordinary) == 2
    assert [number for number, _ in kernel.direct] == [1, 2]


@pytest.mark.parametrize("change", [(("num_warps", 8),), (("num_warps", 4), ("maxnreg", 64))], ids=str)
def test_other_options_are_another_kernel(launcher, change):
    start, kernel = launcher
    for options in (OPTIONS, change, OPTIONS, change):
        start((5, 1, 1), options, **CALL)
    assert len(kernel.ordinary) == 2
    assert [number for number, _ in kernel.direct] == [1, 2]


def test_float_annotation_is_the_type_triton_gives_a_float():
    """An annotation overrides what Triton finds from the value, so it must be the same type and as little special."""
    from triton.runtime.jit import JITFunction

    factor = JITFunction(scale_rows).params[5]
    assert (factor.annotation_type, None) == triton_specialization(2.0)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(launcher, monkeypatch, hook):
    start, kernel = launcher
    start((5, 1, 1), OPTIONS, **CALL)
    chain = getattr(triton.knobs.runtime, hook)
    chain.add(print)
    start((5, 1, 1), OPTIONS, **CALL)
    chain.remove(print)
    assert (len(kernel.ordinary), len(kernel.direct)) == (2, 0)
    monkeypatch.setattr(triton.knobs.runtime, hook, print)
    start((5, 1, 1), OPTIONS, **CALL)
    assert (len(kernel.ordinary), len(kernel.direct)) == (3, 0)


def test_without_direct_launch_triton_is_asked_each_time(launcher, monkeypatch):
    start, kernel = launcher
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", False)
    for _ in range(3):
        start((5, 1, 1), OPTIONS, **CALL)
    assert (len(kernel.ordinary), len(kernel.direct)) == (3, 0)
    assert not start.compiled


def scaled(x, bias, y, factor, block):
    """Arguments of ``scale_rows``."""
    return {
        "x_ptr": x, "bias_ptr": bias, "y_ptr": y, "x_row_stride": x.stride(0), "num_cols": x.shape[1],
        "factor": factor, "HAS_BIAS": bias is not None, "BLOCK": block,
    }  # fmt: skip


def check_both_ways_to_launch():
    """Compile for an H100 with a driver that only records, and compare Triton's call with the direct one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    calls = []
    recorder = SimpleNamespace(
        launcher_cls=lambda source, metadata: lambda *args: calls.append(args),
        utils=SimpleNamespace(load_binary=lambda *args: (None, 11, 0, 0, 1024)),
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 77,
    )
    driver.set_active(recorder)
    compiler.max_shared_mem = lambda device: 232448
    launch.DIRECT_LAUNCH, launch.current_stream, launch.current_device = True, lambda device: 77, lambda: -1
    x, y = torch.zeros(4, 16), torch.zeros(4, 16)
    start = launch.launcher(triton.jit(scale_rows))
    for _ in range(2):
        start((4, 1, 1), (("num_warps", 1),), **scaled(x, None, y, 2, 16))
    ordinary, direct = calls
    assert direct[:6] == ordinary[:6] == (4, 1, 1, 77, 11, ordinary[5])
    assert direct[6:9] == (None, None, None)  # launch metadata and hooks, which a direct launch leaves out
    assert direct[9:] == tuple(a.data_ptr() if torch.is_tensor(a) else a for a in ordinary[9:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs with a real driver there, below")
def test_direct_call_is_the_one_triton_makes(tmp_path):
    """In a process of its own: one that has interpreted a kernel compiles no more."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run there")
@pytest.mark.parametrize("sizes", ["one size", pytest.param("every size", marks=pytest.mark.long)])
def test_every_kernel_compiles_for_an_h100(sizes, tmp_path):
    """The interpreter accepts much that Triton's compiler rejects, and CI has no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = str(Path(__file__).parents[1] / "helpers" / "compile_offline.py")
    command = [sys.executable, script, *(["--every-size"] if sizes == "every size" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "never launched: none" in done.stdout


@pytest.mark.gpu
def test_launches_in_any_order_compute_the_same():
    """Each case follows one whose compiled kernel would read it wrongly: alignment, strides, widths, None, int64."""
    assert launch.DIRECT_LAUNCH
    start = launch.launcher(triton.jit(scale_rows))
    buffer = torch.randn(40_000, device="cuda")
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        flat = buffer.to(dtype)
        for offset in (0, 1, 8, 3):
            for num_cols in (64, 63, 1, 16, 17):
                for row_stride in (64, 65, 1, 128):
                    cases.append(flat[offset:].as_strided((9, num_cols), (row_stride, 1)))
    huge = torch.zeros(2**31 + 256, dtype=torch.int8, device="cuda")
    huge[-256:] = torch.arange(256, device="cuda").to(torch.int8)
    cases += [huge.as_strided((2, 64), (2**31 + 16, 1)), huge.as_strided((2, 64), (2**31 + 17, 1))]
    for _ in range(2):
        for i, x in enumerate(cases):
            bias = buffer[i % 5 : i % 5 + x.shape[1]] if i % 3 else None
            y = torch.empty(x.shape, device="cuda")
            start((x.shape[0], 1, 1), (("num_warps", 2),), **scaled(x, bias, y, i % 4, 64))
            expected = x.float() * (i % 4) + (0.0 if bias is None else bias)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert len(start.compiled) < len(cases)


@pytest.mark.gpu
def test_launches_on_the_current_stream_and_the_tensors_device():
    start = launch.launcher(triton.jit(scale_rows))
    stream = torch.cuda.Stream()
    for index in [*range(torch.cuda.device_count()), *range(torch.cuda.device_count())]:
        x = torch.randn(8, 16, device=f"cuda:{index}")
        y = torch.zeros_like(x)
        start((8, 1, 1), (("num_warps", 1),), **scaled(x, None, y, 2.0, 16))
        assert torch.equal(y, 2 * x)
        assert torch.cuda.current_device() == 0
    x = torch.randn(8, 16, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.add_(1.0)  # a launch on the default stream would read x before this
        y = torch.zeros_like(x)
        start((8, 1, 1), (("num_warps", 1),), **scaled(x, None, y, 2.0, 16))
    stream.synchronize()
    assert torch.equal(y, 2 * x)


if __name__ == "__main__":
    check_both_ways_to_launch()
