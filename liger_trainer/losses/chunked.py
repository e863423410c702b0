"""Distillation losses of each token, from hidden states, with the logits of one chunk of tokens at a time.

Forward computes the logits of student and teacher for a chunk, reduces them to two numbers a token, and drops them.
Backward computes them again and differentiates the chunk's losses (``kernels/divergence.py``). With d the gradient of
the student's logits, ``dhidden = d W`` and ``dW = sum of d^T X``, summed over the chunks in fp32. That makes four GEMMs
of the student's head and two of the teacher's. Saved: the inputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference
from ..kernels.cross_entropy import cross_entropy
from ..kernels.divergence import divergence
from ..kernels.linear_loss.chunk_sizes import rows_per_chunk
from ..kernels.linear_loss.gradients import add_mm_into, fp16_peak, mm_into
from ..kernels.linear_loss.options import ALL_STATS, NUM_STATS, logit_transform
from ..kernels.linear_loss.rows import loss_rows
from ..kernels.runtime.autograd import Function
from ..kernels.runtime.launch import use_triton
from .divergences import LOWEST_LOG_PROB, at_tokens, with_rest

# Tensors [tokens of a chunk, V] that autograd of plain PyTorch has at once: logits, log-probs, probabilities, mixture
# and their gradients. The kernels have logits of student and teacher and the gradients of the two losses.
PLAIN_BUFFERS = 10


class Head(NamedTuple):
    """``hidden`` ``[N, H]``, ``weight`` ``[V, H]`` and ``bias`` ``[V]`` of a vocabulary projection."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The untransformed logits of some rows, ``[n, V]``; the weight must have ``dtype`` by now."""
        x = self.hidden[rows].to(dtype)
        return torch.mm(x, self.weight.t()) if self.bias is None else torch.addmm(self.bias, x, self.weight.t())

    def to(self, dtype: torch.dtype) -> "Head":
        """Weight and bias in ``dtype``; rows of ``hidden`` are converted with their chunk."""
        return Head(self.hidden, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class TopTokens(NamedTuple):
    """The teacher's most probable tokens: ``log_probs`` and ``token_ids`` ``[N, K]``; a negative id is none."""

    log_probs: Tensor
    token_ids: Tensor


@dataclass(frozen=True)
class DistillationOptions:
    """What is computed of the logits of student and teacher."""

    divergence: str
    beta: float
    temperature: float
    logit_scale: float
    softcap: float | None
    teacher_logit_scale: float
    teacher_softcap: float | None
    hard: bool  # whether the cross-entropy with the labels is needed
    dtype: torch.dtype  # of the student's GEMMs
    teacher_dtype: torch.dtype
    budget_mib: float
    entropy: bool = False  # whether the student's entropy is wanted


def _token_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | TopTokens, options: DistillationOptions
) -> tuple[Tensor, Tensor]:
    """``(divergence, cross-entropy or zeros)``, ``[n]`` each, of logits ``[n, V]`` of student and teacher."""
    transform = {"logit_scale": options.logit_scale, "softcap": options.softcap}
    if options.hard:
        hard = cast(Tensor, cross_entropy(logits, labels, reduction="none", **transform))
    else:
        hard = logits.new_zeros(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    if isinstance(teacher, TopTokens):
        return _from_top_tokens(logits, teacher, options), hard
    if options.divergence == "cosine":
        teacher = reference.transform_logits(teacher, options.teacher_logit_scale, options.teacher_softcap)
        student = reference.transform_logits(logits, **transform)
        return 1 - F.cosine_similarity(teacher, student, dim=-1), hard
    soft = divergence(
        logits, teacher, kind=options.divergence, beta=options.beta, temperature=options.temperature,
        teacher_logit_scale=options.teacher_logit_scale, teacher_softcap=options.teacher_softcap, reduction="none",
        **transform,
    )  # fmt: skip
    return soft, hard


def _entropy(logits: Tensor, labels: Tensor, options: DistillationOptions) -> Tensor:
    """The entropy of the student's distribution, ``[n]``, of logits ``[n, V]``; ``labels`` are any tokens."""
    stats = logits.new_empty((NUM_STATS, *labels.shape), dtype=torch.promote_types(logits.dtype, torch.float32))
    transform = logit_transform(options.logit_scale, options.softcap, options.temperature)
    loss = torch.empty_like(stats[0])
    loss_rows(logits, labels, loss, None, transform, ignore_index=reference.IGNORE_INDEX, stats=stats, level=ALL_STATS)
    return stats[1]


def _from_top_tokens(logits: Tensor, teacher: TopTokens, options: DistillationOptions) -> Tensor:
    """The divergence of the distributions over the teacher's top tokens and the rest, ``[n]``."""
    student = reference.transform_logits(logits, options.logit_scale, options.softcap) / options.temperature
    of_student = with_rest(at_tokens(student.log_softmax(-1), teacher.token_ids))
    known = teacher.log_probs.to(student.dtype).clamp(min=LOWEST_LOG_PROB)
    of_teacher = with_rest(known.masked_fill(teacher.token_ids < 0, LOWEST_LOG_PROB))
    return reference.row_divergence(of_teacher, of_student, options.divergence, options.beta)


def _bytes_per_logit(logits: Tensor, teacher: Head | TopTokens, options: DistillationOptions) -> int:
    """Bytes of all that exists at once for one logit where the row formula is differentiated, at most."""
    by_kernel = use_triton(logits) and isinstance(teacher, Head) and options.divergence != "cosine"
    if not by_kernel or options.dtype == torch.float64:
        return PLAIN_BUFFERS * torch.promote_types(options.dtype, torch.float32).itemsize
    return (4 if options.hard else 2) * options.dtype.itemsize + options.teacher_dtype.itemsize


def _chunks(
    student: Head, labels: Tensor, teacher: Head | TopTokens, options: DistillationOptions
) -> Iterator[tuple[slice, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]]:
    """Yield ``(rows, student's logits, function from them to the losses)``; weights must be in the GEMMs' dtype."""
    num_rows, vocab_size = labels.shape[0], student.weight.shape[0]
    size = rows_per_chunk(num_rows, vocab_size, _bytes_per_logit(student.weight, teacher, options), options.budget_mib)
    for start in range(0, num_rows, max(size, 1)):
        rows = slice(start, start + size)
        if isinstance(teacher, Head):
            target: Tensor | TopTokens = teacher.logits(rows, options.teacher_dtype)
        else:
            target = TopTokens(*(t[rows] for t in teacher))

        def losses(logits: Tensor, rows: slice = rows, target: Tensor | TopTokens = target) -> tuple[Tensor, Tensor]:
            return _token_losses(logits, labels[rows], target, options)

        yield rows, student.logits(rows, options.dtype), losses


class DistillationFunction(Function):
    """``(divergence, cross-entropy, student's entropy)`` of each row, ``[N]`` in fp32, or fp64 for fp64 inputs.

    Cross-entropy and entropy are 0 unless the options ask for them. The entropy is that at the divergence's temperature
    and has no gradient.

    The teacher's three tensors are the fields of a ``Head``, or those of ``TopTokens`` and ``None``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, teacher_a: Tensor,
        teacher_b: Tensor, teacher_c: Tensor | None, options: DistillationOptions, has_teacher_head: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Save the inputs and reduce one chunk after the other."""
        ctx.save_for_backward(hidden, weight, bias, labels, teacher_a, teacher_b, teacher_c)
        ctx.options, ctx.has_teacher_head = options, has_teacher_head
        ctx.set_materialize_grads(True)
        out_dtype = torch.promote_types(options.dtype, torch.float32)
        soft, hard, entropy = (torch.zeros(labels.shape, dtype=out_dtype, device=hidden.device) for _ in range(3))
        ctx.mark_non_differentiable(entropy)
        with torch.autocast(hidden.device.type, enabled=False):
            student = Head(hidden, weight, bias).to(options.dtype)
            teacher = _teacher(teacher_a, teacher_b, teacher_c, options, has_teacher_head)
            for rows, logits, losses in _chunks(student, labels, teacher, options):
                soft[rows], hard[rows] = losses(logits)
                if options.entropy:
                    entropy[rows] = _entropy(logits, labels[rows], options)
        return soft, hard, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, soft_grad: Tensor, hard_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight and bias that are needed."""
        hidden, weight, bias, labels, *teacher_tensors = ctx.saved_tensors
        options: DistillationOptions = ctx.options
        peak = fp16_peak(options.dtype, soft_grad, hard_grad)  # so that fp16 gradients of logits use their range
        if peak is not None:
            soft_grad, hard_grad = soft_grad / peak, hard_grad / peak
        sums = _GradientSums((hidden, weight, bias), ctx.needs_input_grad[:3], peak)
        with torch.autocast(hidden.device.type, enabled=False):
            student = Head(hidden, weight, bias).to(options.dtype)
            a, b, c = teacher_tensors
            teacher = _teacher(a, b, c, options, ctx.has_teacher_head)
            for rows, logits, losses in _chunks(student, labels, teacher, options):
                with torch.enable_grad():
                    logits.requires_grad_()
                    soft, hard = losses(logits)
                    (grad,) = torch.autograd.grad(soft @ soft_grad[rows] + hard @ hard_grad[rows], logits)
                sums.add(rows, student, grad)
        return *sums.finish(), None, None, None, None, None, None


def _teacher(a: Tensor, b: Tensor, c: Tensor | None, options: DistillationOptions, is_head: bool) -> Head | TopTokens:
    return Head(a, b, c).to(options.teacher_dtype) if is_head else TopTokens(a, b)


class _GradientSums:
    """Gradients of hidden, weight and bias, summed over the chunks in at least fp32 and rounded once."""

    def __init__(
        self, params: tuple[Tensor, Tensor, Tensor | None], wanted: tuple[bool, ...], peak: Tensor | None
    ) -> None:
        hidden, weight, _ = params
        self.params, self.wanted, self.peak = params, wanted, peak
        self.hidden_grad = torch.zeros_like(hidden) if wanted[0] else None
        self.weight_sum = torch.zeros_like(weight, dtype=_wide(weight)) if wanted[1] else None
        self.bias_sum: Tensor | None = None

    def add(self, rows: slice, student: Head, grad: Tensor) -> None:
        """Add a chunk with the gradient ``[n, V]`` of its logits."""
        if self.hidden_grad is not None:
            out = torch.empty_like(self.hidden_grad[rows], dtype=_wide(grad))
            mm_into(out, grad, student.weight)
            self.hidden_grad[rows] = out if self.peak is None else out * self.peak
        if self.weight_sum is not None:
            add_mm_into(self.weight_sum, grad.t(), student.hidden[rows].to(grad.dtype))
        if self.wanted[2]:
            columns = grad.sum(0, dtype=_wide(grad))
            self.bias_sum = columns if self.bias_sum is None else self.bias_sum + columns

    def finish(self) -> list[Tensor | None]:
        """The gradients in their parameters' dtypes; ``None`` where not wanted."""
        sums = (self.hidden_grad, self._scaled(self.weight_sum), self._scaled(self.bias_sum))
        out: list[Tensor | None] = []
        for param, wanted, total in zip(self.params, self.wanted, sums, strict=True):
            if param is None or not wanted:
                out.append(None)
            else:
                out.append(torch.zeros_like(param) if total is None else total.to(param.dtype))
        return out

    def _scaled(self, total: Tensor | None) -> Tensor | None:
        return total if total is None or self.peak is None else total * self.peak


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
