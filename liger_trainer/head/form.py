"""What a causal LM does between ``lm_head`` and its loss, found by running its own forward around stubs.

A stub backbone returns zeros, a stub ``lm_head`` returns chosen logits, and a stub loss function records what reaches
it. That gives the logit scale and the soft-cap as numbers, and shows whether the model passes ``num_items_in_batch``
and ``shift_labels`` on to its loss. The probe needs no weights and no list of models.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..probing.probe import full_shape, hollow_copy
from ..probing.rule import Skip, errors_skip

TOKENS = 3


class HeadForm(NamedTuple):
    """What the fused loss must reproduce for one model.

    Args:
        logit_scale: Factor of the logits.
        softcap: Soft-cap applied after the scale; ``None`` for none.
        passes_num_items: The model's forward passes ``num_items_in_batch`` to its loss function.
        passes_shift_labels: The model's forward passes ``shift_labels`` to its loss function.
    """

    logit_scale: float
    softcap: float | None
    passes_num_items: bool
    passes_shift_labels: bool

    def __str__(self) -> str:
        extras = [f"scale {self.logit_scale:g}"] if self.logit_scale != 1.0 else []
        extras += [f"soft-cap {self.softcap:g}"] if self.softcap is not None else []
        return ", ".join(["linear_cross_entropy", *extras])


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

    def __init__(self, hidden: Tensor, real: nn.Module):
        super().__init__()
        self.hidden = hidden
        self.__dict__["real"] = real  # not registered as a child

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
        return self.logits


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

    seen, _ = run(logits)
    if seen.shape != logits.shape:
        raise Skip(f"its loss receives logits of shape {tuple(seen.shape)} where lm_head gave {tuple(logits.shape)}")
    scale, softcap = _transform(logits, seen.detach(), model.config)
    run(logits.new_empty(1, TOKENS, 0))

    passes = {}
    accepts = inspect.signature(type(model).forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepts.values())
    for name, value in (("num_items_in_batch", torch.tensor(7)), ("shift_labels", torch.ones(1, TOKENS).long())):
        passes[name] = (open_ended or name in accepts) and run(logits, **{name: value})[1].get(name) is value
    return HeadForm(scale, softcap, passes["num_items_in_batch"], passes["shift_labels"])


class _Runner:
    """Runs the model's own forward around stubs."""

    def __init__(self, model: Any, head_name: str, hidden_size: int):
        self.model, self.head_name, self.hidden_size = model, head_name, hidden_size
        self.labels = torch.zeros(1, TOKENS, dtype=torch.long)

    def __call__(self, logits: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """The logits and the keyword arguments that reach the loss function."""
        if "output_router_logits" in inspect.signature(type(self.model).forward).parameters:
            kwargs["output_router_logits"] = False  # the stub backbone has none for an auxiliary loss
        head = _Head(logits, self.hidden_size)
        seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

        def record(logits: Tensor, labels: Tensor, *args: Any, **extras: Any) -> Tensor:
            seen.append((logits, labels, extras))
            return logits.float().sum() * 0.0

        copied = hollow_copy(self.model)
        copied.__dict__["_loss_function"] = record
        copied._modules = dict(self.model._modules)
        hidden = torch.zeros(1, TOKENS, self.hidden_size)
        copied._modules[self.model.base_model_prefix] = _Backbone(hidden, self.model.base_model)
        copied._modules[self.head_name] = head
        with torch.no_grad():
            type(self.model).forward(copied, input_ids=torch.zeros_like(self.labels), labels=self.labels, **kwargs)
        if not seen:
            raise Skip("its forward does not compute the loss with `self.loss_function`")
        if head.calls != [(1, TOKENS, self.hidden_size)]:
            raise Skip(f"its forward calls lm_head on {head.calls}, not once on all hidden states")
        if len(seen) > 1 or seen[0][1] is not self.labels:
            raise Skip("its forward changes the labels before the loss, or computes several losses")
        return seen[0][0], seen[0][2]


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
