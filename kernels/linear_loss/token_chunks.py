"""The vocabulary projection in chunks of tokens.

``forward_by_tokens`` computes all logits once, ``gradients_by_tokens`` once more.
All GEMMs are torch's (cuBLAS on NVIDIA GPUs). A chunk's logits live in one reused buffer and become its dlogits there;
gradients of weight and bias are summed in fp32 over the chunks and rounded once. vocab_chunks.py cuts the logits by
vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..runtime.launch import cdiv
from .chunk_sizes import ChunkBytes, logits_width, rows_per_chunk, rows_with_weight
from .gradients import WeightSum, bytes_over_gradient, gradient_dtype, in_gradient_dtypes, mm_into
from .options import NOTHING_WANTED, NUM_STATS, Gradients, HeadOptions, Params, Wanted, sum_dtype
from .plain_rows import halved_on_cpu
from .rows import RowCoefficients, dlogits_rows, empty_rows, loss_rows


class ValidRows(NamedTuple):
    """Positions that are not ignored: their labels ``[n]``, and their indices or ``None`` when none is ignored."""

    labels: Tensor
    index: Tensor | None
    num_rows: int

    @property
    def count(self) -> int:
        """The number of these positions."""
        return self.labels.shape[0]

    def select(self, per_token: Tensor) -> Tensor:
        """The entries of ``per_token`` ``[num_rows]`` at these positions, contiguous."""
        return per_token.contiguous() if self.index is None else per_token.index_select(0, self.index)

    def gradient(self, per_token: Tensor | None, token_weights: Tensor | None = None) -> Tensor | None:
        """``select`` of an upstream gradient in at least fp32, times ``token_weights``; ``None`` stays ``None``."""
        if per_token is None:
            return None
        grad = self.select(per_token.to(sum_dtype(per_token.dtype)))
        return grad if token_weights is None else grad * self.select(token_weights)

    def spread(self, values: Tensor) -> Tensor:
        """A fresh ``[num_rows]`` with ``values`` at these positions and zeros elsewhere."""
        if self.index is None:
            return values.clone()
        return values.new_zeros(self.num_rows).index_copy_(0, self.index, values)


def valid_rows(labels: Tensor, vocab_size: int, ignore_index: int) -> ValidRows:
    """The rows of ``labels`` ``[N]`` to compute. This is the one place where the host waits for the device.

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


class PerToken(NamedTuple):
    """The results of a forward pass for the ``n`` valid rows.

    ``loss`` and ``lse`` are ``[n]`` in ``HeadOptions.sum_dtype``. ``stats`` are ``[5, n]`` in the order of
    ``TokenLogProbs``, or ``None``.
    ``grads`` are ``None`` where they are not wanted.
    """

    loss: Tensor
    lse: Tensor
    stats: Tensor | None
    grads: Gradients
    predicted: Tensor | None


class TokenChunks:
    """``hidden @ weight.T + bias`` for the valid rows, one chunk at a time, in the GEMMs' dtype.

    The size of a chunk follows from the budget. If the weight gets a gradient, a chunk may be larger than the budget
    (see ``rows_with_weight``), and many logits on a CPU are cut into at least two chunks (see ``halved_on_cpu``).

    Args:
        params: hidden, weight and bias.
        rows: the rows to compute.
        options: the op's options.
        wanted: which of hidden, weight and bias get a gradient while the chunks are there.
    """

    def __init__(self, params: Params, rows: ValidRows, options: HeadOptions, wanted: Wanted) -> None:
        self.hidden, weight, bias = params
        self.rows, self.wanted, dtype = rows, wanted, options.dtype
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        count, vocab_size, memory = rows.count, weight.shape[0], options.memory
        self.size = rows_per_chunk(count, vocab_size, dtype.itemsize, memory.buffer_mib)
        if not wanted[1]:
            return
        taken = self._bytes()
        if taken.weight_sum == 0 and halved_on_cpu(weight, count * vocab_size):
            self.size = min(self.size, cdiv(count, 2))
        else:
            self.size = rows_with_weight(count, vocab_size, dtype.itemsize, taken, memory, weight.device)

    def _bytes(self) -> ChunkBytes:
        """The memory that the chunks take.

        Rows of hidden that are gathered or cast are copies, which take memory too.
        """
        vocab_size, width = self.weight.shape
        gathered, dtype = self.rows.index is not None, self.weight.dtype
        copied = gathered or self.hidden.dtype != dtype
        hidden_dtype, weight_dtype = self.grad_dtype(self.hidden), self.grad_dtype(self.weight)
        of_hidden = self.hidden.numel() * hidden_dtype.itemsize if self.wanted[0] else 0
        return ChunkBytes(
            row=(logits_width(vocab_size) + (width if copied else 0)) * dtype.itemsize,
            row_copy=width * hidden_dtype.itemsize if gathered and self.wanted[0] else 0,
            weight_sum=bytes_over_gradient(vocab_size, width, weight_dtype),
            gradients=of_hidden + self.weight.numel() * weight_dtype.itemsize,
        )

    @property
    def single(self) -> bool:
        """Whether one chunk holds all rows."""
        return self.size >= self.rows.count

    def grad_dtype(self, param: Tensor) -> torch.dtype:
        """Dtype in which the gradient of ``param`` is computed."""
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

    After fp16 GEMMs the sums stay in fp32 until ``scale_gradients`` has applied their scale. It then rounds them.
    """

    def __init__(self, chunks: TokenChunks, params: Params) -> None:
        self.chunks, self.params, self.wanted = chunks, params, chunks.wanted
        hidden, weight, _ = params
        self.hidden_grad: Tensor | None = None
        self.weight_sum: WeightSum | None = None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        if self.wanted[0]:
            make = torch.empty if chunks.rows.index is None else torch.zeros
            self.hidden_grad = make(hidden.shape, dtype=chunks.grad_dtype(hidden), device=hidden.device)
        if self.wanted[1] and not chunks.single and chunks.rows.count:
            self.weight_sum = WeightSum(weight, chunks.grad_dtype(weight))

    def add(self, span: slice, x: Tensor, dlogits: Tensor) -> None:
        """Add the chunk ``span`` with inputs ``x`` ``[n, H]`` and ``dlogits`` ``[n, V]``."""
        if self.hidden_grad is not None:
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
            column_sums = dlogits.sum(0, dtype=sum_dtype(dlogits.dtype))
            self.bias_grad = column_sums if self.bias_grad is None else self.bias_grad.add_(column_sums)

    def finish(self) -> Gradients:
        """The gradients: ``None`` where not wanted, in the parameter's dtype, or fp32 after fp16 GEMMs."""
        if self.weight_sum is not None:
            self.weight_grad, self.weight_sum = self.weight_sum.finish(), None
        return in_gradient_dtypes(
            [self.hidden_grad, self.weight_grad, self.bias_grad], self.params, self.wanted, self.chunks.weight.dtype
        )


def forward_by_tokens(
    params: Params, rows: ValidRows, options: HeadOptions, grad_scale: float | None, token_weights: Tensor | None,
    num_items: Tensor | None,
) -> PerToken:  # fmt: skip
    """Losses and statistics and, if there is a ``grad_scale``, the gradients of the losses' scaled sum."""
    row_weights = None if token_weights is None else rows.select(token_weights)
    like = {"device": params[0].device, "dtype": options.sum_dtype}
    loss, lse = empty_rows(rows.count, **like), empty_rows(rows.count, **like)
    stats = empty_rows(NUM_STATS * rows.count, **like).view(NUM_STATS, -1) if options.stats else None
    predicted = torch.empty(rows.count, dtype=torch.int64, device=params[0].device) if options.predictions else None
    chunks = TokenChunks(params, rows, options, NOTHING_WANTED if grad_scale is None else options.wanted)
    sums = GradientSums(chunks, params)
    for span, x, logits in chunks:
        if predicted is not None:  # before dlogits are written over the logits
            predicted[span] = logits.argmax(-1) if options.transform.inner >= 0 else logits.argmin(-1)
        loss_rows(
            logits, rows.labels[span], loss[span], lse[span], options.transform, ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing, z_loss=options.z_loss,
            token_weights=None if row_weights is None else row_weights[span],
            stats=None if stats is None else stats[:, span], level=options.stats, grad_scale=grad_scale,
            num_items=num_items,
        )  # fmt: skip
        if grad_scale is not None:
            sums.add(span, x, logits)
        del logits
    return PerToken(loss, lse, stats, sums.finish(), predicted)


def gradients_by_tokens(
    params: Params, rows: ValidRows, lse: Tensor, coefficients: RowCoefficients, options: HeadOptions
) -> Gradients:
    """The wanted gradients, from logits that are computed again."""
    chunks = TokenChunks(params, rows, options, options.wanted)
    sums = GradientSums(chunks, params)
    for span, x, logits in chunks:
        dlogits_rows(logits, rows.labels[span], lse[span], coefficients.select(span), options.transform)
        sums.add(span, x, logits)
    return sums.finish()
