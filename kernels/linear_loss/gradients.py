"""Gradients of hidden, weight and bias: GEMMs into fp32, the weight's sum over token chunks, dtypes, late scaling.

An fp32 sum ``[V, H]`` and the 16-bit gradient it is rounded to would take 6 V H bytes together. ``WeightSum`` keeps the
first half of the vocabulary in the memory of the gradient itself, which has room for just that, and only the other
half elsewhere: 4 V H bytes until the end, 2 V H after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.launch import cdiv, is_plain, launcher, tl, triton
from .options import Gradients, Params
from .plain_rows import runs_kernels

ALIGNMENT = 16  # rows: the second half of 16-bit dlogits starts on 32 bytes
FIRST_ROWS = 1024  # rounded through a temporary of this many rows; the rest needs none
CONVERTED = 1024  # rows and columns of operands that a CPU converts to fp32 at a time
SCALE_BLOCK = 8192
MAX_PROGRAMS = 2048  # each program walks over several blocks, so that a factor of 1 starts few programs
_torch_c: Any = torch._C  # its stubs lack what is used here


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out = a @ b``; an fp32 ``out`` of 16-bit operands takes the GEMM's fp32 accumulator unrounded."""
    if not is_plain(a, b):
        return out.copy_(torch.mm(a, b))
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return _mm_of_converted(mm_into, out, a, b)


def add_mm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out += a @ b``, summed in ``out``'s dtype."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out)
    if out.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return _mm_of_converted(add_mm_into, out, a, b)


def _mm_of_converted(first: Callable[[Tensor, Tensor, Tensor], Tensor], out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``first`` on a CPU, whose GEMMs take operands of ``out``'s dtype: they are converted tile by tile."""
    for inner in range(0, a.shape[1], CONVERTED):
        b_tile = b[inner : inner + CONVERTED].to(out.dtype)
        for row in range(0, a.shape[0], CONVERTED):
            a_tile = a[row : row + CONVERTED, inner : inner + CONVERTED].to(out.dtype)
            (add_mm_into if inner else first)(out[row : row + CONVERTED], a_tile, b_tile)
    return out


def is_sum_dtype(dtype: torch.dtype) -> bool:
    """Whether sums of ``dtype`` are as precise as they must be: fp32 and fp64."""
    return dtype.itemsize >= 4


def lent_rows(vocab_size: int, dtype: torch.dtype) -> int:
    """Rows of the fp32 sum that lie in the memory of a gradient of ``dtype``."""
    return 0 if is_sum_dtype(dtype) else vocab_size // 2 // ALIGNMENT * ALIGNMENT


def bytes_over_gradient(vocab_size: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a ``WeightSum`` of ``[V, H]`` takes besides its result in ``dtype``."""
    return 0 if is_sum_dtype(dtype) else (vocab_size - lent_rows(vocab_size, dtype)) * width * 4


class WeightSum:
    """``sum of dlogits.T @ x`` over token chunks, ``[V, H]``; the result is in ``dtype``."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        vocab_size, width = weight.shape
        self.started, self.half = False, lent_rows(vocab_size, dtype)
        self.total = torch.empty((vocab_size, width), dtype=dtype, device=weight.device)
        self.parts: list[tuple[slice, Tensor]] = [(slice(None), self.total)]
        if not is_sum_dtype(dtype):
            lent = self.total.view(-1)[: 2 * self.half * width].view(torch.float32).view(self.half, width)
            rest = torch.empty((vocab_size - self.half, width), dtype=torch.float32, device=weight.device)
            parts = [(slice(self.half), lent), (slice(self.half, None), rest)]
            self.parts = [part for part in parts if part[1].shape[0]]

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        """Add the chunk with ``dlogits`` ``[n, V]`` and inputs ``x`` ``[n, H]``."""
        for rows, part in self.parts:
            (add_mm_into if self.started else mm_into)(part, dlogits[:, rows].t(), x)
        self.started = True

    def finish(self) -> Tensor:
        """The rounded sum; nothing may be added after this."""
        if is_sum_dtype(self.total.dtype):
            return self.total
        if self.half:
            _narrow_in_place(self.parts[0][1], self.total)
        self.total[self.half :].copy_(self.parts[-1][1])
        self.parts = []
        return self.total


def _narrow_in_place(wide: Tensor, narrow: Tensor) -> None:
    """``narrow[:n] = wide`` where both start at the same address and ``wide`` ``[n, H]`` has elements twice as wide.

    Row r of ``narrow`` lies over row r / 2 of ``wide``: rows [d, 2d) may be written once rows [0, d) are read.
    """
    num_rows = wide.shape[0]
    done = min(num_rows, FIRST_ROWS)
    narrow[:done].copy_(wide[:done].to(narrow.dtype))
    while done < num_rows:
        stop = min(2 * done, num_rows)
        narrow[done:stop].copy_(wide[done:stop])
        done = stop


def gradient_dtype(param: Tensor, gemm_dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a gradient that is rounded once may be written; fp32 after fp16 GEMMs, whose scale comes late."""
    return gemm_dtype if gemm_dtype == param.dtype and gemm_dtype != torch.float16 else torch.float32


def in_gradient_dtypes(grads: Gradients, params: Params, wanted: Sequence[bool], gemm_dtype: torch.dtype) -> Gradients:
    """``grads`` in the parameters' dtypes, or in fp32 after fp16 GEMMs; zeros for ``None`` where one is wanted."""
    out: Gradients = []
    for i, (param, want) in enumerate(zip(params, wanted, strict=True)):
        grad, grads[i] = grads[i], None  # so that converting one does not keep both
        if want and param is not None:
            dtype = torch.float32 if gemm_dtype == torch.float16 else param.dtype
            grad = torch.zeros(param.shape, dtype=dtype, device=param.device) if grad is None else grad.to(dtype)
        out.append(grad)
        del grad
    return out


@triton.jit
def _scale_kernel(
    x_ptr,  # [numel]
    out_ptr,  # [numel], may be x_ptr
    scale_ptr,  # [1]
    numel,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    end = numel
    if IN_PLACE:
        end = tl.where(scale == 1.0, 0, numel)
    full = end // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, full, tl.num_programs(0) * BLOCK):
        x = tl.load(x_ptr + start + lanes).to(tl.float32)
        tl.store(out_ptr + start + lanes, (x * scale).to(out_ptr.dtype.element_ty))
    if tl.program_id(0) == 0:
        mask = full + lanes < end
        x = tl.load(x_ptr + full + lanes, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + full + lanes, (x * scale).to(out_ptr.dtype.element_ty), mask=mask)


_launch_scale = launcher(_scale_kernel)


def fp16_peak(dtype: torch.dtype, *row_grads: Tensor | None) -> Tensor | None:
    """The largest absolute value of per-token gradients, or ``None`` unless ``dtype`` is fp16.

    Divided by it, dlogits make use of the range of fp16.
    """
    if dtype != torch.float16:
        return None
    grads = torch.stack([g.abs().amax() if g.numel() else g.new_ones(()) for g in row_grads if g is not None])
    return grads.amax().clamp(min=torch.finfo(torch.float32).tiny)


def graph_is_kept() -> bool:
    """Whether the running backward was asked to retain its graph, so that it may run again on the same tensors."""
    return _torch_c._autograd._get_current_graph_task_keep_graph()


def scale_gradients(
    grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], scale: Tensor, keep: bool
) -> list[Tensor | None]:
    """``grads`` (contiguous) times ``scale`` (one element on their device), rounded to ``dtypes``.

    An accelerator's ``scale`` is not read by the host. It is nearly always 1: then a gradient scaled in place is not
    even read.

    Args:
        grads: gradients; ``None`` stays ``None``.
        dtypes: dtype of each result; a gradient that has it already is scaled in place.
        scale: the factor.
        keep: leave ``grads`` unchanged, because they will be needed again.
    """
    out = []
    for grad, dtype in zip(grads, dtypes, strict=True):
        if grad is None:
            out.append(None)
            continue
        in_place = grad.dtype == dtype and not keep
        target = grad if in_place else torch.empty(grad.shape, dtype=dtype, device=grad.device)
        if not runs_kernels(grad):
            if not in_place or scale.is_cuda or bool(scale != 1):
                torch.mul(grad, scale, out=target)
        elif grad.numel():
            _launch_scale(
                (min(cdiv(grad.numel(), SCALE_BLOCK), MAX_PROGRAMS), 1, 1),
                (("num_warps", 8),),
                x_ptr=grad,
                out_ptr=target,
                scale_ptr=scale,
                numel=grad.numel(),
                IN_PLACE=in_place,
                BLOCK=SCALE_BLOCK,
            )
        out.append(target)
    return out
