"""The gradient of a weight, summed in fp32 over chunks of tokens and rounded once, in little more than its fp32 size.

An fp32 sum ``[V, H]`` and the 16-bit gradient it is rounded to would take 6 V H bytes together. Here the first half of
the vocabulary is summed in the memory of the gradient itself, which has room for just that, and only the other half
elsewhere: 4 V H bytes until the end, 2 V H after it.
"""

import torch
from torch import Tensor

ALIGNMENT = 16  # rows: the second half of 16-bit dlogits starts on 32 bytes
FIRST_ROWS = 1024  # rounded through a temporary of this many rows; the rest needs none


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out = a @ b``; an fp32 ``out`` of 16-bit operands takes the GEMM's fp32 accumulator unrounded."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_mm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out += a @ b``, summed in ``out``'s dtype."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out)
    if out.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)


def lent_rows(vocab_size: int, dtype: torch.dtype) -> int:
    """Rows of the fp32 sum that lie in the memory of a gradient of ``dtype``."""
    return 0 if dtype == torch.float32 else vocab_size // 2 // ALIGNMENT * ALIGNMENT


def bytes_over_gradient(weight: Tensor, dtype: torch.dtype) -> int:
    """What a ``WeightSum`` takes beside its result in ``dtype``."""
    vocab_size, width = weight.shape
    return 0 if dtype == torch.float32 else (vocab_size - lent_rows(vocab_size, dtype)) * width * 4


class WeightSum:
    """``sum of dlogits.T @ x`` over chunks, ``[V, H]``; the result is in ``dtype``."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        vocab_size, width = weight.shape
        self.started, self.half = False, lent_rows(vocab_size, dtype)
        self.total = torch.empty((vocab_size, width), dtype=dtype, device=weight.device)
        if dtype == torch.float32:
            self.parts = [(slice(None), self.total)]
            return
        lent = self.total.view(-1)[: 2 * self.half * width].view(torch.float32).view(self.half, width)
        rest = torch.empty((vocab_size - self.half, width), dtype=torch.float32, device=weight.device)
        parts = [(slice(self.half), lent), (slice(self.half, None), rest)]
        self.parts = [part for part in parts if part[1].shape[0]]

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        """Take in the chunk with ``dlogits`` ``[n, V]`` and inputs ``x`` ``[n, H]``."""
        for rows, part in self.parts:
            (add_mm_into if self.started else mm_into)(part, dlogits[:, rows].t(), x)
        self.started = True

    def finish(self) -> Tensor:
        """The sum, rounded; nothing may be added after."""
        if self.total.dtype == torch.float32:
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
