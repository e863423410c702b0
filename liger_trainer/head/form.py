"""What a causal LM does between ``lm_head`` and its loss, found out by running its own forward around stubs.

The backbone is replaced by one that returns zeros, ``lm_head`` by one that returns chosen logits, and the loss function
by one that records what reaches it. From that follow the logit scale and soft-cap, as numbers, and whether the model
hands ``num_items_in_batch`` and ``shift_labels`` on to its loss. No weight is needed and no model is named.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..probing.probe import hollow_copy
from ..probing.sharding import full_shape

TOKENS = 3


class HeadForm(NamedTuple):
    """What the fused loss must reproduce for one model.

    ``logit_scale`` and ``softcap`` (``None``: no cap) act on the logits in that order. ``passes_num_items`` and
    ``passes_shift_labels``: the model's forward hands these keyword arguments to its loss function.
    """

    logit_scale: float
    softcap: float | None
    passes_num_items: bool
    passes_shift_labels: bool

    def __str__(self) -> str:
        extras = [f"scale {self.logit_scale:g}"] if self.logit_scale != 1.0 else []
        extras += [f"soft-cap {self.softcap:g}"] if self.softcap is not None else []
        return ", ".join(["linear_cross_entropy", *extras])


class _Unfit(Exception):
    """The model does something the fused loss cannot reproduce; the message is the reason for the report."""


class _BackboneOutput:
    """Output of the stub backbone: hidden states, and ``None`` for whatever else a model asks for."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, index):
        return self.last_hidden_state if index == 0 else ()


class _Backbone(nn.Module):
    """Stub backbone: whatever is called on it returns the hidden states; settings are the real backbone's."""

    def __init__(self, hidden: Tensor, real: nn.Module):
        super().__init__()
        self.hidden = hidden
        self.__dict__["real"] = real  # past nn.Module's registration: not a child

    def __getattr__(self, name):
        value = getattr(self.__dict__["real"], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *args, **kwargs):
        return _BackboneOutput(self.hidden)


class _Head(nn.Module):
    """Stub ``lm_head``: counts its calls, returns the chosen logits."""

    def __init__(self, logits: Tensor, hidden_size: int):
        super().__init__()
        self.logits, self.calls = logits, []
        self.weight, self.bias = torch.empty(0, hidden_size), None

    def forward(self, hidden):
        self.calls.append(tuple(hidden.shape))
        return self.logits


def probe_head(model: nn.Module, head_name: str, head: nn.Module) -> HeadForm | str:
    """The form of ``model``'s path from ``lm_head`` to its loss, or the reason it cannot be fused."""
    try:
        return _probe(model, head_name, head)
    except _Unfit as reason:
        return str(reason)
    except Exception as error:  # a stranger's forward may fail around stubs in any way: that is the reason
        return f"its forward failed on a probe: {type(error).__name__}: {error}"


def _probe(model, head_name, head) -> HeadForm:
    vocab_size, hidden_size = full_shape(head.weight)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, TOKENS, vocab_size, generator=random).clamp(min=-4, max=4)
    # small values show the slope at zero, moderate ones the shape, huge ones where a cap levels off
    logits = logits * torch.tensor([1e-4, 20.0, 1e8])[:, None]
    run = _Runner(model, head_name, hidden_size)

    seen, _ = run(logits)
    if seen.shape != logits.shape:
        raise _Unfit(f"its loss receives logits of shape {tuple(seen.shape)} where lm_head gave {tuple(logits.shape)}")
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

    def __init__(self, model, head_name, hidden_size):
        self.model, self.head_name, self.hidden_size = model, head_name, hidden_size
        self.labels = torch.zeros(1, TOKENS, dtype=torch.long)

    def __call__(self, logits: Tensor, **kwargs) -> tuple[Tensor, dict[str, Any]]:
        """The logits and the keyword arguments that reach the loss function."""
        if "output_router_logits" in inspect.signature(type(self.model).forward).parameters:
            kwargs["output_router_logits"] = False  # the stub backbone has none to compute an auxiliary loss from
        head = _Head(logits, self.hidden_size)
        seen: list[tuple[Tensor, Tensor, dict]] = []

        def record(logits, labels, *args, **extras):
            seen.append((logits, labels, extras))
            return logits.float().sum() * 0.0

        twin = hollow_copy(self.model)
        twin.__dict__["_loss_function"] = record
        twin._modules = dict(self.model._modules)
        hidden = torch.zeros(1, TOKENS, self.hidden_size)
        twin._modules[self.model.base_model_prefix] = _Backbone(hidden, self.model.base_model)
        twin._modules[self.head_name] = head
        with torch.no_grad():
            type(self.model).forward(twin, input_ids=torch.zeros_like(self.labels), labels=self.labels, **kwargs)
        if not seen:
            raise _Unfit("its forward does not compute the loss with `self.loss_function`")
        if head.calls != [(1, TOKENS, self.hidden_size)]:
            raise _Unfit(f"its forward calls lm_head on {head.calls}, not once on all hidden states")
        if len(seen) > 1 or seen[0][1] is not self.labels:
            raise _Unfit("its forward changes the labels before the loss, or computes several losses")
        return seen[0][0], seen[0][2]


def _transform(logits: Tensor, seen: Tensor, config) -> tuple[float, float | None]:
    """The ``(logit_scale, softcap)`` that turn ``logits`` into ``seen``, rows as made in ``_probe``."""
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
        raise _Unfit("its logits go through more than a scale and a soft-cap before the loss")
    return scale, softcap


def _exact(measured: float, config) -> float:
    """The setting that ``measured`` is, up to rounding: 1, or a number of the config or its reciprocal."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = [v for v in text_config.to_dict().values() if type(v) in (int, float) and v]
    for value in (1.0, *settings, *(1 / v for v in settings)):
        if abs(measured - value) <= 1e-5 * abs(value):
            return float(value)
    return measured
