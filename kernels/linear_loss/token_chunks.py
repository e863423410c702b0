"""The vocabulary projection in chunks of tokens: which rows count, how many at a time, logits out, gradients in.

All GEMMs are cuBLAS through torch. A chunk's logits live in one reused buffer and become its dlogits there; gradients
of weight and bias are summed in fp32 over the chunks and rounded once. slabs.py cuts the logits the other way.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..runtime.launch import cdiv
from .weight_sum import WeightSum, bytes_over_gradient, mm_into

ROW_ALIGNMENT = 16  # elements: rows of the logits buffer start on 32 bytes whatever the vocabulary
CHUNK_ALIGNMENT = 128  # tokens: a GEMM tile
# Many large chunks are multiples of more: GEMMs of 1408 or 1664 tokens take 5 to 10 % longer a token than those of 1536
# (benchmarks/NOTES.md), which outweighs a last chunk of another size.
LARGE_CHUNK_ALIGNMENT, MANY_CHUNKS = 512, 4


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


def logits_width(columns: int) -> int:
    """Columns of a buffer for logits of so many."""
    return cdiv(columns, ROW_ALIGNMENT) * ROW_ALIGNMENT


def rows_per_chunk(num_rows: int, vocab_size: int, itemsize: int, budget_mib: float) -> int:
    """Tokens whose logits fit in ``budget_mib``, in about equal chunks of sizes that GEMMs like."""
    limit = max(1, int(budget_mib * 2**20) // (logits_width(vocab_size) * itemsize))
    if limit >= 2 * LARGE_CHUNK_ALIGNMENT and num_rows > MANY_CHUNKS * limit:
        return equal_parts(num_rows, limit, LARGE_CHUNK_ALIGNMENT)
    return equal_parts(num_rows, limit, CHUNK_ALIGNMENT if limit >= CHUNK_ALIGNMENT else 1)


def equal_parts(total: int, limit: int, unit: int) -> int:
    """The size of as few equal parts of ``total`` as possible, each a multiple of ``unit`` and at most ``limit``."""
    if limit >= total:
        return total
    limit -= limit % unit
    return min(limit, cdiv(cdiv(total, cdiv(total, limit)), unit) * unit)


class LinearChunks:
    """``hidden @ weight.T + bias`` for the valid rows, a chunk at a time, in the GEMMs' dtype.

    Chunks are of the budget, but all rows are one where that takes no more memory than a chunk and the sum of the
    weight's gradient over several, which one does not need: leaner, and without the sum's traffic.

    ``wanted``: which of hidden, weight and bias get a gradient while the chunks are there.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: ValidRows, dtype: torch.dtype,
        budget_mib: float, wanted: tuple[bool, bool, bool],
    ):  # fmt: skip
        self.hidden, self.rows, self.wanted = hidden, rows, wanted
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.size = rows_per_chunk(rows.count, weight.shape[0], dtype.itemsize, budget_mib)
        sum_bytes = bytes_over_gradient(weight, self.grad_dtype(weight))
        if wanted[1] and self._all_at_once() <= self._in_chunks() + sum_bytes:
            self.size = rows.count

    def _all_at_once(self) -> int:
        """The bytes of one chunk of all rows when the weight's gradient is made: last, and the largest."""
        return self.rows.count * self._row_bytes()

    def _in_chunks(self) -> int:
        """Those of a chunk of ``size`` rows when their gradient of hidden is made: a copy where they were gathered."""
        gathered = self.rows.index is not None and self.wanted[0]
        copy = self.weight.shape[1] * self.grad_dtype(self.hidden).itemsize if gathered else 0
        return self.size * (self._row_bytes() + copy)

    def _row_bytes(self) -> int:
        """A row's logits, and its hidden state where that is a copy: gathered, or in another dtype."""
        vocab_size, width = self.weight.shape
        copied = self.rows.index is not None or self.hidden.dtype != self.weight.dtype
        return (logits_width(vocab_size) + (width if copied else 0)) * self.weight.dtype.itemsize

    @property
    def single(self) -> bool:
        """Whether one chunk holds all rows."""
        return self.size >= self.rows.count

    def grad_dtype(self, param: Tensor) -> torch.dtype:
        """The dtype in which this projection's gradient of ``param`` is formed."""
        return gradient_dtype(param, self.weight.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield ``(span of the valid rows, hidden [n, H], logits [n, V])``; the logits' memory is used again."""
        if self.rows.count == 0:
            return
        vocab_size = self.weight.shape[0]
        buffer = torch.empty((self.size, logits_width(vocab_size)), dtype=self.weight.dtype, device=self.weight.device)
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
    """Gradients of hidden, weight and bias, gathered chunk by chunk; those that ``chunks`` does not want cost nothing.

    fp16 GEMMs: sums stay fp32 until ``scale_gradients`` rounds them, because their scale is applied that late.
    """

    def __init__(self, chunks: LinearChunks, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.chunks, self.wanted = chunks, chunks.wanted
        self.params = (hidden, weight, bias)
        self.hidden_grad = self.weight_sum = self.weight_grad = self.bias_grad = None
        if self.wanted[0]:
            make = torch.empty if chunks.rows.index is None else torch.zeros
            self.hidden_grad = make(hidden.shape, dtype=chunks.grad_dtype(hidden), device=hidden.device)
        if self.wanted[1] and not chunks.single and chunks.rows.count:
            self.weight_sum = WeightSum(weight, chunks.grad_dtype(weight))

    def add(self, span: slice, x: Tensor, dlogits: Tensor) -> None:
        """Take in the chunk ``span`` with inputs ``x`` ``[n, H]`` and ``dlogits`` ``[n, V]``."""
        if self.wanted[0]:
            index = self.chunks.rows.index
            if index is None:
                mm_into(self.hidden_grad[span], dlogits, self.chunks.weight)
            else:
                out = torch.empty(x.shape, dtype=self.hidden_grad.dtype, device=x.device)
                self.hidden_grad.index_copy_(0, index[span], mm_into(out, dlogits, self.chunks.weight))
                del out  # before the weight's gradient is made
        if self.weight_sum is not None:
            self.weight_sum.add(dlogits, x)
        elif self.wanted[1]:
            weight = self.params[1]
            out = torch.empty(weight.shape, dtype=self.chunks.grad_dtype(weight), device=weight.device)
            self.weight_grad = mm_into(out, dlogits.t(), x)
        if self.wanted[2]:
            column_sums = dlogits.sum(0, dtype=torch.float32)
            self.bias_grad = column_sums if self.bias_grad is None else self.bias_grad.add_(column_sums)

    def finish(self) -> list[Tensor | None]:
        """The three gradients, ``None`` where not wanted: in the parameter's dtype, or fp32 after fp16 GEMMs."""
        if self.weight_sum is not None:
            self.weight_grad, self.weight_sum = self.weight_sum.finish(), None
        return in_gradient_dtypes(
            [self.hidden_grad, self.weight_grad, self.bias_grad], self.params, self.wanted, self.chunks.weight.dtype
        )


def gradient_dtype(param: Tensor, gemm_dtype: torch.dtype) -> torch.dtype:
    """What a gradient that is rounded once may be written in; fp16 GEMMs leave fp32, because their scale comes late."""
    return gemm_dtype if gemm_dtype == param.dtype and gemm_dtype != torch.float16 else torch.float32


def in_gradient_dtypes(
    grads: list[Tensor | None], params: Sequence[Tensor | None], wanted: Sequence[bool], gemm_dtype: torch.dtype
) -> list[Tensor | None]:
    """``grads`` as they are handed on: zeros where wanted and still ``None``, in the parameters' dtype or late fp32."""
    out = []
    for i, (param, want) in enumerate(zip(params, wanted, strict=True)):
        grad, grads[i] = grads[i], None  # so that converting one does not keep both
        if want:
            dtype = torch.float32 if gemm_dtype == torch.float16 else param.dtype
            grad = torch.zeros(param.shape, dtype=dtype, device=param.device) if grad is None else grad.to(dtype)
        out.append(grad)
        del grad
    return out
