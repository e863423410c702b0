"""The fused loss: computed inside ``lm_head``'s own call and returned by the model's ``loss_function``.

``model.forward`` is neither replaced nor unwrapped. A forward pre-hook on the causal LM notes the labels.
``lm_head.forward`` computes loss and gradients from the hidden states, while sharded engines have its weight gathered.
The instance's ``loss_function`` returns that loss. Calls without labels, with ``logits_to_keep``, or in evaluation mode
with gradients enabled take the ordinary path.
"""

import copy
import inspect
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_empty_logits
from ..kernels.reference import IGNORE_INDEX
from ..probing.probe import full_shape
from ..probing.rebinding import mark
from ..probing.rule import Skip
from .form import HeadForm
from .lazy_logits import LazyLogits
from .sharded_weights import check_materialized, gathered

logger = logging.getLogger(__name__)


@dataclass
class _Call:
    """One forward of the causal LM with labels; ``lm_head`` fills in ``loss``."""

    labels: Tensor
    shift_labels: Tensor | None
    num_items: Tensor | int | None
    loss: Tensor | None = None


class FusedHead:
    """Connects the labels, ``lm_head`` and the loss function of one causal LM. Its methods are hooks and replacements.

    Args:
        model: The causal LM.
        form: What the model does between ``lm_head`` and its loss.
        options: Keyword arguments of ``linear_cross_entropy``.
    """

    def __init__(self, model: PreTrainedModel, form: HeadForm, options: dict[str, Any]):
        self.model = model
        self.form = form
        self.options = options
        self.linears = head_linears(model)
        self.original_loss_function = model.loss_function
        self.call: _Call | None = None
        self.calls_fused = 0
        self._parameter_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._warned = False

    def is_current(self) -> bool:
        """Whether the model's output embeddings are still the modules for which this was made."""
        now = head_linears(self.model)
        return set(map(id, now)) == set(map(id, self.linears))

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the causal LM: note the labels if the loss of this call can be fused."""
        given = dict(zip(self._parameter_names, args, strict=False)) | kwargs
        keep = given.get("logits_to_keep")
        everything = keep is None or (isinstance(keep, int) and keep == 0)
        labels = given.get("labels")
        # TRL's own fused head takes labels but does not call lm_head.
        other_loss = given.get("fused_lm_head") or given.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX
        if labels is None or not everything or other_loss:
            self.call = None
            return
        self.call = _Call(
            labels,
            given.get("shift_labels") if self.form.passes_shift_labels else None,
            _divisor(given.get("num_items_in_batch")) if self.form.passes_num_items else None,
        )

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook: drop the call, so that it does not outlive the forward."""
        self.call = None

    @mark
    def loss_function(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's ``loss_function``: the loss that ``lm_head`` computed, or the original one if logits are real.

        Raises:
            ValueError: The labels are not those that the model was called with.
        """
        call = self.call
        if call is not None and call.loss is not None:
            if not torch.compiler.is_compiling() and labels is not call.labels and labels.device == call.labels.device:
                raise ValueError(
                    f"labels: got other labels than those {type(self.model).__name__} was called with; must be the "
                    "same, because the fused loss is computed from those. Use liger_config={'fused_loss': False}"
                )
            # Sharded engines gather a module's weight for backward through a hook on its outputs. The empty logits are
            # an output of the same autograd node as the loss, and adding their sum, 0, puts them into the graph.
            return call.loss + logits.sum() if logits.shape[-1] == 0 else call.loss
        if self.model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not self._warned:
            self._warned = True
            logger.warning(
                "liger_trainer: the fused loss did not act in a training forward of %s, which built the full logits. "
                "Either lm_head was wrapped or replaced after apply_liger, or forward was called without its hooks, or "
                "with logits_to_keep or ignore_index. Call apply_liger again on the outermost model.",
                type(self.model).__name__,
            )
        return self.original_loss_function(logits, labels, *args, **kwargs)

    def head_forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """``lm_head``'s forward: sets the call's loss and returns empty or lazy logits, or projects as usual."""
        call = self.call
        if call is None or call.loss is not None or not self._fuses(head, hidden, call):
            return F.linear(hidden, head.weight, head.bias)
        # torch.compile would recompile for each value of a counter, so compiled code only sets it to 1.
        self.calls_fused = 1 if torch.compiler.is_compiling() else self.calls_fused + 1
        check_materialized("lm_head.weight", head.weight)
        labels = self._shifted(call).to(hidden.device)
        options: dict[str, Any] = {
            "softcap": self.form.softcap,
            "logit_scale": self.form.logit_scale,
            "num_items": call.num_items,
            **self.options,
        }
        if torch.is_grad_enabled():
            call.loss, _, empty_logits = linear_cross_entropy_with_empty_logits(
                hidden, head.weight, labels, head.bias, **options
            )
            return empty_logits
        call.loss = cast(Tensor, linear_cross_entropy(hidden, head.weight, labels, head.bias, **options))
        return _lazy_logits(head, hidden)

    def _fuses(self, head: nn.Linear, hidden: Tensor, call: _Call) -> bool:
        """Whether this is the model's head, called on every labelled position, and the loss function is still ours."""
        # In evaluation mode with gradients, the caller may differentiate through the logits, so they must be real.
        if hidden.shape[:-1] != call.labels.shape or not (self.model.training or not torch.is_grad_enabled()):
            return False
        if torch.compiler.is_compiling():  # comparing bound methods and modules is not reliable there
            return True
        own_loss = getattr(self.model.loss_function, "__self__", None) is self
        return own_loss and any(linear is head for linear in head_linears(self.model))

    @staticmethod
    def _shifted(call: _Call) -> Tensor:
        """Labels aligned with the hidden states: position t holds the token that t predicts."""
        if call.shift_labels is not None:
            return call.shift_labels
        return F.pad(call.labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def _divisor(num_items: Tensor | int | None) -> Tensor | int | None:
    """The divisor of the loss. 0 becomes 1: without items there is no valid label, and the loss is 0 anyway."""
    return 1 if isinstance(num_items, int) and num_items == 0 else num_items


class HeadForward:
    """Binds one Linear to its ``FusedHead``. A class, not a closure, so that deep copies of the model work."""

    def __init__(self, fused: FusedHead, head: nn.Linear):
        self.fused, self.head = fused, head

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadForward":
        """A copy of the head alone (PEFT's ``modules_to_save``) keeps the ``FusedHead``; a copied model has its own."""
        fused = copy.deepcopy(self.fused, memo) if id(self.fused.model) in memo else self.fused
        return HeadForward(fused, copy.deepcopy(self.head, memo))

    @mark
    def forward(self, input: Tensor) -> Tensor:
        """Replaces ``nn.Linear.forward`` on the instance."""
        return self.fused.head_forward(self.head, input)


def check_loss_function(model: PreTrainedModel) -> None:
    """Check that the model's loss function is transformers' ``ForCausalLMLoss`` or the fused one.

    Raises:
        Skip: It is another function.
    """
    function = model.loss_function
    if function is not ForCausalLMLoss and not isinstance(getattr(function, "__self__", None), FusedHead):
        raise Skip(f"its loss function is {getattr(function, '__name__', repr(function))}, not ForCausalLMLoss")


def head_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The modules that compute the logits: the output embeddings, or those in PEFT's ``modules_to_save`` wrapper."""
    head: Any = model.get_output_embeddings()
    if hasattr(head, "original_module") and hasattr(head, "modules_to_save"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def _lazy_logits(head: nn.Linear, hidden: Tensor) -> LazyLogits:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    version = head.weight._version

    def compute() -> Tensor:
        # When a sharded engine gathers or frees the weight, its version changes, too.
        if head.weight._version != version and type(head.weight) is nn.Parameter and not hasattr(head.weight, "ds_id"):
            raise RuntimeError(
                "logits of an evaluation forward are computed when they are read, and lm_head.weight has changed "
                "since then: read outputs.logits before the weights change"
            )
        with gathered(head.weight, head.bias) as (weight, bias):  # lm_head's own call is over by then
            return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    shape = (*hidden.shape[:-1], full_shape(head.weight)[0])
    return LazyLogits(compute, shape, dtype, hidden.device)
