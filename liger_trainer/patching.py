"""Plan, apply, revert: the only place that changes a model.

Planning changes nothing, so an error while planning (``strict``, a bad config) leaves the model as it was. Applying
sets instance attributes and registers hooks. Reverting undoes them: each attribute holds what it replaced, and the
model's ``PatchState`` has the hooks. What patching adds holds no module, so a patched model is freed as others are.
"""

import functools
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .config import KINDS, LigerConfig
from .head.fused_head import FusedHead, fused_head_of
from .probing.rebinding import Bound, bound_methods, free_attribute, rebind
from .probing.rule import Acted, Match, Rule, Skip, errors_skip
from .report import Applied, LigerReport, Skipped
from .rules import PER_BATCH, RULES
from .rules.lora import is_adapter_layer

_STATE = "_liger_state"


class CountsCalls(Protocol):
    """A head that counts the calls in which it computed the loss."""

    calls_fused: int


@dataclass
class PatchState:
    """The changes made to one model. The model keeps them as ``_liger_state``, so its deep copies have them.

    No module is held: each bound method says itself how to undo it.

    Args:
        config: The options with which the model is patched.
        report: What ``apply_liger`` returned.
        acted: For each applied kind, one flag per match: whether its op has run since the last ``count_step``.
        fused: The fused loss, if it was applied.
        bound_methods: How many methods were bound to modules of the model.
        adapter_layers: How many of its layers PEFT had wrapped.
        trl_head: Our op behind a TRL trainer's own computation of its loss, if ``trl`` has put it there.
        purpose: For which TRL trainer the model was patched, if that makes a difference; set by ``trl``.
        handles: The hooks that were registered.
    """

    config: LigerConfig
    report: LigerReport
    acted: dict[str, list[Acted]]
    fused: FusedHead | None
    bound_methods: int
    adapter_layers: int
    trl_head: CountsCalls | None = None
    purpose: str = ""
    handles: list[RemovableHandle] = field(default_factory=list)

    def register_forward_pre_hook(self, core: nn.Module, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Replaces the method of this name on the patched model ``core``, so that our own pre-hooks run last.

        They judge labels, mask and positions, so they must see them as forward will, after the hooks of others.
        """
        handle, hooks = type(core).register_forward_pre_hook(core, *args, **kwargs), core._forward_pre_hooks
        for ours in self.handles:
            if ours.id in hooks:
                cast(OrderedDict, hooks).move_to_end(ours.id)
        return handle

    def forget_acted(self) -> None:
        """Forget what has acted until now."""
        for acted in itertools.chain(*self.acted.values()):
            acted.on = False

    def count_step(self) -> None:
        """Count the kinds that have acted into ``report.ran``."""
        for kind, flags in self.acted.items():
            self.report.ran[kind] = self.report.ran.get(kind, 0) + any(acted.on or acted.compiled for acted in flags)
        self.forget_acted()


def core_model(model: nn.Module) -> nn.Module:
    """The transformers model in ``model``, which may be itself or a PEFT, DDP, compile or Medusa wrapper.

    A transformers model whose class has ``wraps_causal_lm`` wraps another one; the inner one is returned. ``model``
    itself if it has no transformers model.
    """
    found = (m for m in model.modules() if isinstance(m, PreTrainedModel) and not hasattr(m, "wraps_causal_lm"))
    return next(found, model)


def patch_state(model: nn.Module) -> PatchState | None:
    """What ``apply_liger`` did to ``model``; ``None`` if it is not patched."""
    return vars(core_model(model)).get(_STATE)


def apply_liger(model: nn.Module, config: LigerConfig | dict | str | None = None) -> LigerReport:
    """Put the kernels and the fused loss into this model, and change nothing else in the process.

    Works on plain transformers models, PEFT-wrapped ones and models on the meta device. Pass the PEFT model, not the
    model inside it, and call this before DDP, FSDP2 or ``torch.compile``. Applying twice with the same config has no
    further effect.

    Args:
        model: The model to patch.
        config: A ``LigerConfig``, or its options as a dict or JSON text; ``None`` for the defaults.

    Returns:
        The report: what was replaced, what was skipped and why. ``str(report)`` is a table.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an option has the wrong type.
        ValueError: An option is unknown, the model is already patched with another config, or ``strict=True`` and a
            candidate cannot be replaced. The model does not change, unless an earlier patch was stale: then that patch
            has been reverted.
    """
    return apply_with(model, LigerConfig.parse(config))


def apply_with(model: nn.Module, config: LigerConfig, known: Mapping[str, Match | str] | None = None) -> LigerReport:
    """``apply_liger`` for a caller that knows about some kinds: ``known`` has a match to use, or a reason to skip."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; must be a torch.nn.Module")
    known = known or {}
    core = core_model(model)
    state = patch_state(core)
    if state is not None:
        if state.config != config:
            raise ValueError(
                f"config: got {config}; must be the current one: model is already patched with {state.config}. "
                "Call revert_liger(model) first to apply another one"
            )
        if not is_stale(core, state) and not any(isinstance(known.get(kind), str) for kind in state.acted):
            return state.report
        revert_liger(model)  # the model, or what the caller knows about a kind, has changed since then, so plan again
    plan = _Plan(config, known)
    for name, module in model.named_modules():
        plan.add(name, module, [rule for rule in RULES if not rule.whole_model])
    around = (m for m in model.modules() if m is not core)
    plan.no_hooks = next((type(m).__name__ for m in around if _calls_forward_of(m, core)), None)
    plan.add("", core, [rule for rule in RULES if rule.whole_model])
    plan.bind_forwards()
    plan.report.none_here += [k for k in KINDS if config.wants(k) and k not in plan.report.kinds()]
    missing = [s for s in plan.report.skipped if s.kind not in PER_BATCH]
    if config.strict and missing:
        lines = "\n".join(f"  {s.kind} {s.module} ({s.cls}): {s.reason}" for s in missing)
        raise ValueError(f"strict=True, and these kernels cannot be applied:\n{lines}")
    for bound in plan.bound:
        bound.apply()
    fused = next(filter(None, map(fused_head_of, plan.bound)), None)
    state = PatchState(config, plan.report, plan.acted, fused, len(_all_bound(core)), _adapter_layers(core))
    setattr(core, _STATE, state)
    for before, after in plan.hooks:
        add_hooks(core, state, before, after)
    if plan.hooks:
        Bound(state.register_forward_pre_hook, core, "register_forward_pre_hook").apply()
        state.bound_methods += 1
    return state.report


def revert_liger(model: nn.Module) -> None:
    """Restore every original; outputs are bit-equal to those before ``apply_liger``. No-op on an unpatched model."""
    core = core_model(model)
    state = patch_state(core)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    for place, bound in _all_bound(model):  # with those that PEFT's modules_to_save has copied
        bound.undo(place)
    delattr(core, _STATE)


def _all_bound(model: nn.Module) -> list[tuple[str, Bound]]:
    """``(attribute, method)`` of all methods that are bound to modules of ``model``."""
    return [found for module in model.modules() for found in bound_methods(module)]


def _adapter_layers(model: nn.Module) -> int:
    return sum(map(is_adapter_layer, model.modules()))


def _calls_forward_of(module: nn.Module, core: nn.Module) -> bool:
    """Whether ``module``'s forward is ``core``'s, as in PEFT's AdaptionPromptModel, which then calls no hooks."""
    return getattr(vars(module).get("forward"), "__self__", None) is core


def is_stale(model: nn.Module, state: PatchState) -> bool:
    """Whether the model has changed since: something applied is gone or was copied, PEFT has wrapped other layers, or
    what the fused loss relies on is not what it was.
    """
    core = core_model(model)
    bound = _all_bound(core)
    counts = len(bound), _adapter_layers(core)
    if counts != (state.bound_methods, state.adapter_layers) or any(method.is_unpickled() for _, method in bound):
        return True
    return state.fused is not None and not state.fused.is_current()


def add_hooks(core: nn.Module, state: PatchState, before: Callable | None, after: Callable | None) -> None:
    """Call ``before(module, args, kwargs)`` and ``after(module, args, output)`` around the causal LM's forward."""
    if before is not None:
        state.handles.append(core.register_forward_pre_hook(before, with_kwargs=True))
    if after is not None:
        state.handles.append(core.register_forward_hook(after, always_call=True))  # also after an exception


class _Plan:
    """What to change for one config, collected rule by rule; nothing is changed yet.

    Args:
        config: Says which kinds are wanted.
        known: Matches, or reasons to skip, that replace the result of the rules of a kind.
    """

    def __init__(self, config: LigerConfig, known: Mapping[str, Match | str]):
        self.config = config
        self.known = known
        self.no_hooks: str | None = None  # the class that calls the causal LM's forward without its hooks
        self.acted: dict[str, list[Acted]] = {}
        self.report = LigerReport()
        self.bound: list[Bound] = []
        self.hooks: list[tuple[Callable | None, Callable | None]] = []
        # Results and forwards that modules share. They are kept for one plan only, because code may change later.
        self._probed: dict[Hashable, Match | str] = {}
        self._forwards: dict[Hashable, types.FunctionType] = {}
        self._names: dict[nn.Module, dict[str, Any]] = {}
        self._tables: dict[tuple[int, int], Any] = {}
        self._wraps: dict[nn.Module, list[Callable[[Callable], Callable]]] = {}

    def add(self, name: str, module: nn.Module, rules: Iterable[Rule]) -> None:
        """Look at ``module``, called ``name`` in the report, with all of ``rules``."""
        for rule in rules:
            if not any(map(self.config.wants, rule.kinds)) or not rule.matches(module):
                continue
            kind, cls = rule.kinds[0], type(module).__name__
            where = ".".join(filter(None, (name, rule.part(module))))
            try:
                match = self._probe(rule, module)
                kind = match.kind
                bound = _bound_by(module, match)
                if match.before is not None and self.no_hooks is not None:
                    raise Skip(f"{self.no_hooks} calls its forward without its hooks")
            except Skip as skip:
                if self.config.wants(kind):
                    self.report.skipped.append(Skipped(kind, where, cls, str(skip)))
                continue
            if self.config.wants(kind):
                applied = Applied(kind, where, cls, match.variant)
                self.report.applied.append(applied)
                match.acted.on_refusal = functools.partial(self.report.withdraw, applied)
                match.acted.on_restatement = functools.partial(self.report.restate, applied)
                self.bound += bound
                self.hooks.append((match.before, match.after))
                self.acted.setdefault(kind, []).append(match.acted)
                for other, names in ((module, match.names), *match.other_names):
                    self._add_names(other, names)
                for other, wrapper in match.wraps:
                    self._wraps.setdefault(other, []).append(wrapper)

    def _add_names(self, module: nn.Module, names: Mapping[str, Any]) -> None:
        """Collect the globals to replace in the forward of ``module``.

        Of two tables of attention functions, the second is layered over the first.
        """
        if not names:
            return
        collected = self._names.setdefault(module, {})
        for name, value in names.items():
            inner = collected.get(name)
            if inner is not None:
                key = (id(inner), id(value))
                value = self._tables.setdefault(key, value.over(inner))
            collected[name] = value

    def bind_forwards(self) -> None:
        """Make the new forwards, once all rules have said which globals they replace and what they wrap."""
        methods = {method.module(): method for method in self.bound if method.attribute == "forward"}
        for module in dict.fromkeys([*self._names, *self._wraps]):
            names, taken = self._names.get(module), methods.get(module)
            function = self._forward(module, names) if names else type(module).forward
            if taken is not None:  # a rule has bound a whole forward, which is wrapped as it is
                self.bound.remove(taken)
                function = taken.function
            for wrapper in self._wraps.get(module, []):
                function = wrapper(function)
            self.bound.append(_bound(module, "forward", function))

    def _probe(self, rule: Rule, module: nn.Module) -> Match:
        found = self.known.get(rule.kinds[0])
        if found is None:
            key = (rule, rule.key(module))
            if key not in self._probed:
                try:
                    with errors_skip():
                        self._probed[key] = rule.probe(module, self.config)
                except Skip as skip:
                    self._probed[key] = str(skip)
            found = self._probed[key]
        if isinstance(found, str):
            raise Skip(found)
        return found

    def _forward(self, module: nn.Module, names: Mapping[str, Any]) -> types.FunctionType:
        """The class's forward with other values for the globals ``names``; layers that are alike share one."""
        original = type(module).forward
        key = (original, *((name, id(value)) for name, value in names.items()))
        if key not in self._forwards:
            self._forwards[key] = rebind(original, names)
        return self._forwards[key]


def _bound_by(module: nn.Module, match: Match) -> list[Bound]:
    """The methods of a match, but for its ``names``.

    Raises:
        Skip: Something else has replaced a method on the instance.
    """
    others = [*match.other_names, *match.wraps]
    for other in (*([module] if match.names else []), *(other for other, _ in others)):
        free_attribute(other, "forward")
    methods = [_bound(module, attribute, function) for attribute, function in match.methods.items()]
    return [*methods, *(Bound(function, other, attribute) for other, attribute, function in match.attributes)]


def _bound(module: nn.Module, attribute: str, function: Callable) -> Bound:
    return Bound(function, module, free_attribute(module, attribute))
