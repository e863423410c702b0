"""The reduction of per-token losses, with the factor that backward needs, in a fixed order and without a wait."""

import torch
from torch import Tensor

from ..runtime.launch import launcher, tl, triton

REDUCE_BLOCK = 4096


# ``debug`` keeps the assert; it would also add overflow checks, which the launch disables. The interpreter has no
# asserts; labels on the CPU are checked before.
@triton.jit(debug=True)
def _reduce_kernel(
    loss_ptr,  # [num_rows] fp32
    labels_ptr,  # [num_rows] int64 or int32
    num_items_ptr,  # [1] or None
    out_ptr,  # [1] fp32
    scale_ptr,  # [1] fp32, or None
    num_rows,
    num_cols,
    ignore_index,
    scale: float,
    MEAN: tl.constexpr,
    HAS_NUM_ITEMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    count = tl.zeros([BLOCK_ROWS], tl.int32)
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = rows < num_rows
        total += tl.load(loss_ptr + rows, mask=mask, other=0.0)
        label = tl.load(labels_ptr + rows, mask=mask, other=0)
        valid = mask & (label != ignore_index)
        count += valid.to(tl.int32)
        tl.device_assert(
            ~valid | ((label >= 0) & (label < num_cols)),
            "cross_entropy: a label is neither ignore_index nor in [0, V)",
        )
    if MEAN:
        scale = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    if HAS_NUM_ITEMS:
        scale = 1.0 / tl.load(num_items_ptr).to(tl.float32)
    tl.store(out_ptr, tl.sum(total, 0) * scale)
    if scale_ptr is not None:
        tl.store(scale_ptr, scale)


_launch_reduce = launcher(_reduce_kernel)


def reduced(
    token_loss: Tensor, labels: Tensor, scale: Tensor | None, num_cols: int, ignore_index: int, reduction: str,
    num_items: Tensor | float | None, *, by_kernel: bool,
) -> Tensor:  # fmt: skip
    """The loss, 0-d; ``scale`` (``[1]``), unless None, gets what the reduction multiplies by.

    The kernel also checks the labels against ``num_cols``: on CUDA a device-side assert.
    """
    if not by_kernel:
        divisor = _divisor(token_loss, labels, reduction, num_items, ignore_index)
        if scale is not None:
            scale.copy_(1.0 / divisor)
        return token_loss.sum() / divisor
    loss = torch.empty((), dtype=token_loss.dtype, device=token_loss.device)
    items_on_device = num_items if isinstance(num_items, Tensor) else None
    _launch_reduce(
        (1, 1, 1),
        (("num_warps", 16), ("sanitize_overflow", False)),
        loss_ptr=token_loss,
        labels_ptr=labels,
        num_items_ptr=items_on_device,
        out_ptr=loss,
        scale_ptr=scale,
        num_rows=token_loss.shape[0],
        num_cols=num_cols,
        ignore_index=ignore_index,
        scale=1.0 if num_items is None or items_on_device is not None else 1.0 / float(num_items),
        MEAN=reduction == "mean" and num_items is None,
        HAS_NUM_ITEMS=items_on_device is not None and reduction != "none",
        BLOCK_ROWS=REDUCE_BLOCK,
    )
    return loss


def _divisor(
    token_loss: Tensor, labels: Tensor, reduction: str, num_items: Tensor | float | None, ignore_index: int
) -> Tensor:
    """What the reduction divides the sum by, 0-d in ``token_loss``'s dtype; 1 for no items at all, whose sum is 0."""
    if reduction == "none" or (reduction == "sum" and num_items is None):
        return token_loss.new_ones(())
    count = (labels != ignore_index).sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
    return torch.where(count == 0, 1, count).to(token_loss.dtype).reshape(())
