"""The fused loss: computed inside ``lm_head``'s own call, handed over in the model's ``loss_function``.

``model.forward`` is neither replaced nor unwrapped. A forward pre-hook on the causal LM takes note of the labels;
``lm_head.forward`` turns hidden states straight into loss and gradients, where sharded engines have its weight
gathered; the instance's ``loss_function`` returns that loss. Calls without labels, with ``logits_to_keep``, or in
evaluation mode with gradients enabled take the ordinary path.
"""

import copy
import inspect
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ..config import LigerConfig
from ..kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_empty_logits
from ..probing.sharding import check_materialized, full_shape, gathered
from .form import HeadForm
from .lazy_logits import LazyLogits

logger = logging.getLogger(__name__)
IGNORE_INDEX = -100  # of ForCausalLMLoss


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
        self.options = config.options_of("fused_loss")
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
        other_loss = given.get("fused_lm_head") or given.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX
        if labels is None or not everything or other_loss:
            self.call = None
            return
        self.call = _Call(
            labels,
            given.get("shift_labels") if self.form.passes_shift_labels else None,
            _divisor(given.get("num_items_in_batch")) if self.form.passes_num_items else None,
        )

    def after_forward(self, module: nn.Module, args: tuple, output) -> None:
        """Forward hook: forgets the call, so nothing of it outlives the forward."""
        self.call = None

    def loss_function(self, logits: Tensor, labels: Tensor, *args, **kwargs) -> Tensor:
        """The model's ``loss_function``: the loss ``lm_head`` computed, or the original one of real logits."""
        call = self.call
        if call is not None and call.loss is not None:
            if not torch.compiler.is_compiling() and labels is not call.labels and labels.device == call.labels.device:
                raise ValueError(
                    f"labels: {type(self.model).__name__} was called with other labels than those that reach its loss, "
                    "so the fused loss is not the one asked for; use liger_config={'fused_loss': False}"
                )
            # Sharded engines re-gather a module's weight for backward through its outputs: the empty logits left
            # lm_head as an output of the loss's own autograd node, and the sum of nothing brings them into the graph.
            return call.loss + logits.sum() if logits.shape[-1] == 0 else call.loss
        if self.model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not self._warned:
            self._warned = True
            logger.warning(
                "liger_trainer: the fused loss did not act in a training forward of %s, which built the full logits: "
                "lm_head was wrapped or replaced after apply_liger, forward was called past its hooks, or with "
                "logits_to_keep or ignore_index. Call apply_liger again on the outermost model.",
                type(self.model).__name__,
            )
        return self.original_loss_function(logits, labels, *args, **kwargs)

    def head_forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """``lm_head``'s forward: the call's loss and empty or lazy logits, or the ordinary projection."""
        call = self.call
        if call is None or call.loss is not None or not self._fuses(head, hidden, call):
            return F.linear(hidden, head.weight, head.bias)
        # Compiled code would be compiled anew for each value of a counter it reads: there it only says "acted".
        self.calls_fused = 1 if torch.compiler.is_compiling() else self.calls_fused + 1
        check_materialized("lm_head.weight", head.weight)
        labels = self._shifted(call).to(hidden.device)
        options = {
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
        call.loss = linear_cross_entropy(hidden, head.weight, labels, head.bias, **options)
        return _lazy_logits(head, hidden)

    def _fuses(self, head: nn.Linear, hidden: Tensor, call: _Call) -> bool:
        """Whether this is the model's head, called on every labelled position, and the loss function still ours."""
        # In evaluation mode with gradients someone may differentiate through the logits: give them real ones.
        if hidden.shape[:-1] != call.labels.shape or not (self.model.training or not torch.is_grad_enabled()):
            return False
        if torch.compiler.is_compiling():  # the compiler does not compare bound methods and modules reliably
            return True
        own_loss = getattr(self.model.loss_function, "__self__", None) is self
        return own_loss and any(linear is head for linear in head_linears(self.model.get_output_embeddings()))

    @staticmethod
    def _shifted(call: _Call) -> Tensor:
        """Labels aligned with the hidden states: position t holds the token that t predicts."""
        if call.shift_labels is not None:
            return call.shift_labels
        return F.pad(call.labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def _divisor(num_items: Tensor | int | None) -> Tensor | int | None:
    """No items mean no valid label: the loss is 0, whatever it is divided by."""
    return 1 if isinstance(num_items, int) and num_items == 0 else num_items


class HeadForward:
    """Binds one Linear to its ``FusedHead``. A class, not a closure, so that a deep copy of the model stays whole."""

    def __init__(self, fused: FusedHead, head: nn.Linear):
        self.fused, self.head = fused, head

    def __deepcopy__(self, memo):
        """A copy of the head alone (PEFT's ``modules_to_save``) stays with the model; a copied model has its own."""
        fused = copy.deepcopy(self.fused, memo) if id(self.fused.model) in memo else self.fused
        return HeadForward(fused, copy.deepcopy(self.head, memo))

    def forward(self, input: Tensor) -> Tensor:
        """Replaces ``nn.Linear.forward`` on the instance."""
        return self.fused.head_forward(self.head, input)


def why_other_loss(model: nn.Module) -> str | None:
    """None where the model's loss function is transformers' ``ForCausalLMLoss`` or the fused one, else which it is."""
    function = model.loss_function
    if function is ForCausalLMLoss or isinstance(getattr(function, "__self__", None), FusedHead):
        return None
    return f"its loss function is {getattr(function, '__name__', repr(function))}, not ForCausalLMLoss"


def head_linears(head: nn.Module) -> list[nn.Module]:
    """The modules that a call of ``head`` may end in: itself, or what PEFT's ``modules_to_save`` wrapper holds."""
    if hasattr(head, "original_module") and hasattr(head, "modules_to_save"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def _lazy_logits(head: nn.Linear, hidden: Tensor) -> LazyLogits:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    version = head.weight._version

    def compute():
        # A sharded engine's gathering and freeing counts as a change of the weight, too.
        if head.weight._version != version and type(head.weight) is nn.Parameter and not hasattr(head.weight, "ds_id"):
            raise RuntimeError(
                "logits of an evaluation forward are computed when they are read, and lm_head.weight has changed "
                "since: read outputs.logits before the weights change"
            )
        with gathered(head.weight, head.bias) as (weight, bias):  # lm_head's own call is over by then
            return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    shape = (*hidden.shape[:-1], full_shape(head.weight)[0])
    return LazyLogits(compute, shape, dtype, hidden.device)
