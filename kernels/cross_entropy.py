"""Cross-entropy of logits that exist, with per-token upstream gradients.

    loss = reduce(w * ((1 - eps) * (lse - t) + eps * (lse - mean(z)) + z_loss * lse^2)),   z = transform(logits)

Forward reads the logits once and saves them, the labels and lse (fp32 [N]); backward reads them once and writes
dlogits once, in the logits' dtype. The input is never written. Ignored rows are not read. See linear_loss/rows.py for
the forward kernel and linear_loss/row_kernels.py for the gradient's formula. Without Triton, and in fp64, rows go
through linear_loss/plain_rows.py in blocks: there too, dlogits are the only memory of the logits' size.
"""

from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from .linear_loss.options import (
    LogitTransform,
    check_labels_form,
    check_loss_args,
    logit_transform,
    on_host_or_device,
    sum_dtype,
)
from .linear_loss.plain_rows import dlogits as plain_dlogits
from .linear_loss.plain_rows import row_blocks, runs_kernels
from .linear_loss.reduction import reduced
from .linear_loss.row_kernels import write_dlogits
from .linear_loss.rows import empty_rows, loss_rows, row_block, row_coefficients, row_warps
from .linear_loss.weighting import check_class_weights, reduced_z_loss, scaled_by_probability, weighted_by_class
from .reference import IGNORE_INDEX
from .runtime.autograd import Function, differentiate
from .runtime.checks import as_rows, check_rows, dense_like
from .runtime.launch import is_plain, launcher, tl, triton
from .runtime.operators import opaque_op


@triton.jit
def _loss_grad_rows_kernel(
    logits_ptr,  # [num_rows, num_cols]
    dlogits_ptr,  # [num_rows, num_cols]
    labels_ptr,  # [num_rows] int64 or int32
    lse_ptr,  # [num_rows] fp32
    grad_ptr,  # [num_rows], or [1] with a stride of 0
    weights_ptr,  # [num_rows] or None
    scale_ptr,  # [1] fp32, or None
    logits_row_stride,
    dlogits_row_stride,
    grad_stride,
    num_cols,
    ignore_index,
    label_smoothing: float,
    z_loss: float,
    inner: float,
    outer: float,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    dx_ptr = dlogits_ptr + row * dlogits_row_stride
    if label == ignore_index:
        for start in range(0, num_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            zeros = tl.zeros([BLOCK_COLS], tl.float32).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + cols, zeros, mask=cols < num_cols)
        return
    lse = tl.load(lse_ptr + row)
    g = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    if weights_ptr is not None:
        g = g * tl.load(weights_ptr + row).to(tl.float32)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr)
    a = g * (1.0 + 2.0 * z_loss * lse)
    c = g * (1.0 - label_smoothing)
    d = g * label_smoothing / num_cols
    x_ptr = logits_ptr + row * logits_row_stride
    write_dlogits(
        x_ptr, dx_ptr, num_cols, label.to(tl.int32), lse, a, 0.0, c, d, inner, outer, HAS_SOFTCAP, False, BLOCK_COLS
    )  # fmt: skip


_launch_loss_grad = launcher(_loss_grad_rows_kernel)


def cross_entropy_fwd(
    logits: Tensor, labels: Tensor, transform: LogitTransform, *, ignore_index: int, label_smoothing: float,
    z_loss: float, reduction: str, num_items: Tensor | float | None, token_weights: Tensor | None,
    for_backward: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``(loss, lse, scale)`` of ``logits`` ``[N, V]``; ``scale`` (``[1]``) is what the reduction multiplies by.

    ``lse`` and ``scale`` are None unless ``for_backward``.
    """
    num_rows, num_cols = logits.shape
    like = (logits.device, sum_dtype(logits.dtype))
    token_loss = empty_rows(num_rows, *like)
    lse, scale = (empty_rows(num_rows, *like), empty_rows(1, *like)) if for_backward else (None, None)
    if num_rows:
        loss_rows(
            logits, labels, token_loss, lse, transform, ignore_index=ignore_index, label_smoothing=label_smoothing,
            z_loss=z_loss, token_weights=token_weights,
        )  # fmt: skip
    divisors = (num_cols, ignore_index, reduction, num_items)
    loss = reduced(token_loss, labels, scale, *divisors, by_kernel=runs_kernels(logits))
    return token_loss if reduction == "none" else loss, lse, scale


def cross_entropy_bwd(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor | None, token_weights: Tensor | None,
    transform: LogitTransform, *, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """dlogits ``[N, V]`` for ``grad`` of the reduced loss, or of the per-token loss when ``scale`` is None."""
    dlogits = dense_like(logits)
    num_rows, num_cols = logits.shape
    if num_rows == 0:
        return dlogits
    if not runs_kernels(logits):
        row_grad = grad.to(lse.dtype) if scale is None else grad.to(lse.dtype) * scale
        row_grad = row_grad.expand(num_rows) if token_weights is None else row_grad * token_weights.to(lse.dtype)
        coefficients = row_coefficients(row_grad, lse, num_cols, label_smoothing, z_loss)
        dlogits[labels == ignore_index] = 0
        for block in row_blocks(num_cols, labels, ignore_index):
            grads = plain_dlogits(logits[block], labels[block], lse[block], *coefficients.select(block), transform)
            dlogits[block] = grads.to(dlogits.dtype)
        return dlogits
    lanes, launch_options = row_block(num_cols, row_warps(logits, two_passes=False))
    _launch_loss_grad(
        (num_rows, 1, 1),
        launch_options,
        logits_ptr=logits,
        dlogits_ptr=dlogits,
        labels_ptr=labels,
        lse_ptr=lse,
        grad_ptr=grad,
        weights_ptr=token_weights,
        scale_ptr=scale,
        logits_row_stride=logits.stride(0),
        dlogits_row_stride=dlogits.stride(0),
        grad_stride=grad.stride(0) if grad.dim() else 0,
        num_cols=num_cols,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        inner=transform.inner,
        outer=transform.outer,
        HAS_SOFTCAP=transform.has_softcap,
        BLOCK_COLS=lanes,
    )
    return dlogits


class CrossEntropyFunction(Function):
    """Takes 2-D logits and 1-D labels; the public function does the reshaping."""

    @staticmethod
    def definition(
        logits: Tensor, labels: Tensor, token_weights: Tensor | None, num_items: Tensor | float | None,
        transform: LogitTransform, ignore_index: int, label_smoothing: float, z_loss: float, reduction: str,
        with_lse: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The loss in plain PyTorch, and a constant lse."""
        loss = reference.cross_entropy(
            logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            reduction=reduction, num_items=num_items, token_weights=token_weights, **transform.keywords,
        )  # fmt: skip
        if not with_lse:
            return (loss,)
        return loss, reference.transform_logits(logits.detach(), **transform.keywords).logsumexp(-1)

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, token_weights: Tensor | None, num_items: Tensor | float | None,
        transform: LogitTransform, ignore_index: int, label_smoothing: float, z_loss: float, reduction: str,
        with_lse: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Reduced loss, or token losses ``[N]``, and lse ``[N]`` if asked for; saves lse and the reduction's factor."""
        ctx.transform, ctx.reduction, ctx.num_items = transform, reduction, num_items
        ctx.options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
        loss, lse, scale = cross_entropy_fwd(
            logits, labels, transform, reduction=reduction, num_items=num_items, token_weights=token_weights,
            for_backward=with_lse or ctx.needs_input_grad[0], **ctx.options,
        )  # fmt: skip
        ctx.save_for_backward(logits, labels, token_weights, lse, scale)
        if not with_lse or lse is None:
            return (loss,)
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """dlogits for the upstream gradient of the loss."""
        logits, labels, token_weights, lse, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            args = (logits, labels, token_weights, ctx.num_items, ctx.transform, *ctx.options.values(), ctx.reduction)
            return differentiate(CrossEntropyFunction.definition, (*args, False), (grad,))
        scale = None if ctx.reduction == "none" else scale
        dlogits = cross_entropy_bwd(grad, logits, labels, lse, scale, token_weights, ctx.transform, **ctx.options)
        return dlogits, *(None,) * 9


def _fwd(
    logits: Tensor, labels: Tensor, token_weights: Tensor | None, num_items: Tensor | None,
    num_items_number: float | None, inner: float, outer: float, has_softcap: bool, ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not logits.is_cuda:
        reference.check_labels(labels, logits.shape[-1], ignore_index)
    loss, lse, scale = cross_entropy_fwd(
        logits, labels, LogitTransform(inner, outer, has_softcap), ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction, token_weights=token_weights,
        num_items=num_items_number if num_items is None else num_items,
    )  # fmt: skip
    assert lse is not None  # because of for_backward
    assert scale is not None
    return loss, lse, scale


def _fake_fwd(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = labels.shape[0]
    dtype = sum_dtype(logits.dtype)
    loss = logits.new_empty(rows if options[-1] == "none" else (), dtype=dtype)
    return loss, logits.new_empty(rows, dtype=dtype), logits.new_empty(1, dtype=dtype)


def _bwd(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor | None, token_weights: Tensor | None,
    inner: float, outer: float, has_softcap: bool, ignore_index: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    return cross_entropy_bwd(
        grad, logits, labels, lse, scale, token_weights, LogitTransform(inner, outer, has_softcap),
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip


def _fake_bwd(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, token_weights = inputs[:3]
    *ctx.settings, reduction = inputs[5:]
    _, lse, scale = output
    ctx.save_for_backward(logits, labels, lse, None if reduction == "none" else scale, token_weights)
    ctx.mark_non_differentiable(lse, scale)


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return _cross_entropy_bwd_op(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 11


_cross_entropy_bwd_op = opaque_op("cross_entropy_bwd", _bwd, _fake_bwd)
_cross_entropy_op = opaque_op("cross_entropy", _fwd, _fake_fwd, _differentiate, _save)


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 1 and t.is_contiguous() else t.reshape(-1).contiguous()


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0, reduction: str = "mean",
    num_items: Tensor | float | None = None, token_weights: Tensor | None = None, class_weights: Tensor | None = None,
    token_scaling: bool = False, return_z_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of logits against labels; a batch whose labels are all ignored gives 0.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]`` (int64 or int32).
        ignore_index: label of the positions that do not count.
        label_smoothing: share of the loss that goes to the mean over the vocabulary instead of the label.
        z_loss: factor of ``logsumexp^2``, added per token.
        softcap: logits become ``softcap * tanh(logits * logit_scale / softcap)`` first, unless ``None``.
        logit_scale: factor of the logits.
        reduction: ``"mean"`` over labels that are not ignored, ``"sum"``, or ``"none"`` (0 where ignored).
        num_items: a number, or a one-element tensor on any device, that replaces the count of the mean. It also
            divides the sum.
        token_weights: ``[...]`` constants that multiply the token losses, z-loss included.
        class_weights: ``[V]`` constants; a token's loss is multiplied by its label's, and the mean divides by the sum
            of the labels' weights, as in ``torch.nn.functional.cross_entropy``. Not with label smoothing.
        token_scaling: weight each token by its label's probability, a constant (DFT, arXiv 2508.05629). Costs another
            reading of the logits.
        return_z_loss: also return the z-loss that the loss contains, reduced like it and detached.

    Returns:
        The loss in fp32 (fp64 for fp64 logits), 0-d, or ``[...]`` with reduction ``"none"``; or ``(loss, z_loss)``.

    Raises:
        ValueError: a shape or option out of range. On CPU also a label that is neither ``ignore_index`` nor in
            ``[0, V)``; on CUDA such a label is a device-side assert, raised at the next synchronisation, because
            reading the labels here would make the host wait.
        TypeError: a dtype that is not supported.
    """
    check_rows("logits", logits)
    check_labels_form(labels, "logits", logits)
    check_loss_args(labels, label_smoothing, z_loss, reduction, num_items, token_weights)
    check_class_weights(class_weights, logits.shape[-1], label_smoothing, logits)
    if class_weights is not None:
        args = (class_weights, labels, token_weights, num_items, reduction, ignore_index)
        token_weights, num_items = weighted_by_class(*args)
    if token_scaling:
        nll = cross_entropy(
            logits.detach(),
            labels,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            reduction="none",
        )
        token_weights = scaled_by_probability(-cast(Tensor, nll), token_weights)
    transform = logit_transform(logit_scale, softcap)
    plain = is_plain(logits, labels, token_weights)
    rows, flat_labels = as_rows(logits), _flat(labels)
    token_weights = None if token_weights is None else _flat(token_weights)
    if torch.compiler.is_compiling() and plain:
        # Tensors stay tensors: reading one here would break the graph.
        items = num_items.detach().to(logits.device) if torch.is_tensor(num_items) else None
        number = None if num_items is None or items is not None else float(num_items)
        options = (ignore_index, float(label_smoothing), float(z_loss), reduction)
        loss, lse, _ = _cross_entropy_op(rows, flat_labels, token_weights, items, number, *transform, *options)
    else:
        if not logits.is_cuda:
            reference.check_labels(labels, logits.shape[-1], ignore_index)
        items = on_host_or_device(num_items, logits.device)
        run = CrossEntropyFunction.apply if plain else CrossEntropyFunction.definition
        results = run(
            rows, flat_labels, token_weights, items, transform, ignore_index, label_smoothing, z_loss, reduction,
            return_z_loss,
        )  # fmt: skip
        loss, lse = results[0], results[-1]  # the loss again where lse was not asked for
    if not return_z_loss:
        return loss.view(labels.shape) if reduction == "none" else loss
    z = reduced_z_loss(lse, flat_labels, z_loss, token_weights, reduction, num_items, ignore_index)
    return (loss.view(labels.shape), z.view(labels.shape)) if reduction == "none" else (loss, z)
