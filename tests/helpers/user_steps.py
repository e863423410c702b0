"""What users do to one model: hooks, settings, replaced modules, other weights.

Hooks and replaced functions are classes of this module, so that a model with them can be copied and pickled.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from model_pair import core_of
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, tuple):
        return (_scaled(value[0], factor), *value[1:])
    return value * factor if torch.is_tensor(value) and value.is_floating_point() else value


class ScaleOutput:
    """Forward hook: the output times 0.5."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return _scaled(output, 0.5)


class ScaleInput:
    """Forward pre-hook: the first positional argument times 0.5."""

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        return (_scaled(args[0], 0.5), *args[1:]) if args else None


class ScaleGradient:
    """Backward hook of a module, or hook of a tensor: the gradient times 0.5."""

    def __call__(self, *values: Any) -> Any:
        return values[0] * 0.5 if len(values) == 1 else tuple(_scaled(g, 0.5) for g in values[1])


class HalveAccumulated:
    """Post-accumulate hook of a parameter: its gradient times 0.5, in place."""

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)


class Observe:
    """Forward hook: notes the calls' output shapes, and in evaluation the values' sums."""

    def __init__(self):
        self.seen: list[tuple] = []

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        total = None if module.training else value.detach().float().abs().sum().item()
        self.seen.append((tuple(value.shape), total))


class OwnLabels:
    """Forward pre-hook of the model: the labels are the ids."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs.get("labels") is None or kwargs.get("input_ids") is None:
            return args, kwargs
        return args, kwargs | {"labels": kwargs["input_ids"]}


class DoubleLoss:
    """Forward hook of the model: twice the loss."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss * 2


class ZLoss:
    """Forward hook of the model: a term of the logits on top of the loss."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + 0.1 * output.logits.float().logsumexp(-1).square().mean()


class ScaledLinear(nn.Linear):
    """A projection of the user's own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class BoundForward:
    """An instance's forward put in by the user: the class's own, its output times 0.5."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _scaled(type(self.module).forward(self.module, *args, **kwargs), 0.5)


class WrappedForward:
    """An instance's forward that calls the one it replaces, as wrappers for autocast do."""

    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def smoothed_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """A loss function of the user's own."""
    return 2 * ForCausalLMLoss(logits, labels, vocab_size, **kwargs) + logits.float().mean()


class Square(nn.Module):
    """A parametrization: the weight squared."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.square()


def named(model: nn.Module, *ends: str) -> list[nn.Module]:
    """Modules whose name ends in one of ``ends``."""
    return [module for name, module in core_of(model).named_modules() if name.split(".")[-1] in ends]


def norms(model: nn.Module) -> list[nn.Module]:
    """The norms, in order; the last is the one before ``lm_head``."""
    found = [m for m in core_of(model).modules() if "Norm" in type(m).__name__ and "weight" in m._parameters]
    return found


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules."""
    return [module for module in core_of(model).modules() if hasattr(module, "is_causal")]


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers."""
    return next(m for m in core_of(model).modules() if isinstance(m, nn.ModuleList))


PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "lm_head": lambda model: core_of(model).get_output_embeddings(),
    "activation": lambda model: named(model, "act_fn", "act")[0],
    "last norm": lambda model: norms(model)[-1],
    "first norm": lambda model: norms(model)[0],
    "mlp": lambda model: named(model, "mlp")[0],
    "projection": lambda model: named(model, "down_proj", "c_proj", "o_proj")[-1],
    "attention": lambda model: attentions(model)[0],
    "layer": lambda model: layers(model)[0],
    "embeddings": lambda model: core_of(model).get_input_embeddings(),
    "model": core_of,
}

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda module: module.register_forward_hook(ScaleOutput()),
    "input": lambda module: module.register_forward_pre_hook(ScaleInput()),
    "gradient of inputs": lambda module: module.register_full_backward_hook(ScaleGradient()),
    "gradient of outputs": lambda module: module.register_full_backward_pre_hook(ScaleGradient()),
    "observe": lambda module: module.register_forward_hook(Observe()),
    "weight's gradient": lambda module: next(module.parameters()).register_hook(ScaleGradient()),
    "accumulated": lambda module: next(module.parameters()).register_post_accumulate_grad_hook(HalveAccumulated()),
}
MODEL_HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "own labels": lambda model: model.register_forward_pre_hook(OwnLabels(), with_kwargs=True),
    "double loss": lambda model: model.register_forward_hook(DoubleLoss()),
    "z-loss": lambda model: model.register_forward_hook(ZLoss()),
}


def observations(model: nn.Module) -> list[tuple]:
    """What the ``Observe`` hooks of a model have seen."""
    hooks = [hook for module in core_of(model).modules() for hook in module._forward_hooks.values()]
    return [seen for hook in hooks if isinstance(hook, Observe) for seen in hook.seen]


def _set_all(modules: list[nn.Module], name: str, value: Any) -> None:
    changed = [setattr(module, name, value) for module in modules if hasattr(module, name)]
    assert changed, f"no module has {name}"


def _set_config(model: nn.Module, name: str, value: Any) -> None:
    assert hasattr(core_of(model).config, name), name
    setattr(core_of(model).config, name, value)


def _set_eps(model: nn.Module, value: float) -> None:
    for norm in norms(model):
        for name in ("variance_epsilon", "eps"):
            if hasattr(norm, name):
                setattr(norm, name, value)


SETTINGS: dict[str, Callable[[nn.Module], None]] = {
    "attention dropout": lambda m: _set_all(attentions(m), "attention_dropout", 0.3),
    "not causal": lambda m: _set_all(attentions(m), "is_causal", False),
    "config not causal": lambda m: setattr(core_of(m).config, "is_causal", False),
    "attention scale": lambda m: _set_all(attentions(m), "scaling", 0.1),
    "soft-cap": lambda m: _set_config(m, "final_logit_softcapping", 0.7),
    "no soft-cap": lambda m: _set_config(m, "final_logit_softcapping", None),
    "logit scale": lambda m: _set_config(m, "logits_scaling", 2.0),
    "attention soft-cap": lambda m: _set_all(attentions(m), "attn_logit_softcapping", 0.3),
    "epsilon": lambda m: _set_eps(m, 0.3),
    "router loss": lambda m: _set_config(m, "output_router_logits", not core_of(m).config.output_router_logits),
    "eager experts": lambda m: core_of(m).set_experts_implementation("eager"),
    "grouped experts": lambda m: core_of(m).set_experts_implementation("grouped_mm"),
    "eager attention": lambda m: core_of(m).set_attn_implementation("eager"),
    "sdpa attention": lambda m: core_of(m).set_attn_implementation("sdpa"),
    "hidden states": lambda m: setattr(core_of(m).config, "output_hidden_states", True),
    "no cache": lambda m: setattr(core_of(m).config, "use_cache", False),
    "own loss": lambda m: setattr(core_of(m), "loss_function", smoothed_loss),
    "usual loss": lambda m: setattr(core_of(m), "loss_function", ForCausalLMLoss),
}


def _replace(modules: list[nn.Module], old: list[nn.Module], make: Callable[[nn.Module], nn.Module]) -> None:
    assert old
    for parent in modules:
        for name, child in list(parent._modules.items()):
            if any(child is each for each in old):
                setattr(parent, name, make(child))


def _replace_head(model: nn.Module, cls: type[nn.Linear]) -> None:
    core = core_of(model)
    old = core.get_output_embeddings()
    new = cls(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
    core.set_output_embeddings(new)


def _everywhere(model: nn.Module, old: list[nn.Module], make: Callable[[nn.Module], nn.Module]) -> None:
    _replace(list(core_of(model).modules()), old, make)


def _swap_mlps(model: nn.Module) -> None:
    first, second = layers(model)[0], layers(model)[1]
    first.mlp, second.mlp = second.mlp, first.mlp


def _drop_last_layer(model: nn.Module) -> None:
    base = core_of(model).base_model
    name = next(name for name, child in base.named_children() if isinstance(child, nn.ModuleList))
    setattr(base, name, getattr(base, name)[:-1])


def _set_forward(module: nn.Module, forward: Callable) -> None:
    module.forward = forward


REPLACEMENTS: dict[str, Callable[[nn.Module], None]] = {
    "activations": lambda m: _everywhere(m, named(m, "act_fn", "act"), lambda old: nn.ReLU()),
    "one activation": lambda m: _everywhere(m, named(m, "act_fn", "act")[:1], lambda old: nn.Tanh()),
    "last norm": lambda m: _everywhere(m, norms(m)[-1:], lambda old: nn.Identity()),
    "copy of a norm": lambda m: _everywhere(m, norms(m)[:1], copy.deepcopy),
    "copy of an mlp": lambda m: _everywhere(m, named(m, "mlp")[:1], copy.deepcopy),
    "copy of a layer": lambda m: _everywhere(m, [layers(m)[0]], copy.deepcopy),
    "norm shared": lambda m: _everywhere(m, norms(m)[:1], lambda old: norms(m)[1]),
    "head": lambda m: _replace_head(m, nn.Linear),
    "own head": lambda m: _replace_head(m, ScaledLinear),
    "copy of the head": lambda m: core_of(m).set_output_embeddings(copy.deepcopy(core_of(m).get_output_embeddings())),
    "head's forward": lambda m: _set_forward(PARTS["lm_head"](m), BoundForward(PARTS["lm_head"](m))),
    "norm's forward": lambda m: _set_forward(norms(m)[0], BoundForward(norms(m)[0])),
    "model's forward": lambda m: _set_forward(core_of(m), WrappedForward(core_of(m).forward)),
    "mlps swapped": _swap_mlps,
    "last layer dropped": _drop_last_layer,
    "head tied": lambda m: setattr(PARTS["lm_head"](m), "weight", PARTS["embeddings"](m).weight),
}


def frozen_part(model: nn.Module, part: str) -> Iterator[nn.Parameter]:
    """The parameters of ``part``, one of ``FREEZABLE``."""
    head = {id(p) for p in PARTS["lm_head"](model).parameters()}
    of_norms = {id(p) for norm in norms(model) for p in norm.parameters()}
    select = {
        "all": lambda p: True,
        "head": lambda p: id(p) in head,
        "all but the head": lambda p: id(p) not in head,
        "norms": lambda p: id(p) in of_norms,
        "all but norms": lambda p: id(p) not in of_norms,
        "matrices": lambda p: p.ndim > 1,
    }[part]
    return (p for p in model.parameters() if select(p))


FREEZABLE = ("head", "all but the head", "norms", "all but norms", "matrices", "all")


@contextlib.contextmanager
def factor_on(parameters: list[nn.Parameter], factor: float):
    """Other weights for a while, as EMA helpers do it by ``.data.copy_``."""
    kept = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data.copy_(p.data * factor)
    yield
    for p, old in zip(parameters, kept, strict=True):
        p.data.copy_(old)


def _new_parameters(model: nn.Module, parameters: list[nn.Parameter], factor: float) -> None:
    wanted = {id(p): nn.Parameter(p.detach() * factor, p.requires_grad) for p in parameters}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and id(p) in wanted:
                setattr(module, name, wanted[id(p)])


def change_weights(model: nn.Module, part: str, how: str, factor: float) -> None:
    """Multiply the weights of ``part`` in one of the ways of ``SWAPS``."""
    parameters = list(frozen_part(model, part))
    if how == "data.copy_":
        for p in parameters:
            p.data.copy_(p.data * factor)
    elif how == "data":
        for p in parameters:
            p.data = p.data * factor
    elif how == "in place":
        with torch.no_grad():
            for p in parameters:
                p.mul_(factor)
    elif how == "new parameters":
        _new_parameters(model, parameters, factor)
    elif how == "load_state_dict":
        model.load_state_dict({name: value * factor for name, value in model.state_dict().items()})
    elif how == "assign":
        model.load_state_dict({name: value * factor for name, value in model.state_dict().items()}, assign=True)
    elif how == "swap_tensors":
        for p in parameters:
            torch.utils.swap_tensors(p, nn.Parameter(p.detach() * factor, p.requires_grad))
    else:
        raise ValueError(how)


SWAPS = ("data.copy_", "data", "in place", "new parameters", "load_state_dict", "assign", "swap_tensors")
