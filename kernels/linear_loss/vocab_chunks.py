"""The vocabulary projection in slabs of the vocabulary: all tokens at once, some thousand columns of logits at a time.

Two passes. The first streams the slabs and keeps each row's statistics, among them lse; the second computes each slab
again, now knowing lse, turns it to dlogits, and has ``dweight[slab] = dlogits.T @ x`` in one GEMM over all tokens,
rounded once into its place: no sum over chunks, no fp32 copy of dweight. The price is a fourth GEMM, and dhidden, which
is summed over the slabs in fp32. It is the better way wherever the logits must be computed twice in any case.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import LogitTransform
from .slab_rows import NUM_SUMS, RowCoefficients, slab_dlogits_rows, slab_stats_rows
from .softmax_rows import NUM_STATS
from .token_chunks import ROW_ALIGNMENT, ValidRows, equal_parts, gradient_dtype, in_gradient_dtypes, logits_width
from .weight_sum import add_mm_into, mm_into

SLAB_ALIGNMENT = 256  # columns: a GEMM tile
DENSE_SHARE = 0.9  # with this share of rows valid, computing the others too costs less than copying the valid ones


class RowStats(NamedTuple):
    """lse ``[n]``, and in the order of ``TokenLogProbs`` five statistics ``[5, n]``, all fp32.

    Two of them are zeros unless all statistics were asked for: entropy and ``log(sum p^2)``.
    """

    lse: Tensor
    fields: Tensor


def compute_ignored_too(rows: ValidRows, labels: Tensor) -> ValidRows:
    """``rows``, or all rows of ``labels`` ``[N]`` where so few are ignored that a copy of the others would not pay."""
    if rows.index is None or rows.count < DENSE_SHARE * rows.num_rows:
        return rows
    return ValidRows(labels.contiguous(), None, rows.num_rows)


def columns_per_slab(num_rows: int, vocab_size: int, itemsize: int, budget_mib: float) -> int:
    """Columns whose logits fit in ``budget_mib``, in equal slabs of whole GEMM tiles where the budget holds one."""
    limit = int(budget_mib * 2**20) // (max(num_rows, 1) * itemsize)
    unit = SLAB_ALIGNMENT if limit >= SLAB_ALIGNMENT else ROW_ALIGNMENT
    return equal_parts(vocab_size, max(limit, unit), unit)


class VocabSlabs:
    """``hidden @ weight.T + bias`` of the given rows, a slab of columns at a time, in the GEMMs' dtype."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: ValidRows, dtype: torch.dtype,
        budget_mib: float,
    ):  # fmt: skip
        self.params, self.rows, self.dtype = (hidden, weight, bias), rows, dtype
        self.x = (hidden if rows.index is None else hidden.index_select(0, rows.index)).to(dtype)
        width = columns_per_slab(rows.count, weight.shape[0], self.x.element_size(), budget_mib)
        self.spans = [slice(i, min(i + width, weight.shape[0])) for i in range(0, weight.shape[0], width)]
        self.width = logits_width(width)
        self.buffer: Tensor | None = None
        self.held: slice | None = None  # whose logits the buffer holds

    def weight(self, span: slice) -> Tensor:
        """The rows ``span`` of the weight in the GEMMs' dtype."""
        return self.params[1][span].to(self.dtype)

    def logits(self, span: slice) -> Tensor:
        """Logits ``[n, columns of the span]`` in the one buffer that all slabs use."""
        if self.buffer is None:
            self.buffer = torch.empty((self.rows.count, self.width), dtype=self.dtype, device=self.x.device)
            self.buffer[:, span.stop - span.start :].zero_()  # GEMMs on CPU read the padding, times zero
        out = self.buffer[:, : span.stop - span.start]
        if span != self.held:
            bias = self.params[2]
            if bias is None:
                torch.mm(self.x, self.weight(span).t(), out=out)
            else:
                torch.addmm(bias[span].to(self.dtype), self.x, self.weight(span).t(), out=out)
            self.held = span
        return out

    def statistics(self, transform: LogitTransform, *, all_stats: bool) -> RowStats:
        """The first pass."""
        count, labels, vocab_size = self.rows.count, self.rows.labels, self.params[1].shape[0]
        sums = torch.zeros((NUM_SUMS, count), dtype=torch.float32, device=self.x.device)
        argmax = torch.empty(count, dtype=torch.int32, device=self.x.device)
        if count:
            for span in self.spans:
                slab_stats_rows(self.logits(span), labels, sums, argmax, span.start, transform, all_stats=all_stats)
        peak, total, target, sum_z, sum_w, sum_q = sums
        log_sum = total.log()
        fields = torch.zeros((NUM_STATS, count), dtype=torch.float32, device=self.x.device)
        fields[0] = target - peak - log_sum
        fields[2] = argmax == labels
        fields[4] = sum_z / vocab_size
        if all_stats:
            fields[1] = log_sum - sum_w / total
            fields[3] = sum_q.log() - 2.0 * log_sum
        return RowStats(peak + log_sum, fields)

    def backwards(self) -> Iterator[slice]:
        """The slabs from the last to the first: a second pass finds the last one's logits still in the buffer."""
        return reversed(self.spans)

    def gradients(
        self, lse: Tensor, coefficients: RowCoefficients, transform: LogitTransform, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The second pass: gradients of hidden ``[N, H]``, weight and bias, ``None`` where not wanted.

        In the parameters' dtype, or fp32 after fp16 GEMMs. The buffer is given up.
        """
        hidden, weight, bias = self.params
        hidden_grad = weight_grad = bias_grad = None
        if self.rows.count:
            if wanted[1]:
                dtype = gradient_dtype(weight, self.dtype)
                weight_grad = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            if wanted[2]:
                bias_grad = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
            for span in self.backwards():
                dlogits = self.logits(span)
                slab_dlogits_rows(dlogits, self.rows.labels, lse, coefficients, span.start, transform)
                self.held = None
                if wanted[1]:
                    mm_into(weight_grad[span], dlogits.t(), self.x)
                if wanted[2]:
                    torch.sum(dlogits, 0, dtype=torch.float32, out=bias_grad[span])
                if wanted[0]:
                    hidden_grad = self._add_hidden(hidden_grad, dlogits, span)
                del dlogits
            self.buffer = None
            if wanted[0] and self.rows.index is not None:
                compact = hidden_grad.to(gradient_dtype(hidden, self.dtype))
                hidden_grad = compact.new_zeros(hidden.shape).index_copy_(0, self.rows.index, compact)
        return in_gradient_dtypes([hidden_grad, weight_grad, bias_grad], self.params, wanted, self.dtype)

    def _add_hidden(self, total: Tensor | None, dlogits: Tensor, span: slice) -> Tensor:
        if total is not None:
            return add_mm_into(total, dlogits, self.weight(span))
        dtype = gradient_dtype(self.params[0], self.dtype) if len(self.spans) == 1 else torch.float32
        return mm_into(torch.empty(self.x.shape, dtype=dtype, device=self.x.device), dlogits, self.weight(span))
