"""The fused loss: computed inside ``lm_head``'s own call, handed over in the model's ``loss_function``.

``model.forward`` is neither replaced nor unwrapped. A forward pre-hook on the causal LM takes note of the labels;
``lm_head.forward`` turns hidden states straight into loss and gradients, where sharded engines have its weight
gathered; the instance's ``loss_function`` returns that loss. Calls without labels, with ``logits_to_keep``, or in
evaluation mode with gradients enabled take the ordinary path.
"""

import inspect
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LigerConfig
from .head_probe import HeadForm
from .kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_empty_logits
from .lazy_logits import LazyLogits
from .sharding import check_materialized, full_shape, gathered

logger = logging.getLogger(__name__)


@dataclass
class _Call:
    """One forward of the causal LM with labels; ``loss`` is filled in by ``lm_head``."""

    labels: Tensor
    shift_labels: Tensor | None
    num_items: Tensor | int | None
    loss: Tensor | None = None


class FusedHead:
    """Ties one causal LM's labels, ``lm_head`` and loss function together. Its methods are hooks and replacements."""

    def __init__(self, model: nn.Module, form: HeadForm, config: LigerConfig):
        self.model = model
        self.form = form
        self.config = config
        self.original_loss_function = model.loss_function
        self.call: _Call | None = None
        self.calls_fused = 0
        self._parameter_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._warned = False

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the causal LM: take note of the labels, where this call's loss can be fused."""
        given = dict(zip(self._parameter_names, args, strict=False)) | kwargs
        keep = given.get("logits_to_keep")
        everything = keep is None or (isinstance(keep, int) and keep == 0)
        labels = given.get("labels")
        # TRL's own fused head takes the labels but does not call lm_head.
        if labels is None or not everything or given.get("fused_lm_head"):
            self.call = None
            return
        self.call = _Call(
            labels,
            given.get("shift_labels") if self.form.passes_shift_labels else None,
            given.get("num_items_in_batch") if self.form.passes_num_items else None,
        )

    def after_forward(self, module: nn.Module, args: tuple, output) -> None:
        """Forward hook: forgets the call, so nothing of it outlives the forward."""
        self.call = None

    def loss_function(self, logits: Tensor, labels: Tensor, *args, **kwargs) -> Tensor:
        """The model's ``loss_function``: the loss ``lm_head`` computed, or the original one of real logits."""
        call = self.call
        if call is not None and call.loss is not None:
            # Sharded engines re-gather a module's weight for backward through its outputs: the empty logits left
            # lm_head as an output of the loss's own autograd node, and the sum of nothing brings them into the graph.
            return call.loss + logits.sum() if logits.shape[-1] == 0 else call.loss
        if call is None and self.model.training and torch.is_grad_enabled() and not self._warned:
            self._warned = True
            logger.warning(
                "liger_trainer: the fused loss did not act, because %s.forward was called without its hooks (by a "
                "wrapper made after apply_liger?) or with logits_to_keep. Call apply_liger on the outermost model.",
                type(self.model).__name__,
            )
        return self.original_loss_function(logits, labels, *args, **kwargs)

    def head_forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """``lm_head``'s forward: the call's loss and empty or lazy logits, or the ordinary projection."""
        call = self.call
        if call is None or call.loss is not None or not self._fuses(hidden, call):
            return F.linear(hidden, head.weight, head.bias)
        # Compiled code would be compiled anew for each value of a counter it reads: there it only says "acted".
        self.calls_fused = 1 if torch.compiler.is_compiling() else self.calls_fused + 1
        check_materialized("lm_head.weight", head.weight)
        labels = self._shifted(call).to(hidden.device)
        options = {
            "softcap": self.form.softcap,
            "logit_scale": self.form.logit_scale,
            "num_items": call.num_items,
            "logits_budget_mib": self.config.logits_budget_mib,
            "low_memory": self.config.low_memory,
        }
        if torch.is_grad_enabled():
            call.loss, _, empty_logits = linear_cross_entropy_with_empty_logits(
                hidden, head.weight, labels, head.bias, **options
            )
            return empty_logits
        call.loss = linear_cross_entropy(hidden, head.weight, labels, head.bias, **options)
        return _lazy_logits(head, hidden)

    def _fuses(self, hidden: Tensor, call: _Call) -> bool:
        """Whether lm_head is called on every labelled position by a model whose loss function is still ours."""
        # The user may have set their own after apply_liger; the compiler does not compare bound methods reliably.
        if not torch.compiler.is_compiling() and getattr(self.model.loss_function, "__self__", None) is not self:
            return False
        # In evaluation mode with gradients someone may differentiate through the logits: give them real ones.
        return hidden.shape[:-1] == call.labels.shape and (self.model.training or not torch.is_grad_enabled())

    @staticmethod
    def _shifted(call: _Call) -> Tensor:
        """Labels aligned with the hidden states: position t holds the token that t predicts."""
        if call.shift_labels is not None:
            return call.shift_labels
        return F.pad(call.labels[..., 1:], (0, 1), value=-100)


class HeadForward:
    """Binds one Linear to its ``FusedHead``. A class, not a closure, so that a deep copy of the model stays whole."""

    def __init__(self, fused: FusedHead, head: nn.Linear):
        self.fused, self.head = fused, head

    def forward(self, input: Tensor) -> Tensor:
        """Replaces ``nn.Linear.forward`` on the instance."""
        return self.fused.head_forward(self.head, input)


def _lazy_logits(head: nn.Linear, hidden: Tensor) -> LazyLogits:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def compute():
        with gathered(head.weight, head.bias) as (weight, bias):  # lm_head's own call is over by then
            return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    shape = (*hidden.shape[:-1], full_shape(head.weight)[0])
    return LazyLogits(compute, shape, dtype, hidden.device)
