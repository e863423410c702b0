"""Plan, apply, revert: the only place that changes a model.

A plan is made first and touches nothing; an error while planning (``strict``, a bad config) leaves the model as it was.
Applying sets instance attributes and registers hooks, all noted in the model's ``PatchState``; reverting undoes them.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .config import BY_BATCH, LigerConfig
from .head.form import probe_head
from .head.fused_head import FusedHead, HeadForward, head_linears, why_other_loss
from .probing.rebinding import rebind
from .probing.rule import Rebinding, Refusal
from .report import Applied, LigerReport, Skipped
from .rules import verdicts
from .rules.padding import leave_out_mask, why_masks_stay

_STATE = "_liger_state"
_MARK = "_is_liger"  # of the functions that are bound to instances


class _Missing:
    """Marks an attribute the instance did not have; a class, because deep copies keep those as they are."""


@dataclass
class Edit:
    """One instance attribute to set: ``module.<attribute> = value``; ``old`` is what stood there before."""

    module: nn.Module
    attribute: str
    value: Any
    old: Any = _Missing

    def place(self) -> str | None:
        """The attribute that holds ``value`` now: accelerate's device hooks move a forward to ``_old_forward``."""
        return next((a for a in (self.attribute, "_old_forward") if vars(self.module).get(a) is self.value), None)

    def apply(self) -> None:
        """Set the attribute."""
        self.old = vars(self.module).get(self.attribute, _Missing)
        setattr(self.module, self.attribute, self.value)

    def undo(self) -> None:
        """Put back what stood there; what others have put in our place since is theirs and stays."""
        place = self.place()
        if place is not None and place != self.attribute:
            setattr(self.module, place, types.MethodType(type(self.module).forward, self.module))
        elif place is not None and self.old is _Missing:
            delattr(self.module, place)
        elif place is not None:
            setattr(self.module, place, self.old)


@dataclass
class PatchState:
    """What was done to one model, kept on it as ``_liger_state``; a deep copy of the model copies it along."""

    config: LigerConfig
    report: LigerReport
    fused: FusedHead | None = None
    trl_head: Any = None
    edits: list[Edit] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)


class _Plan(NamedTuple):
    edits: list[Edit]
    fused: FusedHead | None
    drops_masks: bool
    report: LigerReport


def core_model(model: nn.Module) -> nn.Module:
    """The transformers model inside ``model`` (itself, or in PEFT, DDP, compile or Medusa wrappers), else ``model``.

    A class with ``wraps_causal_lm`` is a transformers model that holds another one, which is the one to patch.
    """
    found = (m for m in model.modules() if isinstance(m, PreTrainedModel) and not hasattr(m, "wraps_causal_lm"))
    return next(found, model)


def patch_state(model: nn.Module) -> PatchState | None:
    """What ``apply_liger`` did to ``model``, or ``None``."""
    return vars(core_model(model)).get(_STATE)


def apply_liger(model: nn.Module, config: LigerConfig | dict | str | None = None) -> LigerReport:
    """Put the kernels and the fused loss into this model, and nothing else in the process.

    Works on plain transformers models, PEFT-wrapped ones and models on the meta device; call it on the outermost
    wrapper. Applying twice with the same config is applying once.

    Args:
        model: an ``nn.Module``.
        config: a ``LigerConfig``, or its options as a dict or JSON text; ``None`` for the defaults.

    Returns:
        The report: what was replaced, what was skipped and why. ``str(report)`` is a table.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an option has the wrong type.
        ValueError: an unknown option; a model already patched with another config; with ``strict=True``, a
            candidate that cannot be replaced. The model is then as it was.
    """
    return apply_with(model, LigerConfig.parse(config))


def apply_with(model: nn.Module, config: LigerConfig, no_fused_loss: str | None = None) -> LigerReport:
    """``apply_liger`` where the caller may know why the fused loss cannot be used (``no_fused_loss``)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    core = core_model(model)
    state = vars(core).get(_STATE)
    if state is not None:
        if state.config != config:
            raise ValueError(
                f"model is already patched with {state.config}; call revert_liger(model) before applying {config}"
            )
        if not _is_stale(core, state) and not (no_fused_loss and state.fused):
            return state.report
        revert_liger(model)  # resized, wrapped or unpickled since: what is there now is planned anew
    plan = _plan(model, core, config, no_fused_loss)
    refused = [s for s in plan.report.skipped if s.kind not in BY_BATCH]
    if config.strict and refused:
        lines = "\n".join(f"  {s.kind} {s.module} ({s.cls}): {s.reason}" for s in refused)
        raise ValueError(f"strict=True and these were asked for but cannot be applied:\n{lines}")
    state = PatchState(config, plan.report, plan.fused, edits=plan.edits)
    for edit in plan.edits:
        edit.apply()
    setattr(core, _STATE, state)
    if plan.fused is not None:
        add_hooks(core, state, plan.fused.before_forward, plan.fused.after_forward)
    if plan.drops_masks:
        state.handles.append(core.register_forward_pre_hook(leave_out_mask, with_kwargs=True))
    return state.report


def revert_liger(model: nn.Module) -> None:
    """Put back every original; the model's outputs are bit-equal to before ``apply_liger``. Without it, a no-op."""
    core = core_model(model)
    state = vars(core).get(_STATE)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    for edit in reversed(state.edits):
        edit.undo()
    for module in core.modules():  # PEFT's modules_to_save copies modules with what was bound to them
        for attribute in [name for name, value in vars(module).items() if _is_ours(value)]:
            delattr(module, attribute)
    delattr(core, _STATE)


def _is_ours(value: Any) -> bool:
    """Whether ``value`` is a method that patching binds to instances."""
    bound_to, function = getattr(value, "__self__", None), getattr(value, "__func__", None)
    return isinstance(bound_to, HeadForward) or getattr(function, _MARK, False)


def _is_stale(core: nn.Module, state: PatchState) -> bool:
    """Whether some of what was applied is no longer there, or ``lm_head`` is another module than it was."""
    # An unpickled model has the class's own methods in our places.
    if any(edit.place() is None or _is_of_class(edit.module, edit.attribute, edit.value) for edit in state.edits):
        return True
    ours = {id(edit.module) for edit in state.edits if isinstance(getattr(edit.value, "__self__", None), HeadForward)}
    return bool(ours) and ours != {id(linear) for linear in head_linears(core.get_output_embeddings())}


def add_hooks(core: nn.Module, state: PatchState, before: Callable, after: Callable) -> None:
    """Call ``before(module, args, kwargs)`` and ``after(module, args, output)`` around the causal LM's forward."""
    state.handles.append(core.register_forward_pre_hook(before, with_kwargs=True))
    state.handles.append(core.register_forward_hook(after, always_call=True))  # also after an exception


def _plan(model: nn.Module, core: nn.Module, config: LigerConfig, no_fused_loss: str | None) -> _Plan:
    report = LigerReport()
    edits = _plan_layers(model, config, report)
    fused = None
    if config.fused_loss:
        fused = _plan_head(core, config, no_fused_loss, edits, report)
    return _Plan(edits, fused, config.padding_mask and _plan_masks(core, report), report)


def _plan_masks(core: nn.Module, report: LigerReport) -> bool:
    reason, cls = why_masks_stay(core), type(core).__name__
    if reason is None:
        report.applied.append(Applied("padding_mask", "", cls, "left out where padding is on the right"))
    else:
        report.skipped.append(Skipped("padding_mask", "", cls, reason))
    return reason is None


def _plan_layers(model: nn.Module, config: LigerConfig, report: LigerReport) -> list[Edit]:
    edits: list[Edit] = []
    known: dict = {}
    forwards: dict = {}
    for name, module in model.named_modules():
        rebindings: list[Rebinding] = []
        for verdict in verdicts(module, known):
            if not config.wants(verdict.kind):
                continue
            cls = type(module).__name__
            if isinstance(verdict, Refusal):
                report.skipped.append(Skipped(verdict.kind, name, cls, verdict.reason))
                continue
            attribute = _free_attribute(module, verdict.attribute)
            if attribute is None:
                reason = f"its {verdict.attribute} was already replaced on the instance"
                report.skipped.append(Skipped(verdict.kind, name, cls, reason))
                continue
            report.applied.append(Applied(verdict.kind, name, cls, verdict.variant))
            if isinstance(verdict, Rebinding):
                rebindings.append(verdict)
            else:
                edits.append(_method_edit(module, attribute, verdict.method(config)))
        if rebindings:
            function = _rebound_forward(module, rebindings, forwards)
            edits.append(_method_edit(module, _free_attribute(module, "forward"), function))
    return edits


def _rebound_forward(module: nn.Module, rebindings: list[Rebinding], known: dict) -> Callable:
    """The forward with the names of all ``rebindings``; layers that are alike share one."""
    key = (type(module).forward, *map(id, rebindings))
    if key not in known:
        names = {name: value for rebinding in rebindings for name, value in rebinding.names.items()}
        known[key] = rebind(type(module).forward, names)
    return known[key]


def _method_edit(module: nn.Module, attribute: str, function: Callable) -> Edit:
    setattr(function, _MARK, True)
    return Edit(module, attribute, types.MethodType(function, module))


def _is_of_class(module: nn.Module, attribute: str, value: Any) -> bool:
    return getattr(value, "__func__", value) is getattr(type(module), attribute, None)


def _free_attribute(module: nn.Module, attribute: str) -> str | None:
    """Where to bind: accelerate's device hooks keep the module's own forward as ``_old_forward`` and call that."""
    current = vars(module).get(attribute)
    if current is None or _is_of_class(module, attribute, current):
        return attribute
    return "_old_forward" if attribute == "forward" and "_old_forward" in vars(module) else None


def _plan_head(core, config, no_fused_loss, edits, report) -> FusedHead | None:
    head = core.get_output_embeddings() if isinstance(core, PreTrainedModel) else None
    name = next((n for n, m in core.named_modules() if m is head), "") if head is not None else ""
    linears = _plain_linears(head)
    if no_fused_loss is not None:
        reason = no_fused_loss
    elif head is None:
        reason = "it has no output embeddings"
    elif isinstance(linears, str):
        reason = linears
    elif (getattr(core, "tp_size", None) or 1) > 1:
        reason = f"its weights are tensor-parallel (tp_size {core.tp_size}), and no vocabulary-sharded head is fused"
    elif "." in name:
        reason = f"its output embeddings are nested ({name})"
    elif (reason := why_other_loss(core)) is None:
        form = probe_head(core, name, linears[0])
        reason = form if isinstance(form, str) else None
    if reason is not None:
        report.skipped.append(Skipped("fused_loss", name, type(core).__name__, reason))
        return None
    fused = FusedHead(core, form, config)
    for linear in linears:
        edits.append(Edit(linear, _free_attribute(linear, "forward"), HeadForward(fused, linear).forward))
    edits.append(Edit(core, "_loss_function", fused.loss_function))
    report.applied.append(Applied("fused_loss", name, type(core).__name__, str(form)))
    return fused


def _plain_linears(head: nn.Module | None) -> list[nn.Linear] | str:
    """The Linear modules that ``head`` may call (PEFT's ``modules_to_save`` has copies), or why it is not plain."""
    if head is None:
        return []
    linears = head_linears(head)
    for linear in linears:
        if linear._forward_hooks or linear._backward_hooks:
            return "it has hooks on its output, which the fused loss does not make"
        if hasattr(linear, "base_layer"):
            return f"it carries an adapter ({type(linear).__module__.split('.')[-2]}): ordinary path"
        if type(linear).forward is not nn.Linear.forward:
            return f"its forward is that of {type(linear).__qualname__}, not of torch.nn.Linear"
        if _free_attribute(linear, "forward") is None:
            return "its forward was already replaced on the instance"
    return linears
