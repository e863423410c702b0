"""The fused loss: computed inside ``lm_head``'s own call and returned by the model's ``loss_function``.

``model.forward`` is neither replaced nor unwrapped. A forward pre-hook on the causal LM notes the labels.
``lm_head.forward`` computes loss and gradients from the hidden states, while sharded engines have its weight gathered.
The instance's ``loss_function`` returns that loss. What the probe relied on is checked at each call. Calls for which it
does not hold take the ordinary path, as do those without labels, with ``logits_to_keep``, or in evaluation mode with
gradients enabled.
"""

import copy
import inspect
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_empty_logits
from ..kernels.reference import IGNORE_INDEX
from ..kernels.runtime.autograd import is_transformed
from ..probing.hooks import has_hooks_on_outputs, is_of_engine
from ..probing.rebinding import Bound, ModuleRef
from ..probing.rule import Acted, Skip
from .form import HeadForm, loss_arguments
from .per_thread import PerThread, wants_loss_only
from .sharded_weights import check_materialized
from .unbuilt_logits import LossOnlyLogits, UnbuiltLogits, zero_of

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        self.model = ModuleRef(model)
        self.form = form
        self.options = options
        self.original_loss_function = model.loss_function
        self.calls_fused = 0
        self._running = PerThread()  # the ``_Call`` of each thread
        self.acted = Acted()
        self._parameter_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedHead":
        """A copy of the head alone (PEFT's ``modules_to_save``) shares this; a copied model has its own."""
        if id(self.model()) not in memo:
            return self
        memo[id(self)] = copied = copy.copy(self)
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def is_current(self) -> bool:
        """Whether the model's output embeddings and settings are still those for which this was made."""
        model = self.model()
        return all(self._is_bound_to(head) for head in head_linears(model)) and self.form.holds(model)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the causal LM: note the labels if the loss of this call can be fused."""
        given = dict(zip(self._parameter_names, args, strict=False)) | kwargs
        keep = given.get("logits_to_keep")
        everything = keep is None or (isinstance(keep, int) and keep == 0)
        labels = given.get("labels")
        # TRL's own fused head takes labels but does not call lm_head.
        other_loss = given.get("fused_lm_head") or given.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX
        if labels is None or not everything or other_loss:
            self._running.slot.value = None
            return
        self._running.slot.value = _Call(
            labels,
            given.get("shift_labels") if self.form.passes_shift_labels else None,
            given.get("num_items_in_batch") if self.form.passes_num_items else None,
        )

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook: drop the call, so that it does not outlive the forward."""
        self._running.slot.value = None

    def loss_function(self, model: PreTrainedModel, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's ``loss_function``: the loss that ``lm_head`` computed, or the original one of ``logits``.

        Raises:
            ValueError: The arguments are not those that the model was called with.
        """
        call: _Call | None = self._running.slot.value
        if call is not None and call.loss is not None:
            if not torch.compiler.is_compiling():
                _check_arguments(type(model).__name__, call, labels, loss_arguments(args, kwargs))
            # Sharded engines gather a module's weight for backward through a hook on its outputs. The empty logits are
            # an output of the same autograd node as the loss, and adding their sum, 0, puts them into the graph.
            loss = call.loss + zero_of(logits) if logits.shape[-1] == 0 else call.loss
            return loss.float()  # as ForCausalLMLoss gives it, also to a model in fp64
        if model.training and torch.is_grad_enabled():
            self._warn(
                "the fused loss did not act in a training forward of %s, which built the full logits. Either lm_head "
                "was wrapped, hooked or replaced after apply_liger, or settings of the logits were changed, or forward "
                "was called without its hooks, or with logits_to_keep or ignore_index. Call apply_liger again on the "
                "outermost model.",
                type(model).__name__,
            )
        return self.original_loss_function(logits, labels, *args, **kwargs)

    def note_call(self) -> None:
        """Count a call in which the loss was computed."""
        # torch.compile would recompile for each value of a counter, so compiled code only sets it to 1.
        self.calls_fused = 1 if torch.compiler.is_compiling() else self.calls_fused + 1
        self.acted.note()

    def head_forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """``lm_head``'s forward: sets the call's loss.

        Returns:
            Unbuilt logits in training and where only the loss is wanted, or else what ``nn.Linear`` returns.
        """
        call: _Call | None = self._running.slot.value
        weight, bias = head.weight, head.bias
        if call is None or call.loss is not None or not self._fuses(head, hidden, weight, bias, call):
            return F.linear(hidden, weight, bias)
        self.note_call()
        check_materialized("lm_head.weight", weight)
        labels = self._shifted(call).to(hidden.device)
        options: dict[str, Any] = {
            "softcap": self.form.softcap,
            "logit_scale": self.form.logit_scale,
            "num_items": _divisor(call.num_items),
            **self.options,
        }
        if torch.is_grad_enabled() or wants_loss_only():
            call.loss, _, empty = linear_cross_entropy_with_empty_logits(hidden, weight, labels, bias, **options)
            if torch.compiler.is_compiling():
                return empty
            return empty.as_subclass(UnbuiltLogits if torch.is_grad_enabled() else LossOnlyLogits)
        call.loss = cast(Tensor, linear_cross_entropy(hidden, weight, labels, bias, **options))
        return F.linear(hidden, weight, bias)

    def _fuses(self, head: nn.Linear, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> bool:
        """Whether the model's logits are these tensors' product and nothing else, and all is as it was probed."""
        model = self.model()
        # In evaluation mode with gradients, the caller may differentiate through the logits, so they must be real.
        if hidden.shape[:-1] != call.labels.shape or not (model.training or not torch.is_grad_enabled()):
            return False
        if fused_head_of(vars(model).get("_loss_function")) is not self or has_hooks_on_logits(model, head):
            return False
        if not all(map(self._is_bound_to, head_linears(model))) or not self.form.holds(model):
            return False
        if torch.compiler.is_compiling():
            return True
        return not is_transformed() and all(map(is_plain, (hidden, weight, bias)))

    def _is_bound_to(self, head: nn.Module) -> bool:
        """Whether calling ``head`` runs ``head_forward`` of this, and nothing else but accelerate's device hooks."""
        forward, moved = (vars(head).get(name) for name in ("forward", "_old_forward"))
        return fused_head_of(moved if moved is not None and is_of_engine(forward) else forward) is self

    def _warn(self, message: str, *args: Any) -> None:
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            logger.warning(f"liger_trainer: {message}", *args)

    @staticmethod
    def _shifted(call: _Call) -> Tensor:
        """Labels aligned with the hidden states: position t holds the token that t predicts."""
        if call.shift_labels is not None:
            return call.shift_labels
        return F.pad(call.labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def _divisor(num_items: Tensor | int | None) -> Tensor | int | None:
    """The divisor of the loss. 0 becomes 1: without items there is no valid label, and the loss is 0 anyway."""
    return 1 if isinstance(num_items, int) and num_items == 0 else num_items


def _check_arguments(cls: str, call: _Call, labels: Tensor, given: dict[str, Any]) -> None:
    """Check that the loss function gets what the model was called with; a device may differ."""
    expected = {
        "labels": call.labels,
        "shift_labels": call.shift_labels,
        "num_items_in_batch": call.num_items,
        "ignore_index": IGNORE_INDEX,
    }
    for name, value in expected.items():
        got = labels if name == "labels" else given[name]
        moved = torch.is_tensor(got) and torch.is_tensor(value) and got.device != value.device
        if got is not value and not moved and not (name == "ignore_index" and got == value):
            raise ValueError(
                f"{name}: got another value in loss_function than {cls} was called with; must be the same, because the "
                "fused loss is computed from that. Set fused_loss: false in liger_config"
            )


def fused_head_of(value: Any) -> FusedHead | None:
    """The ``FusedHead`` whose method ``value``, an attribute of a module, is; ``None`` for anything else."""
    owner = getattr(value.function, "__self__", None) if isinstance(value, Bound) else None
    return owner if isinstance(owner, FusedHead) else None


def is_plain(tensor: Tensor | None) -> bool:
    """Whether this is a tensor of torch itself. Quantised and distributed ones do not write where ``out=`` says."""
    return tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES)


def check_weights(model: nn.Module, linear: nn.Module) -> None:
    """Check that the weights of ``linear`` are plain ones, or will be when FSDP2 has gathered them.

    Raises:
        Skip: They are not.
    """
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, tensor in linear.named_parameters(recurse=False):
        if not is_plain(tensor) and not (sharded and isinstance(tensor, DTensor)):
            cls = type(tensor)
            kind = f"{cls.__name__} of {cls.__module__.partition('.')[0]}" if tensor.dtype in DTYPES else tensor.dtype
            raise Skip(f"its {name} is a {kind}, not a plain tensor of floating-point numbers")


def has_hooks_on_logits(model: PreTrainedModel, head: nn.Module) -> bool:
    """Whether something other than an engine sees the output of ``head``, or of PEFT's wrapper around it.

    Hooks, or a forward that was put in place of the wrapper's.
    """
    outermost = model.get_output_embeddings()
    if has_hooks_on_outputs(head) or outermost is None or outermost is head:
        return has_hooks_on_outputs(head)
    forward = vars(outermost).get("forward")
    return has_hooks_on_outputs(outermost) or not (forward is None or is_of_engine(forward))


def check_loss_function(model: PreTrainedModel) -> None:
    """Check that the model's loss function is transformers' ``ForCausalLMLoss`` or the fused one.

    Raises:
        Skip: It is another function.
    """
    function = model.loss_function
    if function is not ForCausalLMLoss and fused_head_of(function) is None:
        raise Skip(f"its loss function is {getattr(function, '__name__', repr(function))}, not ForCausalLMLoss")


def head_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The modules that compute the logits: the output embeddings, or those in PEFT's ``modules_to_save`` wrapper."""
    head: Any = model.get_output_embeddings()
    if hasattr(head, "original_module") and hasattr(head, "modules_to_save"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]
