"""The divergence of a student from a teacher behind GKD's and GOLD's loss, and behind DistillationTrainer's.

GKD and GOLD compare two models' logits. Both heads return their hidden states instead, and ``generalized_jsd_loss``
takes them to ``DistillationFunction``. DistillationTrainer projects hidden states itself: a dispatcher takes the place
of its ``ChunkedDivergenceFunction``.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..head.fused_head import is_plain
from ..head.per_thread import PerThread, Reading, set_reading
from ..head.sharded_weights import gathered, gathered_again_in_backward
from ..kernels.linear_loss.options import check_linear_args
from ..kernels.reference import IGNORE_INDEX
from ..losses.chunked import DistillationFunction, DistillationOptions
from ..losses.distillation import LOGITS_BUDGET_MIB
from ..probing.rule import Acted
from .score_head import Request, ScoreHead
from .stand_ins import HiddenRows, plain

_PAIR = PerThread()  # ``(student's head, teacher's head, their requests)`` of a thread's ``compute_loss``
_ACTIVE = PerThread()  # the ``DivergenceHead`` of a thread's DistillationTrainer


def _options(beta: float, temperature: float, dtypes: tuple[torch.dtype, torch.dtype], **others: Any) -> Any:
    """``DistillationOptions`` of TRL's ``beta``, whose ends are the forward and the reverse KL."""
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jsd")
    return DistillationOptions(
        kind, beta if kind == "jsd" else 0.5, temperature, hard=False, dtype=dtypes[0], teacher_dtype=dtypes[1],
        budget_mib=LOGITS_BUDGET_MIB, **others,
    )  # fmt: skip


@contextmanager
def pair_divergence(student: ScoreHead, teacher: ScoreHead, *requests: Request) -> Iterator[None]:
    """Let ``generalized_jsd_loss`` find the two heads in this thread."""
    before, _PAIR.slot.value = _PAIR.slot.value, (student, teacher, *requests)
    try:
        yield
    finally:
        _PAIR.slot.value = before


def dispatched_divergence(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``generalized_jsd_loss`` that takes ``HiddenRows`` too; for logits it is the ``original``."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generalized_jsd_loss(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        rows = (values["student_logits"], values["teacher_logits"])
        if not any(isinstance(row, HiddenRows) for row in rows):
            return original(*args, **kwargs)
        if not all(isinstance(row, HiddenRows) for row in rows):
            raise RuntimeError("generalized_jsd_loss: got the logits of one model; must be hidden states of both")
        return _divergence_loss(*rows, values)

    return generalized_jsd_loss


def _divergence_loss(student: Tensor, teacher: Tensor, given: dict[str, Any]) -> Tensor:
    """The loss of the labelled positions, reduced as TRL does."""
    labels, num_items = given["labels"], given["num_items_in_batch"]
    if given["reduction"] not in ("batchmean", "sum") or labels is None:
        raise ValueError("generalized_jsd_loss: got another reduction, or no labels; must be 'batchmean' or 'sum'")
    counts = labels != IGNORE_INDEX
    heads: tuple[ScoreHead, ScoreHead] = _PAIR.slot.value[:2]
    requests: tuple[Request, Request] = _PAIR.slot.value[2:]
    first, second = (plain(rows)[counts] for rows in (student, teacher))
    (w, b), (teacher_w, teacher_b) = (request.weights() for request in requests)
    forms = {
        "logit_scale": heads[0].form.logit_scale, "softcap": heads[0].form.softcap,
        "teacher_logit_scale": heads[1].form.logit_scale, "teacher_softcap": heads[1].form.softcap,
    }  # fmt: skip
    dtypes = requests[0].dtype, requests[1].dtype
    options = _options(given["beta"], given["temperature"], dtypes, **forms)
    per_token, *_ = DistillationFunction.apply(first, w, b, labels[counts], second, teacher_w, teacher_b, options, True)
    if num_items is not None:
        return per_token.sum() / (num_items.to(per_token.device) if torch.is_tensor(num_items) else num_items)
    return per_token.sum() / counts.sum().clamp(min=1) if given["reduction"] == "batchmean" else per_token.sum()


@dataclass
class DivergenceHead:
    """The settings of one model whose trainer projects hidden states itself.

    Args:
        calls_fused: How many divergences were computed with our op.
        acted: Set when one is.
    """

    calls_fused: int = 0
    acted: Acted = field(default_factory=Acted)


@contextmanager
def projecting(head: DivergenceHead, labels: Tensor) -> Iterator[None]:
    """Let TRL's chunked divergence be ours in this thread, and padding be left out of the forwards.

    Args:
        head: The student's.
        labels: ``[batch, tokens]``, not shifted; the divergence is read where one is predicted.
    """
    before, _ACTIVE.slot.value = _ACTIVE.slot.value, head
    set_reading(Reading(labels))
    try:
        yield
    finally:
        _ACTIVE.slot.value = before
        set_reading(None)


class DivergenceDispatcher:
    """Takes the place of TRL's ``ChunkedDivergenceFunction``."""

    def __init__(self, original: type[torch.autograd.Function]):
        self.original = original

    def apply(
        self,
        student_hidden: Tensor,  # [N, H]
        student_weight: Tensor,  # [V, H]
        student_bias: Tensor | None,  # [V]
        teacher_hidden: Tensor,  # [N, H']
        teacher_weight: Tensor,  # [V, H']
        teacher_bias: Tensor | None,  # [V]
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """TRL's signature and outputs: divergence and student's entropy of each row, ``[N]``."""
        head: DivergenceHead | None = _ACTIVE.slot.value
        student = (student_hidden, student_weight, student_bias)
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
        if head is None or torch.compiler.is_compiling() or not all(map(is_plain, (*student, *teacher))):
            return self.original.apply(
                *student, *teacher, beta, temperature, student_logit_scale, student_final_logit_softcapping,
                teacher_logit_scale, teacher_final_logit_softcapping,
            )  # fmt: skip
        head.calls_fused += 1
        head.acted.note()
        labels = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
        # A sharded engine gathers the weights where they are used.
        with gathered(student_weight, teacher_weight) as (w, teacher_w), gathered(student_bias, teacher_bias) as biases:
            dtypes = (
                check_linear_args(student_hidden, w, labels, biases[0]),
                check_linear_args(teacher_hidden, teacher_w, labels, biases[1]),
            )
            options = _options(
                beta, temperature, dtypes, entropy=True, logit_scale=student_logit_scale,
                softcap=student_final_logit_softcapping, teacher_logit_scale=teacher_logit_scale,
                teacher_softcap=teacher_final_logit_softcapping,
            )  # fmt: skip
            with gathered_again_in_backward(w, teacher_w, *biases):
                soft, _, entropy = DistillationFunction.apply(
                    student_hidden, w, biases[0], labels, teacher_hidden, teacher_w, biases[1], options, True
                )
        return soft, entropy
