"""The kernels of row_kernels.py in plain PyTorch, for devices without Triton and for fp64.

The formulas are the same. ``row_blocks`` cuts the rows into blocks whose intermediate results stay in a CPU's cache and
add little to the memory that the logits take.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..runtime.autograd import Function, differentiate
from ..runtime.launch import cdiv, use_triton
from .options import LogitTransform

BLOCK_ELEMENTS = 2**18  # 1 MiB in fp32
SMALL_BLOCK_ELEMENTS = 2**14  # below this, the host's time for a block is longer than its computation
MIN_BLOCKS = 8  # of larger logits, so that a block takes much less memory than they do


def runs_kernels(logits: Tensor) -> bool:
    """Whether the row functions launch kernels for ``logits``."""
    return use_triton(logits) and logits.dtype != torch.float64


def halved_on_cpu(weight: Tensor, num_logits: int) -> bool:
    """Whether logits go in two chunks at least, although the budget holds them all and the sums need no copy.

    Then a head whose weight is larger than its logits takes less memory than PyTorch's, too. The GEMMs lose nothing.
    """
    return not runs_kernels(weight) and num_logits > BLOCK_ELEMENTS


def row_blocks(num_cols: int, labels: Tensor, ignore_index: int | None = None) -> Iterator[slice | Tensor]:
    """Indices of blocks of rows, without those whose label in ``labels`` ``[n]`` is ``ignore_index``."""
    rows, num_rows = None, labels.shape[0]
    if ignore_index is not None and (valid := (labels != ignore_index).nonzero().squeeze(1)).shape[0] < num_rows:
        rows, num_rows = valid, valid.shape[0]
    elements = max(SMALL_BLOCK_ELEMENTS, min(BLOCK_ELEMENTS, cdiv(num_rows * num_cols, MIN_BLOCKS)))
    step = max(1, elements // num_cols)
    for start in range(0, num_rows, step):
        block = slice(start, min(start + step, num_rows))
        yield block if rows is None else rows[block]


def _transformed(logits: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """``z`` in at least fp32, which may be ``logits`` itself, and ``dz / dlogits``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if transform.has_softcap:
        squashed = (wide * transform.inner).tanh_()
        slope = squashed.square().neg_().add_(1.0).mul_(transform.inner * transform.outer)
        return squashed.mul_(transform.outer), slope
    return wide if transform.inner == 1.0 else wide * transform.inner, transform.inner


def _label_columns(labels: Tensor, first_col: int, num_cols: int) -> tuple[Tensor, Tensor]:
    """The label's column ``[n, 1]`` in a chunk of columns, and whether it is there ``[n, 1]``; if not, any column."""
    columns = (labels.long() - first_col).unsqueeze(1)
    return columns.clamp(0, num_cols - 1), (columns >= 0) & (columns < num_cols)


def add_chunk_stats(
    logits: Tensor, labels: Tensor, sums: Tensor, argmax: Tensor, first_col: int, transform: LogitTransform,
    all_stats: bool,
) -> None:  # fmt: skip
    """Merge the statistics of ``logits`` ``[n, num_cols]`` into ``sums`` ``[6, n]`` and ``argmax`` ``[n]``.

    Args:
        logits: the columns of the rows from ``first_col`` on; those from 0 on come first.
        labels: ``[n]``.
        sums: see ``NUM_SUMS`` in rows.py.
        argmax: int32.
        first_col: 0 starts the sums.
        transform: from ``logits`` to z.
        all_stats: also the sums for entropy and ``log(sum p^2)``.
    """
    z, _ = _transformed(logits, transform)
    columns, here = _label_columns(labels, first_col, z.shape[1])
    sums[2] = torch.where(here, z.gather(1, columns), sums[2].unsqueeze(1)).squeeze(1)
    peak, first = z.max(-1)
    total_z = z.sum(-1)
    shifted = z - peak.unsqueeze(1)
    if all_stats:
        e = shifted.exp()
        w = shifted.mul_(e).sum(-1)
        s = e.sum(-1)
        q = e.square_().sum(-1)
    else:
        s, w, q = shifted.exp_().sum(-1), sums[4], sums[5]
    if first_col:
        old_peak, old_s, _, old_z, old_w, old_q = sums
        first = torch.where(peak > old_peak, first + first_col, argmax)
        top = torch.maximum(peak, old_peak)
        shift, old_shift = peak - top, old_peak - top
        factor, old_factor = shift.exp(), old_shift.exp()
        if all_stats:
            w = (w + shift * s) * factor + (old_w + old_shift * old_s) * old_factor
            q = q * factor.square() + old_q * old_factor.square()
        peak, s, total_z = top, s * factor + old_s * old_factor, total_z + old_z
    for row, value in zip((0, 1, 3, 4, 5), (peak, s, total_z, w, q), strict=True):
        sums[row] = value
    argmax.copy_(first)


def dlogits(
    logits: Tensor, labels: Tensor, lse: Tensor, a: Tensor, b: Tensor | None, c: Tensor, d: Tensor,
    transform: LogitTransform, first_col: int = 0,
) -> Tensor:  # fmt: skip
    """The gradient of ``logits`` ``[n, num_cols]`` in at least fp32, from the rows' coefficients ``[n]``."""
    z, slope = _transformed(logits, transform)
    columns, here = _label_columns(labels, first_col, z.shape[1])
    log_p = z - lse.unsqueeze(1)
    if b is None:
        grad = log_p.exp_().mul_(a.unsqueeze(1))
    else:
        grad = log_p.exp()
        grad.mul_(log_p.mul_(b.unsqueeze(1)).add_(a.unsqueeze(1)))
    grad.sub_(d.unsqueeze(1))
    grad.scatter_add_(1, columns, torch.where(here, -c.unsqueeze(1), 0.0))
    return grad if isinstance(slope, float) and slope == 1.0 else grad.mul_(slope)


class RowLosses(Function):
    """Losses ``[N]`` of rows of logits ``[N, V]`` and a teacher's, computed block by block, and again in backward."""

    @staticmethod
    def definition(row_losses: Callable, logits: Tensor, others: Tensor, mask: Tensor | None, *settings: Any) -> Tensor:
        """All rows at once."""
        return row_losses(logits, others, mask, *settings)

    @staticmethod
    def forward(
        ctx: Any, row_losses: Callable, logits: Tensor, others: Tensor, mask: Tensor | None, *settings: Any
    ) -> Tensor:
        """Keep the inputs."""
        ctx.save_for_backward(logits, others, mask)
        ctx.row_losses, ctx.settings = row_losses, settings
        losses = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
        for block in row_blocks(logits.shape[1], losses):
            losses[block] = row_losses(
                logits[block], others[block], None if mask is None else mask[block], *settings
            ).to(losses.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate block after block."""
        logits, others, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(RowLosses.definition, (ctx.row_losses, logits, others, mask, *ctx.settings), (grad,))
        dlogits = torch.empty_like(logits)
        for block in row_blocks(logits.shape[1], grad):
            x = logits[block].detach().requires_grad_()
            with torch.enable_grad():
                losses = ctx.row_losses(x, others[block], None if mask is None else mask[block], *ctx.settings)
            (dlogits[block],) = torch.autograd.grad(losses, x, grad[block].to(losses.dtype))
        return None, dlogits, None, None, *(None,) * len(ctx.settings)
