"""``lm_head`` of a model whose TRL trainer computes its loss from logits: it returns a stand-in for them.

``scoring`` says which one, around the trainer's own method. Outside of it ``lm_head`` returns logits.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..head.form import HeadForm
from ..head.fused_head import has_hooks_on_logits, is_plain
from ..head.per_thread import PerThread, Reading, set_reading
from ..head.sharded_weights import check_materialized
from ..kernels.linear_logprobs import linear_logprobs
from ..kernels.linear_loss.options import check_linear_args
from ..kernels.reference import IGNORE_INDEX
from ..kernels.runtime.autograd import is_transformed
from ..probing.rebinding import ModuleRef
from ..probing.rule import Acted
from .stand_ins import HiddenRows, token_scores

logger = logging.getLogger(__name__)


@dataclass
class Request:
    """What a trainer's method reads of the forwards of one model.

    Args:
        labels: ``[batch, tokens]``, not shifted; the positions that are read are those that predict one. ``None``: all
            positions are read, and predict the next of ``input_ids``.
        hidden_only: Hidden states are wanted, for a loss of two models.
        linear: The ``lm_head`` that was called, set by it.
        dtype: That of its GEMM, which autocast may choose.
    """

    labels: Tensor | None = None
    hidden_only: bool = False
    linear: nn.Linear | None = None
    dtype: torch.dtype = torch.float32

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """``(weight, bias)`` of the ``lm_head`` that was called."""
        assert self.linear is not None
        return self.linear.weight, self.linear.bias


class ScoreHead:
    """The settings of one patched model; its methods are hooks, and the forward of ``lm_head``.

    Args:
        model: The causal LM.
        form: What the model does to the output of ``lm_head``.
        options: Keyword arguments of ``linear_logprobs``.
    """

    def __init__(self, model: PreTrainedModel, form: HeadForm, options: dict[str, Any]):
        self.model, self.form, self.options = ModuleRef(model), form, options
        self.calls_fused = 0
        self.acted = Acted()
        self._request = PerThread()  # the ``Request`` in which a thread runs
        self._labels = PerThread()  # of the running forward, aligned with the hidden states
        self._parameter_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._has_warned = False

    @contextmanager
    def scoring(self, request: Request) -> Iterator[Request]:
        """Let ``lm_head`` return stand-ins in this thread."""
        before, self._request.slot.value = self._request.slot.value, request
        try:
            yield request
        finally:
            self._request.slot.value = before

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the causal LM: note which token each position predicts."""
        request: Request | None = self._request.slot.value
        self._labels.slot.value = None
        if request is None:
            return
        given = dict(zip(self._parameter_names, args, strict=False)) | kwargs
        if request.labels is not None:
            set_reading(Reading(request.labels))
            self._labels.slot.value = F.pad(request.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        elif given.get("input_ids") is not None:
            self._labels.slot.value = F.pad(given["input_ids"][:, 1:], (0, 1))

    def after_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook: forget them."""
        if self._request.slot.value is not None:
            set_reading(None)
        self._labels.slot.value = None

    def head_forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """``lm_head``'s forward: what the request asks for, or else what ``nn.Linear`` returns."""
        request: Request | None = self._request.slot.value
        labels: Tensor | None = self._labels.slot.value
        weight, bias = head.weight, head.bias
        if request is None or not self._fits(head, hidden, labels):
            return F.linear(hidden, weight, bias)
        assert labels is not None
        self.calls_fused += 1
        self.acted.note()
        check_materialized("lm_head.weight", weight)
        labels = labels.to(hidden.device)
        if request.hidden_only:
            request.linear, request.dtype = head, check_linear_args(hidden, weight, labels, bias)
            return hidden.as_subclass(HiddenRows)
        out = linear_logprobs(
            hidden, weight, labels, bias, softcap=self.form.softcap, logit_scale=self.form.logit_scale, **self.options
        )
        return token_scores(out, labels)

    def _fits(self, head: nn.Linear, hidden: Tensor, labels: Tensor | None) -> bool:
        """Whether these tensors' product is what the trainer would read, and all is as it was probed."""
        model = self.model()
        fits = (
            labels is not None
            and hidden.shape[:-1] == labels.shape
            and not torch.compiler.is_compiling()
            and not is_transformed()
            and not has_hooks_on_logits(model, head)
            and self.form.holds(model)
            and all(map(is_plain, (hidden, head.weight, head.bias)))
        )
        if not fits and not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = True
            logger.warning(
                "liger_trainer: the fused loss did not act in a forward of %s, which built the full logits. Either "
                "lm_head was hooked or replaced after the trainer was made, settings of the logits were changed, the "
                "model was called without input_ids, or it adds tokens of its own.",
                type(model).__name__,
            )
        return fits
