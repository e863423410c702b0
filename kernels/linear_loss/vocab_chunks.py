"""The vocabulary projection in vocabulary chunks: all tokens at once, some thousand columns of logits at a time.

There are two passes. The first goes through the chunks and collects each row's statistics, among them lse. The second
computes each chunk's logits again, overwrites them with dlogits using the lse now known, and gets
``dweight[chunk] = dlogits.T @ x`` in one GEMM over all tokens, rounded once into its place: no sum over chunks, no fp32
copy of dweight. The price is a fourth GEMM, and dhidden, which is summed over the chunks in fp32. This is the better
way wherever the logits must be computed twice anyway.

Not all logits are: until dweight is written, its memory is free, and keeps the logits of the first chunks from the
first pass to the second. Of N tokens that is a share of about H / N, and of up to H tokens nearly all logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.launch import cdiv
from .chunk_sizes import columns_per_chunk, lent_chunks, logits_width
from .gradients import add_mm_into, gradient_dtype, in_gradient_dtypes, is_sum_dtype, mm_into
from .options import Gradients, HeadOptions, Params
from .plain_rows import halved_on_cpu
from .rows import ChunkStats, RowCoefficients, dlogits_rows, row_coefficients, token_loss
from .token_chunks import PerToken, ValidRows

DENSE_SHARE = 0.9  # with this share of rows valid, computing the others too costs less than copying the valid ones


def compute_ignored_too(rows: ValidRows, labels: Tensor) -> ValidRows:
    """``rows``, or all rows of ``labels`` ``[N]`` where so few are ignored that a copy of the others would not pay."""
    if rows.index is None or rows.count < DENSE_SHARE * rows.num_rows:
        return rows
    return ValidRows(labels.contiguous(), None, rows.num_rows)


class VocabChunks:
    """``hidden @ weight.T + bias`` of the given rows, one chunk of columns at a time, in the GEMMs' dtype."""

    def __init__(self, params: Params, rows: ValidRows, options: HeadOptions) -> None:
        self.params, self.rows, self.options, self.dtype = params, rows, options, options.dtype
        hidden, weight, _ = params
        self.x = (hidden if rows.index is None else hidden.index_select(0, rows.index)).to(self.dtype)
        self.vocab_size = weight.shape[0]
        itemsize = self.dtype.itemsize
        budget_mib = options.memory.vocab_chunk_mib(rows.count, itemsize)
        width = columns_per_chunk(rows.count, self.vocab_size, itemsize, budget_mib)
        if is_sum_dtype(self.dtype) and halved_on_cpu(weight, rows.count * self.vocab_size):
            width = min(width, cdiv(self.vocab_size, 2))
        self.spans = [slice(i, min(i + width, self.vocab_size)) for i in range(0, self.vocab_size, width)]
        self.width = logits_width(width)
        self.buffer: Tensor | None = None
        self.in_buffer = -1  # first column of the chunk whose logits the buffer holds
        self.ready: dict[int, Tensor] = {}  # logits that have been computed and are still there, by first column
        self.lent: list[Tensor] = []  # places for the logits of the first chunks, in the weight's gradient
        self.weight_grad: Tensor | None = None

    def weight(self, span: slice) -> Tensor:
        """The rows ``span`` of the weight in the GEMMs' dtype."""
        return self.params[1][span].to(self.dtype)

    def _place(self, span: slice) -> Tensor:
        """Where the logits of a chunk lie: in the weight's gradient, or in the one buffer that the others use."""
        number, columns = span.start // self.spans[0].stop, span.stop - span.start
        if number < len(self.lent):
            return self.lent[number][:, :columns]
        if self.buffer is None:
            self.buffer = self._padded(
                torch.empty(self.rows.count * self.width, dtype=self.dtype, device=self.x.device)
            )
        self.ready.pop(self.in_buffer, None)
        self.in_buffer = span.start
        return self.buffer[:, :columns]

    def _padded(self, memory: Tensor) -> Tensor:
        """``memory`` as ``[n, width]``, zero beyond the columns of a chunk: GEMMs on CPU read the padding, times 0."""
        place = memory.view(self.rows.count, self.width)
        place[:, self.spans[0].stop :].zero_()
        return place

    def logits(self, span: slice) -> Tensor:
        """Logits ``[n, columns of the span]``, computed unless they are still there."""
        if span.start not in self.ready:
            out, bias = self._place(span), self.params[2]
            if bias is None:
                torch.mm(self.x, self.weight(span).t(), out=out)
            else:
                torch.addmm(bias[span].to(self.dtype), self.x, self.weight(span).t(), out=out)
            self.ready[span.start] = out
        return self.ready[span.start]

    def _lend_weight_gradient(self) -> None:
        """Make the weight's gradient, and places in it for the logits of as many chunks as will fit."""
        weight = self.params[1]
        self.weight_grad = torch.empty(weight.shape, dtype=gradient_dtype(weight, self.dtype), device=weight.device)
        memory = self.weight_grad.view(-1).view(torch.uint8)
        size = self.rows.count * self.width * self.dtype.itemsize
        lent, start = lent_chunks(
            len(self.spans), size, self.spans[0].stop * memory.shape[0] // self.vocab_size, memory.shape[0]
        )
        places = memory[start : start + lent * size].view(self.dtype)
        self.lent = [self._padded(place) for place in places.chunk(lent)] if lent else []

    def statistics(self, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The first pass: lse ``[n]``, statistics ``[5, n]`` and the most probable tokens ``[n]``.

        ``with_gradients`` says whether ``gradients`` will follow, for which logits are kept.
        """
        options = self.options
        stats = ChunkStats(self.rows.labels, options.transform, options.stats > 0, options.sum_dtype)
        if self.rows.count:
            if with_gradients and options.wanted[1]:
                self._lend_weight_gradient()
            for span in self.spans:
                stats.add(self.logits(span), span.start)
        return *stats.finish(self.vocab_size), stats.argmax

    def gradients(self, lse: Tensor, coefficients: RowCoefficients, wanted: Sequence[bool]) -> Gradients:
        """The second pass: gradients of hidden ``[N, H]``, weight and bias, ``None`` where not wanted.

        They are in the parameters' dtypes, or in fp32 after fp16 GEMMs. All other memory is freed.
        """
        hidden, weight, _ = self.params
        hidden_grad = bias_grad = None
        if self.rows.count:
            if wanted[2]:
                bias_grad = torch.empty(self.vocab_size, dtype=self.options.sum_dtype, device=weight.device)
            lent = len(self.lent)
            # Kept logits go first, as what follows is written over them; then the last chunk, still in the buffer.
            for span in [*self.spans[:lent], *reversed(self.spans[lent:])]:
                dlogits = self.logits(span)
                dlogits_rows(dlogits, self.rows.labels, lse, coefficients, self.options.transform, span.start)
                del self.ready[span.start]
                if wanted[1]:
                    if self.weight_grad is None:  # after the first dlogits, which takes memory on a CPU
                        dtype = gradient_dtype(weight, self.dtype)
                        self.weight_grad = torch.empty(weight.shape, dtype=dtype, device=weight.device)
                    mm_into(self.weight_grad[span], dlogits.t(), self.x)
                if bias_grad is not None:
                    torch.sum(dlogits, 0, dtype=bias_grad.dtype, out=bias_grad[span])
                if wanted[0]:
                    hidden_grad = self._add_hidden(hidden_grad, dlogits, span)
                del dlogits
            self.buffer, self.lent = None, []
            if hidden_grad is not None and self.rows.index is not None:
                compact = hidden_grad.to(gradient_dtype(hidden, self.dtype))
                hidden_grad = compact.new_zeros(hidden.shape).index_copy_(0, self.rows.index, compact)
        grads: Gradients = [hidden_grad, self.weight_grad, bias_grad]
        self.weight_grad = None
        return in_gradient_dtypes(grads, self.params, wanted, self.dtype)

    def _add_hidden(self, total: Tensor | None, dlogits: Tensor, span: slice) -> Tensor:
        if total is not None:
            return add_mm_into(total, dlogits, self.weight(span))
        dtype = gradient_dtype(self.params[0], self.dtype) if len(self.spans) == 1 else self.options.sum_dtype
        return mm_into(torch.empty(self.x.shape, dtype=dtype, device=self.x.device), dlogits, self.weight(span))


def forward_by_vocabulary(
    params: Params, labels: Tensor, rows: ValidRows, options: HeadOptions, grad_scale: float | None,
    token_weights: Tensor | None, num_items: Tensor | None,
) -> PerToken:  # fmt: skip
    """The same as ``forward_by_tokens``, with the logits computed twice where there are gradients."""
    computed = compute_ignored_too(rows, labels)
    chunks = VocabChunks(params, computed, options)
    lse, stats, predicted = chunks.statistics(grad_scale is not None)
    factors = (options.label_smoothing, options.z_loss)
    loss = token_loss(lse, stats, *factors)
    row_weights = torch.ones_like(lse) if token_weights is None else computed.select(token_weights).to(lse.dtype)
    if computed is not rows:
        row_weights = row_weights.masked_fill(computed.labels == options.ignore_index, 0.0)
    loss *= row_weights
    grads: Gradients = [None, None, None]
    if grad_scale is not None:
        row_grad = row_weights * grad_scale if num_items is None else row_weights * grad_scale / num_items
        coefficients = row_coefficients(row_grad, lse, chunks.vocab_size, *factors)
        grads = chunks.gradients(lse, coefficients, options.wanted)
    if computed is not rows and rows.index is not None:
        loss, lse, stats, predicted = (t.index_select(-1, rows.index) for t in (loss, lse, stats, predicted))
    return PerToken(
        loss, lse, stats if options.stats else None, grads, predicted.long() if options.predictions else None
    )
