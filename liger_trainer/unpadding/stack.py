"""The forward of a decoder stack that takes padded batches as one row of their real tokens."""

import enum
import functools
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module
from transformers.utils.import_utils import is_tracing

from ..head.fused_head import fused_head_of
from ..head.per_thread import PerThread, Reading, reading
from ..kernels.reference import IGNORE_INDEX
from ..probing.hooks import is_of_engine, reader_of_outputs
from ..probing.probe import submodules
from ..probing.rebinding import ModuleRef
from ..probing.rule import Acted
from .attention import IMPLEMENTATIONS
from .check import UNCHECKED, Verdict, check
from .layout import Layout, RowLengths, is_per_token, layout_of, read_mask
from .mixers import Mixers
from .run import run_unpadded, takes_all

logger = logging.getLogger(__name__)

_CHECKING = threading.RLock()

# The number of tokens is filled up to a multiple of this. On a GPU, kernels are compiled again if the divisibility
# changes.
MULTIPLE = {"cuda": 128}
# Un-padding does not pay where there is little padding. A batch is un-padded if at most this share of its positions
# remains.
PAYS_BELOW = 0.9
# If one of these arguments is set, the batch stays padded: the argument or its output would be wrong for a packed row.
_ORDINARY = ("past_key_values", "use_cache", "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class Pooling(enum.Enum):
    """Which hidden states a model pools to get one vector for each row."""

    LAST = "the last token's, which is found by its id, or is in the last column if there are no ids"
    FIRST_OR_ALL = "the first column's, or all of the mask's"


@dataclass
class Removed:
    """How many places of the batches were padding that the layers did not see."""

    places: int = 0
    removed: int = 0

    def share(self) -> float:
        """The share of the places that was removed."""
        return self.removed / self.places if self.places else 0.0


@dataclass
class UnpaddedStack:
    """The settings of one model's decoder stack; ``forward`` takes the place of the stack's.

    Args:
        core: The model that calls the stack.
        acted: Set when a batch ran un-padded; refuses when the check fails.
        pools: How the model makes one state of each row, in evaluation too; ``None``: it does not.
    """

    core: ModuleRef
    acted: Acted
    pools: Pooling | None
    labels: PerThread = field(default_factory=PerThread)
    may_drop_mask: PerThread = field(default_factory=PerThread)  # asks the rule that drops masks
    mixers: Mixers = field(default_factory=Mixers)
    masks_made_outside: bool = False  # a module around the stack hands it masks by kind of layer
    verdict: Verdict = UNCHECKED
    structure: tuple = ()  # of the stack when it was checked
    removed: Removed = field(default_factory=Removed)
    has_warned: bool = False  # that a hook keeps batches padded

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of ``core``: note the labels, because labels at padding need its hidden states."""
        shifted = kwargs.get("shift_labels")
        self.labels.slot.value = kwargs.get("labels") if shifted is None else shifted

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of ``core``: forget the labels."""
        self.labels.slot.value = self.may_drop_mask.slot.value = None

    def may_unpad(self) -> bool:
        """Whether the check has not failed."""
        return self.verdict.reason is None

    def wrap(self, original: Callable) -> Callable:
        """The forward that takes the place of the stack's."""
        return functools.partial(self.forward, original)

    def wrap_outer(self, original: Callable) -> Callable:
        """The forward that replaces that of a module around the stack."""
        return functools.partial(self.forward_outer, original)

    def forward_outer(self, original: Callable, outer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``forward`` for a module around the stack that makes the stack's masks from the 2-D mask.

        It runs the original if the batch has images, or if weights are sharded: the check gathers sharded weights on
        all processes, and a process with images would not take part.
        """
        given = _by_name(original, args, kwargs)
        mask: Any = given.get("attention_mask")
        if not self.masks_made_outside or not is_readable(mask) or is_sharded(outer):
            return original(outer, *args, **kwargs)
        tensors = [value for value in given.values() if torch.is_tensor(value) and value.dim()]
        if not all(is_per_token(tensor, mask.shape) for tensor in tensors):
            return original(outer, *args, **kwargs)
        return self.forward(original, outer, **given)

    def forward(self, original: Callable, stack: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The stack's forward: un-padded where that gives the same and pays, or else the ``original`` one."""
        if torch.compiler.is_compiling() or not self._ignores_padding():
            return original(stack, *args, **kwargs)
        given = _by_name(original, args, kwargs)
        mask: Any = given.get("attention_mask")
        self.masks_made_outside |= type(mask) is dict
        may_drop = self.may_drop_mask.slot.value
        fits = self._fits(original, stack, given) if is_readable(mask) else False
        if not fits and (may_drop is None or not is_readable(mask)):
            return original(stack, *args, **kwargs)
        lengths = self._read(mask, given, stack)
        if fits and lengths is not None:
            layout = self._layout(lengths, mask.device)
            if layout is not None and takes_all(layout, given):
                self.acted.note()
                self.removed.removed += lengths.places - lengths.real
                return run_unpadded(original, stack, given, layout, self.verdict.positions)
        if lengths is not None and may_drop is not None and lengths.are_padded_right() and may_drop():
            given["attention_mask"] = None
            return original(stack, **given)
        return original(stack, *args, **kwargs)

    def _fits(self, original: Callable, stack: Any, given: dict[str, Any]) -> bool:
        """Whether the stack has passed the check and these arguments allow a packed row.

        The check runs in the first forward with such arguments, on all processes at once, because all of them must
        gather sharded weights.
        """
        unset = (given.get(name) is None or given[name] is False for name in _ORDINARY)
        if not all(unset) or stack.config.output_attentions or self._loss_is_foreign():
            return False
        if stack.config._attn_implementation not in IMPLEMENTATIONS:
            return False
        hook = _foreign_hook(stack) or reader_of_outputs(self.core())
        if hook is not None:
            self._warn_of(hook)
            return False
        structure = _structure(stack)
        with _CHECKING:  # another thread must not use the verdict before it is found
            if self.structure != structure:
                self.verdict = check(original, stack, given, self.mixers)
                self.structure = structure
                if self.verdict.reason is not None:
                    self.acted.refuse(self.verdict.reason)
        return self.verdict.reason is None

    def _loss_is_foreign(self) -> bool:
        """Whether the model's loss function is the user's, which may read logits at padding."""
        function = getattr(self.core(), "loss_function", None)
        known = function is None or fused_head_of(function) is not None
        return not known and not (getattr(function, "__module__", None) or "").startswith("transformers.")

    def _warn_of(self, hook: Any) -> None:
        if not self.has_warned:
            name = getattr(hook, "__qualname__", type(hook).__name__)
            logger.warning(
                "liger_trainer: batches stay padded because the hook %s would see other values at padding", name
            )
            self.has_warned = True

    def _ignores_padding(self) -> bool:
        """Whether the hidden states of padding are not read in this forward, unless the labels say so."""
        return self.core().training or self.pools is not None or reading() is not None

    def _read(self, mask: Tensor, given: dict[str, Any], stack: Any) -> RowLengths | None:
        """The rows of the batch; ``None`` if the hidden states of padding are needed."""
        self.removed.places += mask.numel()
        labels, ids = self._reading().labels, given.get("input_ids")
        if self.pools is Pooling.FIRST_OR_ALL:
            labels = None
        elif self.pools is Pooling.LAST:  # it does not look at the mask, so what it reads must not be padding
            if ids is None:
                return None
            # A config of text and images has no such field of its own.
            pad = getattr(stack.config.get_text_config(), "pad_token_id", None)
            labels = ids if pad is None else ids.masked_fill(ids == pad, IGNORE_INDEX)
        if labels is not None and labels.shape != mask.shape:  # not one label for each token
            return None
        return read_mask(mask, labels)

    def _reading(self) -> Reading:
        known = reading()
        labels = self.labels.slot.value
        if known is None:
            return Reading(labels)
        return Reading(labels if known.labels is None else known.labels, known.lookahead)

    def _layout(self, lengths: RowLengths, device: torch.device) -> Layout | None:
        """The batch as a row; ``None`` if it has hardly any padding, or the check does not hold for it."""
        lookahead = self._reading().lookahead
        if not lengths.rows or lengths.real > PAYS_BELOW * lengths.places or not self._holds_for(lengths, lookahead):
            return None
        layout = layout_of(lengths, device, MULTIPLE.get(device.type, 1), lookahead)
        pays = layout.total <= PAYS_BELOW * lengths.places
        return layout if pays and layout.longest <= self.verdict.longest else None

    def _holds_for(self, lengths: RowLengths, lookahead: int) -> bool:
        """Whether the check holds for rows that are padded like these."""
        if lengths.are_padded_right():
            return True
        if self.pools is not None:
            return self.pools is Pooling.LAST and self.verdict.left
        predicts_first = lengths.predicts_first or lookahead > 1
        if self.labels.slot.value is None and reading() is None:  # any hidden state may be read
            predicts_first = True
        return self.verdict.left and (self.verdict.ahead or not predicts_first)


def _by_name(original: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(original).parameters)[1:] if args else ()
    return dict(zip(names, args, strict=False)) | kwargs


def is_sharded(module: nn.Module) -> bool:
    """Whether using the parameters takes all processes: FSDP2's and ZeRO-3's."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())


def is_readable(mask: Any) -> bool:
    """Whether this is a 2-D mask whose values the host may read."""
    return torch.is_tensor(mask) and mask.dim() == 2 and not cannot_be_read(mask)


def cannot_be_read(tensor: Tensor) -> bool:
    """Whether reading its values is an error, or would make them constants of a traced graph."""
    return is_tracing(tensor) or tensor.is_meta or cast(Any, torch._C)._functorch.is_functorch_wrapped_tensor(tensor)


def _structure(stack: Any) -> tuple:
    """What the check's verdict depends on."""
    modules = ((type(module), module.__dict__.get("is_causal")) for module in submodules(stack))
    settings = vars(stack.config)
    names = ("_attn_implementation_internal", "sliding_window", "is_causal")
    return (*modules, *(settings.get(name) for name in names))


def _foreign_hook(stack: nn.Module) -> Any:
    """A hook inside of the stack for which a row in place of the batch makes a difference; ``None`` if there is none.

    NEFTune's is one of them: its noise depends on the number of columns.
    """
    for module in submodules(stack):
        tables = (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        )  # fmt: skip
        for hooks in tables if module is not stack else ():
            for hook in hooks.values():
                if not _is_indifferent(hook):
                    return hook
    everywhere = (*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values())
    return next((hook for hook in everywhere if not _is_indifferent(hook)), None)


def _is_indifferent(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or ""
    if getattr(hook, "__name__", "").startswith("neftune"):
        return False
    return is_of_engine(hook) or module.startswith(("transformers.", "peft."))
