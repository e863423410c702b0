"""The vocabulary projection in chunks of tokens: which rows count, how many at a time, logits out, gradients in.

All GEMMs are cuBLAS through torch. A chunk's logits live in one reused buffer and become its dlogits there; gradients
of weight and bias are summed in fp32 over the chunks and rounded once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .launch import cdiv

ROW_ALIGNMENT = 16  # elements: rows of the logits buffer start on 32 bytes whatever the vocabulary
CHUNK_ALIGNMENT = 128  # tokens: a GEMM tile


class ValidRows(NamedTuple):
    """Positions that are not ignored: their labels ``[n]`` and their indices, ``None`` when that is every position."""

    labels: Tensor
    index: Tensor | None
    num_rows: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.labels.shape[0]

    def select(self, per_token: Tensor) -> Tensor:
        """The entries of ``per_token`` ``[num_rows]`` at these positions, contiguous."""
        return per_token.contiguous() if self.index is None else per_token.index_select(0, self.index)

    def spread(self, values: Tensor) -> Tensor:
        """A fresh ``[num_rows]`` with ``values`` at these positions and zeros elsewhere."""
        if self.index is None:
            return values.clone()
        return values.new_zeros(self.num_rows).index_copy_(0, self.index, values)


def valid_rows(labels: Tensor, vocab_size: int, ignore_index: int) -> ValidRows:
    """The rows of ``labels`` ``[N]`` to compute; the one place where the host waits for the device.

    Raises ``ValueError`` for a label that is neither ``ignore_index`` nor in ``[0, vocab_size)``.
    """
    valid = labels != ignore_index
    bad = valid & ((labels < 0) | (labels >= vocab_size))
    count, num_bad = torch.stack((valid.sum(), bad.sum())).tolist()
    if num_bad:
        reference.check_labels(labels, vocab_size, ignore_index)
    if count == labels.shape[0]:
        return ValidRows(labels.contiguous(), None, count)
    index = torch.nonzero_static(valid, size=count).squeeze(1)
    return ValidRows(labels.index_select(0, index), index, labels.shape[0])


def rows_per_chunk(num_rows: int, vocab_size: int, itemsize: int, budget_mib: float) -> int:
    """Tokens whose logits fit in ``budget_mib``, in equal chunks of whole GEMM tiles where the budget holds one."""
    row_bytes = cdiv(vocab_size, ROW_ALIGNMENT) * ROW_ALIGNMENT * itemsize
    limit = max(1, int(budget_mib * 2**20) // row_bytes)
    if limit >= num_rows:
        return num_rows
    unit = CHUNK_ALIGNMENT if limit >= CHUNK_ALIGNMENT else 1
    limit -= limit % unit
    return min(limit, cdiv(cdiv(num_rows, cdiv(num_rows, limit)), unit) * unit)


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


class LinearChunks:
    """``hidden @ weight.T + bias`` for the valid rows, a chunk at a time, in the GEMMs' dtype."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: ValidRows, dtype: torch.dtype,
        budget_mib: float,
    ):  # fmt: skip
        self.hidden, self.rows = hidden, rows
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.size = rows_per_chunk(rows.count, weight.shape[0], self.weight.element_size(), budget_mib)

    @property
    def single(self) -> bool:
        """Whether one chunk holds all rows."""
        return self.size >= self.rows.count

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield ``(span of the valid rows, hidden [n, H], logits [n, V])``; the logits' memory is used again."""
        if self.rows.count == 0:
            return
        vocab_size = self.weight.shape[0]
        width = cdiv(vocab_size, ROW_ALIGNMENT) * ROW_ALIGNMENT
        buffer = torch.empty((self.size, width), dtype=self.weight.dtype, device=self.weight.device)
        buffer[:, vocab_size:].zero_()  # GEMMs on CPU read the padding, times zero
        for start in range(0, self.rows.count, self.size):
            span = slice(start, min(start + self.size, self.rows.count))
            index = self.rows.index
            x = self.hidden[span] if index is None else self.hidden.index_select(0, index[span])
            x = x.to(self.weight.dtype)
            logits = buffer[: x.shape[0], :vocab_size]
            if self.bias is None:
                torch.mm(x, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, x, self.weight.t(), out=logits)
            yield span, x, logits


class GradientSums:
    """Gradients of hidden, weight and bias, gathered chunk by chunk; those not wanted cost nothing.

    fp16 GEMMs: sums stay fp32 until ``scale_gradients`` rounds them, because their scale is applied that late.
    """

    def __init__(self, chunks: LinearChunks, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple):
        self.chunks, self.wanted = chunks, wanted
        self.params = (hidden, weight, bias)
        self.sums: list[Tensor | None] = [None, None, None]
        if wanted[0]:
            make = torch.empty if chunks.rows.index is None else torch.zeros
            self.sums[0] = make(hidden.shape, dtype=self._sum_dtype(hidden, rounded_once=True), device=hidden.device)

    def _sum_dtype(self, param: Tensor, rounded_once: bool) -> torch.dtype:
        dtype = self.chunks.weight.dtype
        return dtype if rounded_once and dtype == param.dtype and dtype != torch.float16 else torch.float32

    def add(self, span: slice, x: Tensor, dlogits: Tensor) -> None:
        """Take in the chunk ``span`` with inputs ``x`` ``[n, H]`` and ``dlogits`` ``[n, V]``."""
        hidden_grad, weight_grad, bias_grad = self.sums
        if self.wanted[0]:
            index = self.chunks.rows.index
            if index is None:
                mm_into(hidden_grad[span], dlogits, self.chunks.weight)
            else:
                out = torch.empty(x.shape, dtype=hidden_grad.dtype, device=x.device)
                hidden_grad.index_copy_(0, index[span], mm_into(out, dlogits, self.chunks.weight))
        if self.wanted[1] and weight_grad is None:
            weight = self.params[1]
            dtype = self._sum_dtype(weight, rounded_once=self.chunks.single)
            self.sums[1] = mm_into(torch.empty(weight.shape, dtype=dtype, device=weight.device), dlogits.t(), x)
        elif self.wanted[1]:
            add_mm_into(weight_grad, dlogits.t(), x)
        if self.wanted[2]:
            column_sums = dlogits.sum(0, dtype=torch.float32)
            self.sums[2] = column_sums if bias_grad is None else bias_grad.add_(column_sums)

    def finish(self) -> list[Tensor | None]:
        """The three gradients, ``None`` where not wanted: in the parameter's dtype, or fp32 after fp16 GEMMs."""
        late = self.chunks.weight.dtype == torch.float16
        out = []
        for i, (param, wanted) in enumerate(zip(self.params, self.wanted, strict=True)):
            total, self.sums[i] = self.sums[i], None
            if wanted and total is None:
                total = torch.zeros(param.shape, dtype=torch.float32 if late else param.dtype, device=param.device)
            out.append(total if total is None or late else total.to(param.dtype))
            del total
        return out
