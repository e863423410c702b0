"""What a causal LM does between ``lm_head`` and its loss, found by running its own forward around stubs.

A stub backbone returns zeros, a stub ``lm_head`` returns chosen logits, and a stub loss function records what reaches
it and returns a chosen loss. That gives the logit scale and the soft-cap as numbers, the settings on which they depend,
and the arguments of the loss function. What ``forward`` returns shows whether anything else reads the logits. The probe
needs no weights and no list of models.
"""

import copy
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..kernels.reference import IGNORE_INDEX
from ..probing.probe import full_shape, hollow_copy, without_hooks
from ..probing.rule import Skip, errors_skip
from .unbuilt_logits import UnbuiltLogits

TOKENS = 3
LOSS_PARAMETERS = tuple(inspect.signature(ForCausalLMLoss).parameters)[2:-1]  # after the logits and the labels


class Setting(NamedTuple):
    """A number or a switch on which the logits depend.

    Args:
        owner: Names of the attributes that lead from the model to the object that has the setting.
        name: Its name there.
        value: Its value when the model was probed.
    """

    owner: tuple[str, ...]
    name: str
    value: Any

    def holds(self, model: nn.Module) -> bool:
        """Whether it has the same value now."""
        return getattr(_follow(model, self.owner), self.name, None) == self.value


class HeadForm(NamedTuple):
    """What the fused loss must reproduce for one model.

    Args:
        logit_scale: Factor of the logits.
        softcap: Soft-cap applied after the scale; ``None`` for none.
        passes_num_items: The model's forward passes ``num_items_in_batch`` to its loss function.
        passes_shift_labels: The model's forward passes ``shift_labels`` to its loss function.
        settings: The settings of the model from which the scale and the soft-cap come.
    """

    logit_scale: float
    softcap: float | None
    passes_num_items: bool
    passes_shift_labels: bool
    settings: tuple[Setting, ...] = ()

    def __str__(self) -> str:
        extras = [f"scale {self.logit_scale:g}"] if self.logit_scale != 1.0 else []
        extras += [f"soft-cap {self.softcap:g}"] if self.softcap is not None else []
        return ", ".join(["linear_cross_entropy", *extras])

    def holds(self, model: nn.Module) -> bool:
        """Whether the model's settings are still those that were probed."""
        return all(setting.holds(model) for setting in self.settings)


def loss_arguments(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What ``ForCausalLMLoss`` takes from these arguments after its labels, by name.

    Raises:
        TypeError: There are more positional arguments than it takes.
    """
    if len(args) > len(LOSS_PARAMETERS):
        raise TypeError(f"ForCausalLMLoss takes {len(LOSS_PARAMETERS)} arguments after the labels; got {len(args)}")
    defaults = {"num_items_in_batch": None, "ignore_index": IGNORE_INDEX, "shift_labels": None}
    return defaults | dict(zip(LOSS_PARAMETERS, args, strict=False)) | kwargs


class _BackboneOutput:
    """Output of the stub backbone: hidden states, and ``None`` for any other attribute."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state if index == 0 else ()


class _Backbone(nn.Module):
    """Stub backbone: any of its modules, when called, returns the hidden states. It has the real one's settings."""

    def __init__(self, hidden: Tensor, real: nn.Module, settings: dict[str, Any]):
        super().__init__()
        self.hidden = hidden
        self.__dict__.update(real=real, **settings)  # the real one is not registered as a child

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["real"], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *args: Any, **kwargs: Any) -> _BackboneOutput:
        return _BackboneOutput(self.hidden)


class _Head(nn.Module):
    """Stub ``lm_head``: records the shapes of its inputs and returns the chosen logits."""

    def __init__(self, logits: Tensor, hidden_size: int):
        super().__init__()
        self.logits = logits
        self.calls: list[tuple[int, ...]] = []
        self.weight, self.bias = torch.empty(0, hidden_size), None

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls.append(tuple(hidden.shape))
        return self.logits.clone()  # the model may change them in place


def probe_head(model: nn.Module, head_name: str, head: nn.Module) -> HeadForm:
    """The form of ``model``'s path from ``lm_head`` to its loss.

    Args:
        model: The causal LM.
        head_name: Name of ``lm_head`` in it.
        head: The module of that name, or a Linear with a weight of the same shape.

    Raises:
        Skip: The fused loss cannot reproduce what the model does.
    """
    with errors_skip():
        return _probe(model, head_name, head)


def _probe(model: Any, head_name: str, head: Any) -> HeadForm:
    vocab_size, hidden_size = full_shape(head.weight)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, TOKENS, vocab_size, generator=random).clamp(min=-4, max=4)
    # Small values show the slope at zero, moderate ones the shape, huge ones the level of a cap.
    logits = logits * torch.tensor([1e-4, 20.0, 1e8])[:, None]
    run = _Runner(model, head_name, hidden_size)

    first = run(logits)
    if first.logits.shape != logits.shape:
        shapes = f"{tuple(first.logits.shape)} where lm_head gave {tuple(logits.shape)}"
        raise Skip(f"its loss receives logits of shape {shapes}")
    scale, softcap = _transform(logits, first.logits.detach(), model.config)
    _check_arguments(first.arguments)
    for labels in ([[0, IGNORE_INDEX, vocab_size - 1]], [[vocab_size - 1, 0, 1 % vocab_size]]):
        one, other = (run(values, torch.tensor(labels)) for values in (logits, logits.flip(-1) / 3))
        _check_arguments(one.arguments)
        if not torch.equal(one.loss.nan_to_num(), other.loss.nan_to_num()):
            raise Skip("its forward adds a term of the logits to the loss, after loss_function")
    try:
        run(logits.new_empty(1, TOKENS, 0).as_subclass(UnbuiltLogits))
    except RuntimeError as error:
        if str(error) == UnbuiltLogits.message:
            raise Skip("its forward reads the logits for more than the loss, or scales them by a tensor") from error
        raise

    passes = {}
    accepts = inspect.signature(type(model).forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepts.values())
    for name, value in (("num_items_in_batch", torch.tensor(7)), ("shift_labels", torch.ones(1, TOKENS).long())):
        given: dict[str, Any] = {name: value} if open_ended or name in accepts else {}
        got = run(logits, **given).arguments[name]
        passes[name] = got is value
        if not passes[name] and got is not None:
            raise Skip(f"its forward changes {name} before the loss")
    settings = tuple(_settings(run, model, logits[..., :8]))
    return HeadForm(scale, softcap, passes["num_items_in_batch"], passes["shift_labels"], settings)


def _check_arguments(given: dict[str, Any]) -> None:
    """Check what the loss function gets when the model was called with nothing but labels."""
    for name, default in (("num_items_in_batch", None), ("shift_labels", None), ("ignore_index", IGNORE_INDEX)):
        if given[name] is not default and given[name] != default:
            raise Skip(f"its forward gives the loss function {name} of its own")


class _Run(NamedTuple):
    """What one run of a forward showed.

    Args:
        logits: The logits that reached the loss function.
        arguments: The other arguments of the loss function, by name.
        loss: The loss that the forward returned.
    """

    logits: Tensor
    arguments: dict[str, Any]
    loss: Tensor


class _Runner:
    """Runs the model's own forward around stubs."""

    def __init__(self, model: Any, head_name: str, hidden_size: int):
        self.model, self.head_name, self.hidden_size = model, head_name, hidden_size
        self.labels = torch.zeros(1, TOKENS, dtype=torch.long)
        stubs = (head_name, model.base_model_prefix)
        self.children = {n: c if c is None or n in stubs else without_hooks(c) for n, c in model._modules.items()}

    def __call__(
        self, logits: Tensor, labels: Tensor | None = None, changed: Setting | None = None, **kwargs: Any
    ) -> _Run:
        """Run the forward on ``logits``.

        Args:
            logits: What ``lm_head`` returns.
            labels: The labels; zeros by default.
            changed: A setting to have another value.
            kwargs: Further arguments of the forward.

        Raises:
            Skip: The forward does not call ``lm_head`` and the loss function as expected.
        """
        if "output_router_logits" in inspect.signature(type(self.model).forward).parameters:
            kwargs["output_router_logits"] = False  # the stub backbone has none for an auxiliary loss
        labels = self.labels if labels is None else labels
        before = labels.clone()
        head = _Head(logits, self.hidden_size)
        seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

        def record(logits: Tensor, labels: Tensor, *args: Any, **extras: Any) -> Tensor:
            seen.append((logits, labels, loss_arguments(args, extras)))
            return torch.tensor(2.5)

        copied: Any = hollow_copy(self.model)
        copied.__dict__["_loss_function"] = record
        copied._modules, copied._parameters = dict(self.children), self.model._parameters
        copied._buffers = self.model._buffers
        backbone_settings = {}
        if changed is not None and changed.owner == (self.model.base_model_prefix,):
            backbone_settings[changed.name] = changed.value
        elif changed is not None:
            _change(copied, changed)
        hidden = torch.zeros(1, TOKENS, self.hidden_size)
        copied._modules[self.model.base_model_prefix] = _Backbone(hidden, self.model.base_model, backbone_settings)
        copied._modules[self.head_name] = head
        with torch.no_grad():
            out = type(self.model).forward(copied, input_ids=torch.zeros_like(labels), labels=labels, **kwargs)
        if not seen:
            raise Skip("its forward does not compute the loss with `self.loss_function`")
        if head.calls != [(1, TOKENS, self.hidden_size)]:
            raise Skip(f"its forward calls lm_head on {head.calls}, not once on all hidden states")
        if len(seen) > 1 or seen[0][1] is not labels or not torch.equal(labels, before):
            raise Skip("its forward changes the labels before the loss, or computes several losses")
        loss = out[0] if isinstance(out, tuple) else out.loss
        if not torch.is_tensor(loss):
            raise Skip("its forward returns no loss")
        return _Run(seen[0][0], seen[0][2], loss)


def _follow(model: Any, owner: tuple[str, ...]) -> Any:
    for name in owner:
        model = getattr(model, name)
    return model


def _change(model: Any, setting: Setting) -> None:
    """Give a setting another value in ``model``, whose configs are copied for that."""
    target = model
    for name in setting.owner:
        vars(target)[name] = copied = copy.copy(vars(target)[name])
        target = copied
    vars(target)[setting.name] = setting.value


def _settings(run: _Runner, model: PreTrainedModel, logits: Tensor) -> Iterator[Setting]:
    """The settings whose change changes the logits, among those whose names occur in the model's code."""
    names = set(_names_in_code(type(model)))
    owners: list[tuple[str, ...]] = [(), ("config",)]
    owners += [(name,) for name in model._modules if name == model.base_model_prefix]
    owners += [("config", name) for name, value in vars(model.config).items() if isinstance(value, PreTrainedConfig)]
    expected = run(logits).logits
    for owner in owners:
        values = vars(_follow(model, owner))
        mapped = getattr(_follow(model, owner), "attribute_map", {})
        for name in sorted({mapped.get(name, name) for name in names} & values.keys()):
            value = values[name]
            if value is not None and not isinstance(value, bool | int | float):
                continue
            other = not value if isinstance(value, bool) else 2.0 if value is None else 2 * value + 1
            try:
                seen = run(logits, changed=Setting(owner, name, other)).logits
            except Exception:  # it is not known what the setting does
                yield Setting(owner, name, value)
            else:
                if seen.shape != expected.shape or not torch.equal(seen.nan_to_num(), expected.nan_to_num()):
                    yield Setting(owner, name, value)


def _names_in_code(cls: type) -> Iterator[str]:
    """Names in the methods of a model class and of its bases below ``PreTrainedModel``."""
    for base in cls.__mro__:
        if issubclass(base, PreTrainedModel) and base is not PreTrainedModel:
            for value in vars(base).values():
                function = inspect.unwrap(value) if callable(value) else None
                if isinstance(function, types.FunctionType):
                    yield from function.__code__.co_names


def _transform(logits: Tensor, seen: Tensor, config: Any) -> tuple[float, float | None]:
    """The ``(logit_scale, softcap)`` that turn ``logits``, made as in ``_probe``, into ``seen``."""
    small, seen_small = logits[0, 0].double(), seen[0, 0].double()
    scale = _exact((small @ seen_small / (small @ small)).item(), config)
    level = seen[0, 2].double().abs().max().item()
    uncapped = abs(scale) * logits[0, 2].double().abs().max().item()
    softcap = None if level > 0.5 * uncapped else _exact(level, config)
    expected = logits.double() * scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    error = (expected - seen.double()).abs() / expected.abs().clamp(min=1e-8)
    if scale == 0 or not error.max() < 1e-3 or not error[0, 1:].max() < 1e-4:
        raise Skip("its logits go through more than a scale and a soft-cap before the loss")
    return scale, softcap


def _exact(measured: float, config: Any) -> float:
    """The setting that ``measured`` equals up to rounding: 1, a number of the config, or its reciprocal."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = [v for v in text_config.to_dict().values() if type(v) in (int, float) and v]
    for value in (1.0, *settings, *(1 / v for v in settings)):
        if abs(measured - value) <= 1e-5 * abs(value):
            return float(value)
    return measured
