"""Divergences of a student's next-token distribution from a teacher's, from the logits of both.

With p = softmax of the teacher's transformed logits, q = softmax of the student's, m = beta p + (1 - beta) q:

    forward_kl  sum p log(p / q)                            dz = q - p
    reverse_kl  D = sum q log(q / p)                        dz = q (log(q / p) - D)
    jsd         beta sum p log(p / m) + S,                  dz = q ((1 - beta) log(q / m) - S)
                S = (1 - beta) sum q log(q / m)
    tvd         sum |p - q| / 2                             dz = q (c - sum q c),  c = -sign(p - q) / 2

dz is the gradient of the student's transformed logits. Forward reads both models' logits twice, for the normalisers and
for the sums, and saves both with three numbers a row; backward reads them once and writes dlogits once. The teacher's
logits get no gradient. Rows that are masked out are not read.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from .linear_loss.options import REDUCTIONS, LogitTransform, check_num_items, logit_transform
from .linear_loss.plain_rows import RowLosses
from .linear_loss.row_kernels import _tanh, _transform
from .linear_loss.rows import row_block, row_warps
from .reference import DIVERGENCES
from .runtime.autograd import Function, differentiate
from .runtime.checks import as_rows, check_device, check_rows, dense_like
from .runtime.launch import is_plain, launcher, tl, triton, use_triton
from .runtime.operators import opaque_op

NUM_STATS = 3  # both logsumexps; the sum that the gradient subtracts


@triton.jit
def _add_to_normaliser(z, m, s):
    # m: running maximum of each lane; s: its sum of e^(z-m)
    d = z - m
    e = tl.exp(-tl.abs(d))
    return tl.maximum(m, z), tl.where(d > 0, s * e + 1.0, s + e)


@triton.jit
def _logsumexp(m, s):
    row_max = tl.max(m, 0)
    return row_max + tl.log(tl.sum(s * tl.exp(m - row_max), 0))


@triton.jit
def _log_mixture(log_p, log_q, log_beta, log_rest):
    a = log_p + log_beta
    b = log_q + log_rest
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _divergence_fwd_kernel(
    student_ptr,  # [num_rows, num_cols]
    teacher_ptr,  # [num_rows, num_cols]
    mask_ptr,  # [num_rows] int32, or None
    loss_ptr,  # [num_rows] fp32
    stats_ptr,  # [3, num_rows] fp32
    student_row_stride,
    teacher_row_stride,
    stats_row_stride,
    num_cols,
    beta: float,
    log_beta: float,
    log_rest: float,
    inner: float,
    outer: float,
    teacher_inner: float,
    teacher_outer: float,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None and tl.load(mask_ptr + row) == 0:
        tl.store(loss_ptr + row, 0.0)
        return
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    lanes = tl.arange(0, BLOCK_COLS)
    m_q = tl.full([BLOCK_COLS], -1e30, tl.float32)  # finite, so that lanes without an element merge as 0
    m_p = tl.full([BLOCK_COLS], -1e30, tl.float32)
    s_q = tl.zeros([BLOCK_COLS], tl.float32)
    s_p = tl.zeros([BLOCK_COLS], tl.float32)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + lanes
        mask = cols < num_cols
        x = tl.load(student_ptr + cols, mask=mask, other=0.0)
        y = tl.load(teacher_ptr + cols, mask=mask, other=0.0)
        m_q, s_q = _add_to_normaliser(tl.where(mask, _transform(x, inner, outer, HAS_SOFTCAP), -1e30), m_q, s_q)
        z = _transform(y, teacher_inner, teacher_outer, TEACHER_HAS_SOFTCAP)
        m_p, s_p = _add_to_normaliser(tl.where(mask, z, -1e30), m_p, s_p)
    lse_q = _logsumexp(m_q, s_q)
    lse_p = _logsumexp(m_p, s_p)
    total = tl.zeros([BLOCK_COLS], tl.float32)
    inner_sum = tl.zeros([BLOCK_COLS], tl.float32)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + lanes
        mask = cols < num_cols
        x = tl.load(student_ptr + cols, mask=mask, other=0.0)
        y = tl.load(teacher_ptr + cols, mask=mask, other=0.0)
        log_q = _transform(x, inner, outer, HAS_SOFTCAP) - lse_q
        log_p = _transform(y, teacher_inner, teacher_outer, TEACHER_HAS_SOFTCAP) - lse_p
        q = tl.where(mask, tl.exp(log_q), 0.0)
        p = tl.where(mask, tl.exp(log_p), 0.0)
        if KIND == 0:
            total += p * (log_p - log_q)
        elif KIND == 1:
            total += q * (log_q - log_p)
        elif KIND == 2:
            log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
            share = (1.0 - beta) * q * (log_q - log_m)
            total += beta * p * (log_p - log_m) + share
            inner_sum += share
        else:
            total += 0.5 * tl.abs(p - q)
            inner_sum += tl.where(p > q, -0.5, tl.where(p < q, 0.5, 0.0)) * q
    loss = tl.sum(total, 0)
    tl.store(loss_ptr + row, loss)
    tl.store(stats_ptr + row, lse_q)
    tl.store(stats_ptr + stats_row_stride + row, lse_p)
    tl.store(stats_ptr + 2 * stats_row_stride + row, loss if KIND == 1 else tl.sum(inner_sum, 0))


@triton.jit
def _divergence_bwd_kernel(
    grad_ptr,  # [num_rows], or [1] with a stride of 0
    student_ptr,  # [num_rows, num_cols]
    teacher_ptr,  # [num_rows, num_cols]
    mask_ptr,  # [num_rows] int32, or None
    stats_ptr,  # [3, num_rows] fp32
    dlogits_ptr,  # [num_rows, num_cols]
    grad_stride,
    student_row_stride,
    teacher_row_stride,
    stats_row_stride,
    num_cols,
    beta: float,
    log_beta: float,
    log_rest: float,
    inner: float,
    outer: float,
    teacher_inner: float,
    teacher_outer: float,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dlogits_ptr += row * num_cols
    lanes = tl.arange(0, BLOCK_COLS)
    if mask_ptr is not None and tl.load(mask_ptr + row) == 0:
        for start in range(0, num_cols, BLOCK_COLS):
            zeros = tl.zeros([BLOCK_COLS], tl.float32).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + start + lanes, zeros, mask=start + lanes < num_cols)
        return
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    grad = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    lse_q = tl.load(stats_ptr + row)
    lse_p = tl.load(stats_ptr + stats_row_stride + row)
    inner_sum = tl.load(stats_ptr + 2 * stats_row_stride + row)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + lanes
        mask = cols < num_cols
        z = tl.load(student_ptr + cols, mask=mask, other=0.0).to(tl.float32) * inner
        slope = inner
        if HAS_SOFTCAP:
            t = _tanh(z)
            z = t * outer
            slope = inner * outer * (1.0 - t * t)
        y = tl.load(teacher_ptr + cols, mask=mask, other=0.0)
        log_q = z - lse_q
        log_p = _transform(y, teacher_inner, teacher_outer, TEACHER_HAS_SOFTCAP) - lse_p
        q = tl.exp(log_q)
        if KIND == 0:
            dz = q - tl.exp(log_p)
        elif KIND == 1:
            dz = q * (log_q - log_p - inner_sum)
        elif KIND == 2:
            log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
            dz = q * ((1.0 - beta) * (log_q - log_m) - inner_sum)
        else:
            p = tl.exp(log_p)
            dz = q * (tl.where(p > q, -0.5, tl.where(p < q, 0.5, 0.0)) - inner_sum)
        tl.store(dlogits_ptr + cols, (grad * dz * slope).to(dlogits_ptr.dtype.element_ty), mask=mask)


_launch_fwd = launcher(_divergence_fwd_kernel)
_launch_bwd = launcher(_divergence_bwd_kernel)


def _constants(kind: int, beta: float, transform: list[float], teacher_transform: list[float]) -> dict[str, Any]:
    """The arguments that both kernels take."""
    inner, outer, has_softcap = transform
    teacher_inner, teacher_outer, teacher_has_softcap = teacher_transform
    return {
        "beta": beta, "log_beta": math.log(beta), "log_rest": math.log1p(-beta), "inner": inner, "outer": outer,
        "teacher_inner": teacher_inner, "teacher_outer": teacher_outer, "KIND": kind,
        "HAS_SOFTCAP": bool(has_softcap), "TEACHER_HAS_SOFTCAP": bool(teacher_has_softcap),
    }  # fmt: skip


def divergence_fwd(
    logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, kind: int, beta: float, transform: list[float],
    teacher_transform: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(losses [N], statistics [3, N])`` in fp32 of logits ``[N, V]`` and an int32 mask ``[N]``."""
    num_rows, num_cols = logits.shape
    loss = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    stats = torch.empty((NUM_STATS, num_rows), dtype=torch.float32, device=logits.device)
    if num_rows:
        lanes, launch_options = row_block(num_cols, row_warps(logits, two_passes=True))
        _launch_fwd(
            (num_rows, 1, 1),
            launch_options,
            student_ptr=logits,
            teacher_ptr=teacher_logits,
            mask_ptr=mask,
            loss_ptr=loss,
            stats_ptr=stats,
            student_row_stride=logits.stride(0),
            teacher_row_stride=teacher_logits.stride(0),
            stats_row_stride=num_rows,
            num_cols=num_cols,
            BLOCK_COLS=lanes,
            **_constants(kind, beta, transform, teacher_transform),
        )
    return loss, stats


def divergence_bwd(
    grad: Tensor, logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, stats: Tensor, kind: int, beta: float,
    transform: list[float], teacher_transform: list[float],
) -> Tensor:  # fmt: skip
    """dlogits ``[N, V]`` for the upstream gradient ``[N]`` of the losses."""
    dlogits = dense_like(logits)
    num_rows, num_cols = logits.shape
    if num_rows:
        lanes, launch_options = row_block(num_cols, row_warps(logits, two_passes=False))
        _launch_bwd(
            (num_rows, 1, 1),
            launch_options,
            grad_ptr=grad,
            student_ptr=logits,
            teacher_ptr=teacher_logits,
            mask_ptr=mask,
            stats_ptr=stats,
            dlogits_ptr=dlogits,
            grad_stride=grad.stride(0),
            student_row_stride=logits.stride(0),
            teacher_row_stride=teacher_logits.stride(0),
            stats_row_stride=num_rows,
            num_cols=num_cols,
            BLOCK_COLS=lanes,
            **_constants(kind, beta, transform, teacher_transform),
        )
    return dlogits


def _log_probs(logits: Tensor, transform: list[float]) -> Tensor:
    inner, outer, has_softcap = transform
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * inner
    return (torch.tanh(z) * outer if has_softcap else z).log_softmax(-1)


class DivergenceFunction(Function):
    """Losses ``[N]`` of logits ``[N, V]``; the public function does the reshaping and the reduction."""

    @staticmethod
    def definition(
        logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, kind: int, beta: float, transform: list[float],
        teacher_transform: list[float],
    ) -> Tensor:  # fmt: skip
        """The same in plain PyTorch."""
        student, teacher = _log_probs(logits, transform), _log_probs(teacher_logits, teacher_transform)
        losses = reference.row_divergence(teacher, student, DIVERGENCES[kind], beta)
        return losses if mask is None else losses.masked_fill(mask == 0, 0.0)

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, kind: int, beta: float,
        transform: list[float], teacher_transform: list[float],
    ) -> Tensor:  # fmt: skip
        """Save both models' logits and the statistics."""
        ctx.settings = (kind, beta, transform, teacher_transform)
        loss, stats = divergence_fwd(logits, teacher_logits, mask, *ctx.settings)
        ctx.save_for_backward(logits, teacher_logits, mask, stats)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dlogits of the student."""
        if torch.is_grad_enabled():
            logits, teacher_logits, mask, _ = ctx.saved_tensors
            return differentiate(DivergenceFunction.definition, (logits, teacher_logits, mask, *ctx.settings), (grad,))
        return divergence_bwd(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


def _fake_fwd(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((NUM_STATS, rows), dtype=torch.float32)


def _fake_bwd(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, teacher_logits, mask, *ctx.settings = inputs
    ctx.save_for_backward(logits, teacher_logits, mask, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _divergence_bwd_op(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


_divergence_bwd_op = opaque_op("divergence_bwd", divergence_bwd, _fake_bwd)
_divergence_op = opaque_op("divergence", divergence_fwd, _fake_fwd, _differentiate, _save)


def _numbers(transform: LogitTransform) -> list[float]:
    return [float(n) for n in transform]


def divergence(
    logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, kind: str = "forward_kl", beta: float = 0.5,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None, reduction: str = "mean", num_items: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """Divergence of the student's next-token distribution from the teacher's, computed in fp32.

    ``forward_kl`` and ``reverse_kl`` (arXiv 2306.08543) are KL(teacher, student) and KL(student, teacher), ``jsd`` is
    the generalised Jensen-Shannon divergence of eq. 1 of arXiv 2306.13649, and ``tvd`` the total variation distance
    (arXiv 2307.15190).

    Args:
        logits: ``[..., V]``, the student's; fp16, bf16, fp32 or fp64, any strides.
        teacher_logits: ``[..., V]`` of any of these dtypes. Constants.
        mask: ``[...]``, nonzero where a position counts; by default all do.
        kind: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"`` or ``"tvd"``.
        beta: share of the teacher in the mixture of ``"jsd"``, in (0, 1).
        temperature: divides the transformed logits of both.
        logit_scale, softcap: of the student, as in ``cross_entropy``.
        teacher_logit_scale, teacher_softcap: of the teacher.
        reduction: ``"mean"`` over the positions that count, ``"sum"``, or ``"none"`` (0 where masked out).
        num_items: divisor instead of the number of positions that count; also of the sum.

    Returns:
        The loss in fp32, 0-d, or ``[...]`` with reduction ``"none"``.

    Raises:
        ValueError: a shape or option out of range.
        TypeError: a dtype that is not supported.
    """
    check_rows("logits", logits)
    check_rows("teacher_logits", teacher_logits)
    if teacher_logits.shape != logits.shape:
        expected = f"logits.shape = {tuple(logits.shape)}"
        raise ValueError(f"teacher_logits: got shape {tuple(teacher_logits.shape)}; must be {expected}")
    check_device("teacher_logits", teacher_logits, logits)
    if kind not in DIVERGENCES:
        raise ValueError(f"kind: got {kind!r}; must be one of {', '.join(map(repr, DIVERGENCES))}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta: got {beta}; must be in (0, 1)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; must be one of {', '.join(map(repr, REDUCTIONS))}")
    check_num_items(num_items)
    if mask is not None and mask.shape != logits.shape[:-1]:
        expected = f"logits.shape[:-1] = {tuple(logits.shape[:-1])}"
        raise ValueError(f"mask: got shape {tuple(mask.shape)}; must be {expected}")
    if mask is not None:
        check_device("mask", mask, logits)
    transform = logit_transform(logit_scale, softcap, temperature)
    teacher_transform = logit_transform(teacher_logit_scale, teacher_softcap, temperature)
    counts = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask != 0
    number = DIVERGENCES.index(kind)
    settings = (number, float(beta), _numbers(transform), _numbers(teacher_transform))
    rows = (as_rows(logits), as_rows(teacher_logits.detach()), None if mask is None else counts.reshape(-1).int())
    compiling = torch.compiler.is_compiling()
    if use_triton(logits, teacher_logits, mask) and torch.float64 not in (logits.dtype, teacher_logits.dtype):
        losses = _divergence_op(*rows, *settings)[0] if compiling else DivergenceFunction.apply(*rows, *settings)
    elif compiling or not is_plain(logits, teacher_logits, mask):
        losses = DivergenceFunction.definition(*rows, *settings)
    else:
        losses = RowLosses.apply(DivergenceFunction.definition, *rows, *settings)
    return reference.reduce_loss(losses.view(counts.shape), counts, reduction, num_items)
