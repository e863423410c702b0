"""Decides for each training batch which layers recompute their activations, and measures what that takes.

The first forward runs as the user asked, but for one layer of each kind, which keeps its activations and is measured.
From then on the first layer of each batch keeps its activations, and what it adds tells how many others can.
"""

import functools
import logging
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..head.fused_head import fused_head_of
from ..kernels.linear_loss.chunk_sizes import head_bytes
from ..kernels.linear_loss.options import MemoryOptions
from ..probing.rebinding import ModuleRef
from ..probing.rule import Acted
from . import card as cards
from .layers import flag, has_past, hidden_states, is_of_torch, output_with_gradient
from .measured import Measured, Parameters, Size, head_shape
from .plan import Costs, layers_to_recompute, peak

logger = logging.getLogger(__name__)

GIB = 2**30
# Share of the device by which the budget shrinks when the allocator had to return memory, and when it ran out of it.
AFTER_RETRY, AFTER_FAILURE = 0.01, 0.1
# An unknown layer is kept and measured if its hidden states fit this many times more. A decoder layer keeps 15 to 40
# times as much, needs it again for gradients, and another layer recomputes at the same time.
ROOM_TO_MEASURE = 90
ROUNDS = 8  # backwards after which it is forgotten that one had several forwards
MIXED = "not all of them are set to be checkpointed"
RECOMPUTED = "recomputed"  # among the kinds of layers that were measured


@dataclass
class Run:
    """One forward of the layers.

    Args:
        card: The memory of the device.
        device: Where the hidden states are.
        asked: Whether the user asked for recomputation.
        tokens: Places of the batch that the layers see.
        output: Bytes of one layer's hidden states.
        costs: What the forward and its backward take, but for the sizes of the layers.
        budget: The most bytes that may be in tensors.
        alike: All processes must recompute the same layers.
        retries: The allocator's before it.
        recomputed: The layers that recompute; ``None``: as the user asked, but for those that are measured.
        noted: What was measured in it: kinds of layers that keep their activations, and ``RECOMPUTED``.
        layers: How many have recomputed so far.
        end: Bytes in tensors after the last layer.
    """

    card: cards.Card
    device: torch.device
    asked: bool
    tokens: int
    output: int
    costs: Costs
    budget: float
    alike: bool
    retries: int
    recomputed: frozenset[int] | None = None
    noted: set[Hashable] = field(default_factory=set)
    layers: int = 0
    end: int | None = None


@dataclass
class Logged:
    """Forwards since the last log, and how many layers recomputed in all of them together."""

    forwards: int = 0
    layers: int = 0


@dataclass
class Recompute:
    """Which layers of one model recompute; ``forward`` takes the place of each layer's.

    Args:
        core: The model.
        acted: Set when layers recompute otherwise than the user asked.
        count: Number of the layers.
        margin: Share of the device that stays free.
        of_head: How much memory the fused loss may take.
    """

    core: ModuleRef
    acted: Acted
    count: int
    margin: float
    of_head: MemoryOptions
    measured: Measured = field(default_factory=Measured)
    flags: dict[int, bool] = field(default_factory=dict)  # the user's, in the last forward
    run: Run | None = None
    last: Run | None = None  # the last forward that came to its end, or failed
    logged: Logged = field(default_factory=Logged)
    lost: float = 0  # bytes by which the budget has shrunk
    retries: int = 0  # the allocator's that were counted
    parameters: Parameters | None = None
    cautious: bool = False  # the next forward recomputes all layers
    left: str | None = None  # why the last forward's layers were left as the user set them
    told: set[str] = field(default_factory=set)
    most: int = -1  # layers that recompute, as the report says
    # Outputs of first layers, which live as long as their graph: a loss may take several forwards.
    outputs: list[weakref.ref] = field(default_factory=list)
    rounds: deque[int] = field(default_factory=lambda: deque(maxlen=ROUNDS))  # how many forwards backwards had

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"run": None, "last": None, "parameters": None, "outputs": []}

    def wrap(self, index: int, of_class: Callable, original: Callable) -> Callable:
        """The forward that takes the place of layer ``index``'s.

        The class's own forward is looked up at each call, because FSDP2 gives the layer another class.
        """
        return functools.partial(self.forward, index, None if original is of_class else original)

    def forward(self, index: int, original: Callable | None, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, with the flag that makes transformers checkpoint it set for this call alone."""
        call = original or type(layer).forward
        if torch.compiler.is_compiling() or not layer.training or not torch.is_grad_enabled() or _in_backward():
            return call(layer, *args, **kwargs)
        if index == 0:
            self.run = self._start(layer, args, kwargs)
            self.flags = {}
        self.flags[index] = layer.gradient_checkpointing
        run = self.run
        if run is None or self.flags[index] != run.asked:
            self.run = self.last = None
            if run is not None:
                self._leave(MIXED)
            return call(layer, *args, **kwargs)
        kind = self.measured.note_layer(index, layer)
        recomputes = self._recomputes(run, index, kind)
        measures = (RECOMPUTED if recomputes else kind) not in run.noted
        before = run.card.allocated() if measures else 0
        with flag(layer, recomputes):
            output = call(layer, *args, **kwargs)
        if index == 0:
            self._watch(run, output_with_gradient(output))
        if measures:
            self._note(run, index, kind, recomputes, Size(max(0, run.card.allocated() - before), run.tokens))
        run.layers += recomputes
        if index == self.count - 1:
            self._end(run)
        return output

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: forget layers that ran without it."""
        self.run = None

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the model: measure its head."""
        run, self.run = self.run, None
        if run is None or run.end is None or output is None:  # None: it has failed
            return
        self.measured.note_head(max(0, run.card.allocated() - run.end), run.tokens)

    def logs(self) -> dict[str, float]:
        """Entries for the Trainer's logs, over the forwards since the last call."""
        logged, self.logged = self.logged, Logged()
        if not logged.forwards or self.last is None:
            return {}
        reading = self.last.card.read()
        headroom = (reading.free + reading.reserved - self.last.card.peak()) / GIB
        return {
            "recomputed_layers": round(logged.layers / logged.forwards, 2), "memory_headroom_gib": round(headroom, 2)
        }  # fmt: skip

    def give_up_more(self) -> bool:
        """After running out of memory: let the next forward recompute all layers, and shrink the budget.

        Returns:
            Whether there was anything to give up.
        """
        run, self.run = self.last, None
        if run is None or (run.recomputed is not None and len(run.recomputed) == self.count):
            return False
        self.lost += AFTER_FAILURE * run.card.read().total
        self.cautious = True
        return True

    def _start(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> Run | None:
        """Plan a forward. What goes wrong in that must not end the user's training."""
        try:
            run = self._begin(layer, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            run = self.last = self._leave(f"planning failed with {type(error).__name__}: {error}")
        if run is not None:
            self.left = None
            if run.alike:
                self._agree(run)
        return run

    def _begin(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> Run | None:
        """Read the memory before the first layer; ``None``: leave this forward to the user's settings."""
        self.last = None
        hidden = hidden_states(args, kwargs)
        card = None if hidden is None else cards.card_of(hidden.device)
        asked = layer.gradient_checkpointing
        if hidden is None or card is None or has_past(kwargs):
            return None
        if len({*self.flags.values()}) > 1:
            return self._leave(MIXED)
        if asked and not is_of_torch(layer._gradient_checkpointing_func):
            return self._leave("their checkpoint function is not torch's own")
        core = self.core()
        if len({*(getattr(core, "hf_device_map", None) or {}).values()}) > 1:
            return self._leave("they are on several devices")
        if self.parameters is None or not self.parameters.holds():
            self.parameters = Parameters(core)
        parameters = self.parameters
        if self.measured.signature != parameters.signature:
            self.measured = Measured(parameters.signature)
        reading = card.read()
        tokens, output = hidden.shape[-3:-1].numel(), hidden.numel() * hidden.element_size()
        costs = Costs(
            reading.allocated, (), (), *self._head(core, hidden),
            gradients=0 if parameters.have_gradients() else parameters.trained,
            gathered=3 * self.measured.widest if parameters.is_sharded else 0,  # one early, one in use, its gradient
        )  # fmt: skip
        budget = reading.free + reading.reserved - self.margin * reading.total - self.lost
        budget = reading.allocated + self._share() * (budget - reading.allocated)
        run = self.last = Run(
            card, hidden.device, asked, tokens, output, costs, budget, parameters.is_partitioned, reading.retries
        )  # fmt: skip
        everything = frozenset(range(self.count))
        if self.cautious:
            run.recomputed = everything
        elif self.measured.knows(self.count):
            run.recomputed = self._plan(run)
        elif asked and budget - reading.allocated < (ROOM_TO_MEASURE + self.count) * output:
            run.recomputed = everything
        self.cautious = False
        return run

    def _agree(self, run: Run) -> None:
        """Let all processes recompute every layer that one of them must."""
        chosen = [run.recomputed is not None, *(i in (run.recomputed or ()) for i in range(self.count))]
        known, *marks = _any_of_ranks(chosen, run.device)
        run.recomputed = frozenset(i for i, mark in enumerate(marks) if mark) if known else None

    def _share(self) -> float:
        """This forward's share of what is free, if a loss takes several forwards: that of those still to come."""
        self.outputs = [ref for ref in self.outputs if ref() is not None]
        before = len(self.outputs)
        if before == 0:
            self.rounds.append(1)
        self.rounds[-1] = max(self.rounds[-1], before + 1)
        return 1 / (max(self.rounds) - before)

    def _watch(self, run: Run, output: Tensor | None) -> None:
        """Notice how long the first layer's output lives, and when backward has come to it."""
        if output is not None:
            self.outputs.append(weakref.ref(output))
            output.register_hook(functools.partial(self._count_retries, run.card, run.retries))

    def _count_retries(self, card: cards.Card, before: int, gradient: Tensor) -> None:
        """Shrink the budget if the allocator had to return memory in this forward or its backward."""
        reading = card.read()
        if reading.retries > max(before, self.retries) and self.lost < AFTER_FAILURE * reading.total:
            self.lost += AFTER_RETRY * reading.total
        self.retries = max(self.retries, reading.retries)

    def _end(self, run: Run) -> None:
        """After the last layer, note what was decided."""
        run.end = run.card.allocated()
        self.logged.layers += run.layers
        self.logged.forwards += 1
        if run.recomputed is not None:
            if (len(run.recomputed) < self.count) if run.asked else run.recomputed:
                self.acted.note()
            self._tell_plan(run, run.recomputed)

    def _leave(self, reason: str) -> None:
        """Say once why the layers are left as the user set them."""
        if reason != self.left:
            self.left, self.most = reason, -1  # so that the report is made anew when they are no longer left
            self.acted.restate(f"left as they are: {reason}")
        if reason not in self.told:
            self.told.add(reason)
            _warn("liger_trainer: recompute leaves the layers as they are: %s", reason)

    def _recomputes(self, run: Run, index: int, kind: Hashable) -> bool:
        if run.recomputed is not None:
            return index in run.recomputed
        return run.asked and kind in self.measured.kept  # the first of a kind is kept, and measured

    def _note(self, run: Run, index: int, kind: Hashable, recomputes: bool, size: Size) -> None:
        """Take in what a layer added. The first one's tells what the others of this batch will."""
        measured = self.measured
        run.noted.add(RECOMPUTED if recomputes else kind)
        if recomputes:
            measured.recomputed = size
            return
        measured.note_kept(kind, size)
        if index == 0 and not run.alike and (measured.knows(self.count) or not run.asked):
            run.recomputed = self._plan(run, kept=(0,))

    def _plan(self, run: Run, kept: tuple[int, ...] = ()) -> frozenset[int]:
        """The layers that must recompute; ``kept`` have run already, and kept their activations."""
        order = [index for index in self._order() if index not in kept]
        return layers_to_recompute(self._costs(run), run.budget, order)

    def _order(self) -> list[int]:
        """Which layers recompute first: the lower ones, but the first layer last, as it is measured.

        Backward comes to the lower layers last, when the others have freed what they kept.
        """
        return [*range(1, self.count), 0]

    def _costs(self, run: Run) -> Costs:
        """With the sizes of all layers."""
        measured, tokens = self.measured, run.tokens
        kept = [measured.size_of(index, tokens) for index in range(self.count)]
        recomputed = run.output if measured.recomputed is None else measured.recomputed.at_least(tokens)
        return replace(run.costs, kept=kept, recomputed=[recomputed] * self.count)

    def _head(self, core: Any, hidden: Tensor) -> tuple[float, float]:
        """Bytes that the model holds on top of its layers, and bytes that it takes there for a moment."""
        tokens, output = hidden.shape[-3:-1].numel(), hidden.numel() * hidden.element_size()
        linear = core.get_output_embeddings()
        vocabulary, width = head_shape(linear, core.config)
        if self.measured.head is not None:
            head = self.measured.head.at_least(tokens)
        elif fused_head_of(vars(core).get("_loss_function")) is not None:
            head = 2 * output
        else:  # logits in half precision, and their log-softmax in fp32
            head = 6 * vocabulary * tokens
        if linear is None:
            return head, 2 * head
        trained = any(p.requires_grad for p in linear.parameters())
        return head, max(2 * head, head_bytes(tokens, vocabulary, width, hidden.dtype, self.of_head, trained))

    def _tell_plan(self, run: Run, recomputed: frozenset[int]) -> None:
        """Put the decision into the report whenever more layers recompute than before, and into the log at first."""
        if len(recomputed) <= self.most or self.measured.kinds[0] not in self.measured.kept:
            return
        self.most = len(recomputed)
        needs = peak(self._costs(run), recomputed) / GIB
        text = (
            f"{self.most} of {self.count} layers recompute their activations at {run.tokens} tokens, the others keep "
            f"them: at least {needs:.1f} of {run.budget / GIB:.1f} GiB"
        )
        self.acted.restate(text)
        if not run.asked and recomputed and "not asked" not in self.told:
            self.told |= {"not asked", "plan"}
            _warn("liger_trainer: a batch would not fit without activation checkpointing: %s", text)
        elif run.asked and "plan" not in self.told:
            self.told.add("plan")
            _warn("liger_trainer: activation checkpointing only as far as memory requires: %s", text)


def recompute_of(model: nn.Module) -> Recompute | None:
    """What decides for the transformers model in ``model``, which may be a wrapper; ``None`` if nothing does."""
    found = (m for m in model.modules() if isinstance(m, PreTrainedModel) and not hasattr(m, "wraps_causal_lm"))
    core = next(found, None)
    owners = () if core is None else (getattr(hook, "__self__", None) for hook in core._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Recompute)), None)


def _warn(message: str, *args: Any) -> None:
    """Say something on the first process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.warning(message, *args)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _any_of_ranks(marks: list[bool], device: torch.device) -> list[bool]:
    """Each mark, set if it is in any process."""
    if not torch.distributed.is_initialized():
        return marks
    most = torch.tensor(marks, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return most.bool().tolist()
