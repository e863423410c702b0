"""Rules for gated MLPs, ``down(act(gate(x)) * up(x))``, and for mixture-of-experts gates.

The probe replaces the projections by recorders that return fixed random numbers of the right width. The input of the
down projection shows the activation, and the recorders show that nothing else happens before or after it. No projection
weight is needed, so adapters and quantised projections make no difference.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import LigerConfig
from ..kernels import reference
from ..kernels.clamped_swiglu import clamped_swiglu
from ..kernels.gated_linear import gated_linear
from ..kernels.geglu import geglu
from ..kernels.swiglu import swiglu
from ..probing.conditions import Conditions
from ..probing.hooks import is_bare_linear, is_intercepted
from ..probing.probe import (
    TOLERANCE,
    difference,
    forward_parameters,
    generator,
    probe_copy,
    settings_key,
    takes_one_tensor,
)
from ..probing.rule import Acted, Match, Rule, Skip
from .lora import gated_output, outputs_of


class Activation(NamedTuple):
    """An activation: our op, its definition, and its name in ``gated_linear``."""

    op: Callable
    definition: Callable
    name: str


ACTIVATIONS = {
    "swiglu": Activation(swiglu, reference.swiglu, "silu"),
    "geglu, tanh": Activation(geglu, reference.geglu, "gelu_tanh"),
    "geglu, exact": Activation(
        functools.partial(geglu, approximate="none"), functools.partial(reference.geglu, approximate="none"), "gelu"
    ),
}
# (dtype, magnitude): large numbers show a clamp on the gate or on the product.
SAMPLES = ((torch.float32, 2.0), (torch.bfloat16, 2.0), (torch.float32, 1e3))
INTERCEPTED = "one of its children has hooks or a forward of its own, which would not run"
UNKNOWN = "the input of its down projection is neither silu(gate) * up nor gelu(gate) * up"


class _Recorder(nn.Module):
    """Replaces a projection: keeps its input and returns fixed numbers."""

    def __init__(self, width: int, seed: int, dtype: torch.dtype, size: float):
        super().__init__()
        self.out = torch.randn(1, 3, width, generator=generator().manual_seed(seed)).mul_(size).to(dtype)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.out


def _projections(module: nn.Module) -> dict[str, Any]:
    return {n: c for n, c in module._modules.items() if hasattr(c, "in_features") and hasattr(c, "out_features")}


def _roles(projections: dict[str, Any]) -> list[tuple[str, ...]]:
    """Ways to read the children as (gate, up, down) or (packed gate_up, down), by their widths."""
    roles = []
    for names in itertools.permutations(projections):
        *inner, down = (projections[n] for n in names)
        same_input = len({p.in_features for p in inner}) == 1 and len({p.out_features for p in inner}) == 1
        width = inner[0].out_features // (2 if len(inner) == 1 else 1)
        if same_input and down.in_features == width and down.out_features == inner[0].in_features:
            roles.append(names)
    # In a square MLP several readings fit; the usual one comes first.
    return sorted(roles, key=lambda names: ("down" not in names[-1], "gate" not in names[0]))


def matches_mlp(module: nn.Module) -> bool:
    """Two or three projections whose widths fit a gated MLP, no other parameters, one input."""
    projections = _projections(module)
    if len(projections) not in (2, 3) or module._parameters or not takes_one_tensor(module):
        return False
    others = (c for n, c in module._modules.items() if n not in projections and c is not None)
    return bool(_roles(projections)) and not any(True for c in others for _ in c.parameters())


def probe_mlp(module: nn.Module, config: LigerConfig) -> Match:
    """The activation and the reading of the children that agree with ``module``."""
    if _is_intercepted(module):
        raise Skip(INTERCEPTED)
    for names in _roles(_projections(module)):
        recorded = [_record(module, names, *sample) for sample in SAMPLES]
        runs = [run for run in recorded if run is not None]
        if len(runs) < len(SAMPLES):
            continue
        for variant, activation in ACTIVATIONS.items():
            for swapped in (False, True):
                inputs = [run[0][::-1] if swapped else run[0] for run in runs]
                if all(
                    difference(activation.definition(*pair), seen) <= TOLERANCE[dtype]
                    for pair, (_, seen), (dtype, _) in zip(inputs, runs, SAMPLES, strict=True)
                ):
                    acted, conditions = Acted(), Conditions(module, followed=names)
                    forward = _mlp_forward(
                        type(module).forward, names, swapped, activation, config.recompute_glu, acted, conditions
                    )
                    packed = ", packed" if len(names) == 2 else ""
                    return Match("glu", f"{variant}{packed}", methods={"forward": forward}, acted=acted)
    raise Skip(UNKNOWN)


def _children(module: nn.Module) -> list[nn.Module]:
    """The children of ``module`` that its replacement does not call."""
    projections = _projections(module)
    return [child for name, child in module._modules.items() if child is not None and name not in projections]


def _is_intercepted(module: nn.Module) -> bool:
    """Whether something besides their class's forward runs when these children are called."""
    return any(map(is_intercepted, _children(module)))


def _key(module: nn.Module) -> tuple:
    return settings_key(module), _is_intercepted(module)


def _record(
    module: nn.Module, names: tuple[str, ...], dtype: torch.dtype, size: float
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """((gate, up), input of down) of one run, or ``None`` if the module uses its children in another way."""
    projections = _projections(module)
    recorders = [_Recorder(projections[n].out_features, seed, dtype, size) for seed, n in enumerate(names)]
    *inner, down = recorders
    copied = probe_copy(module, dtype, dict(zip(names, recorders, strict=True)))
    x = torch.randn(1, 3, projections[names[0]].in_features, generator=generator()).to(dtype)
    with torch.no_grad():
        out = type(module).forward(copied, x)
    untouched = all(p.seen is not None and torch.equal(p.seen, x) for p in inner)
    if not untouched or down.seen is None or not torch.is_tensor(out) or not torch.equal(out, down.out):
        return None
    pair = inner[0].out.chunk(2, dim=-1) if len(inner) == 1 else (inner[0].out, inner[1].out)
    return pair, down.seen


def _mlp_forward(
    original: Callable, names: tuple[str, ...], swapped: bool, activation: Activation, recompute: bool, acted: Acted,
    conditions: Conditions,
) -> Callable:  # fmt: skip
    *inner_names, down_name = names
    parameters = forward_parameters(original)
    assert parameters is not None  # ``matches_mlp`` has seen them
    input_name = parameters[0].name

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not conditions.hold(self):
            conditions.warn(self)
            return original(self, *args, **kwargs)
        acted.note()
        hidden_states = args[0] if args else kwargs[input_name]
        inner = outputs_of([getattr(self, name) for name in inner_names], hidden_states)
        if swapped:
            inner = [*reversed(inner[0].chunk(2, dim=-1) if len(inner) == 1 else inner)]
        down = getattr(self, down_name)
        if recompute and torch.is_grad_enabled():
            gate, up = inner if len(inner) == 2 else (inner[0], None)
            if is_bare_linear(down):
                return gated_linear(gate, up, down.weight, down.bias, activation=activation.name)
            out = gated_output(down, gate, up, activation.name)
            if out is not None:
                return out
        return down(activation.op(*inner))

    return forward


def matches_experts(module: nn.Module) -> bool:
    """transformers' experts whose gate is a method, which the batched and grouped forwards call."""
    return bool(vars(module).get("has_gate")) and callable(getattr(type(module), "_apply_gate", None))


def probe_experts(module: nn.Module, config: LigerConfig) -> Match:
    """The activation that agrees with the experts' ``_apply_gate`` on a packed ``[tokens, 2 * I]`` tensor."""
    if _is_intercepted(module):
        raise Skip(INTERCEPTED)
    cls: Any = type(module)
    model_config: Any = module.config
    eager = model_config._experts_implementation in (None, "eager")
    if eager and "_apply_gate" not in inspect.unwrap(cls.forward).__code__.co_names:
        raise Skip("its eager forward has the gate inline; set experts_implementation='grouped_mm'")
    original = cls._apply_gate
    copied = probe_copy(module, torch.float32, parameters=False)
    gate_up = torch.randn(5, 48, generator=generator())
    samples = [(gate_up * size).to(dtype) for dtype, size in SAMPLES]
    known = [(x, original(copied, x)) for x in samples]
    for variant, activation in ACTIVATIONS.items():
        if _agrees(activation.definition, known):
            op = lambda module, x, op=activation.op: op(x)  # noqa: E731
            return _experts_match(f"{variant}, packed", original, op, Conditions(module, original))
    return _probe_clamped(module, original, copied, known)


def _agrees(definition: Callable, known: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether ``definition`` gives the output of each pair ``(input, output of the module)``."""
    return all(difference(definition(x), out) <= TOLERANCE[x.dtype] for x, out in known)


def _probe_clamped(
    module: nn.Module, original: Callable, copied: nn.Module, known: list[tuple[Tensor, Tensor]]
) -> Match:
    """The form of ``clamped_swiglu`` that agrees; limit and alpha are attributes of ``module``, or alpha is 1."""
    alphas: list[str | None] = [*_numbers(module, ("alpha",))]
    alphas.insert(sum("alpha" in name for name in alphas if name is not None), None)
    for limit in _numbers(module, ("limit", "clamp")):
        # The samples may all be on one side of the limit, so add numbers around it.
        around = known[0][0] * getattr(module, limit)
        here = [*known, (around, original(copied, around))]
        for alpha, offset, interleaved in itertools.product(alphas, (0.0, 1.0), (False, True)):
            read = _settings_reader(limit, alpha, offset, interleaved)
            if _agrees(functools.partial(reference.clamped_swiglu, **read(module)), here):
                variant = "swiglu, clamped, packed" + ", interleaved" * interleaved
                op = lambda module, x, read=read: clamped_swiglu(x, **read(module))  # noqa: E731
                followed = (limit,) if alpha is None else (limit, alpha)
                return _experts_match(variant, original, op, Conditions(module, original, followed))
    raise Skip("its gate is neither silu(gate) * up nor gelu(gate) * up, nor a known clamped form of these")


def _numbers(module: nn.Module, words: tuple[str, ...]) -> list[str]:
    """Names of attributes that are positive numbers: those that contain one of ``words`` first, then floats first."""
    found = {k: v for k, v in vars(module).items() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}
    return sorted(found, key=lambda k: (not any(word in k for word in words), isinstance(found[k], int)))


def _settings_reader(
    limit: str, alpha: str | None, offset: float, interleaved: bool
) -> Callable[[nn.Module], dict[str, Any]]:
    """A function of the module: the settings of ``clamped_swiglu`` from the current attributes."""
    return lambda module: {
        "limit": getattr(module, limit), "alpha": 1.0 if alpha is None else getattr(module, alpha), "offset": offset,
        "interleaved": interleaved,
    }  # fmt: skip


def _experts_match(
    variant: str, original: Callable, op: Callable[[nn.Module, Tensor], Tensor], conditions: Conditions
) -> Match:
    acted = Acted()

    @functools.wraps(original)
    def apply_gate(self: nn.Module, gate_up_out: Tensor) -> Tensor:
        if not conditions.hold(self):
            conditions.warn(self)
            return original(self, gate_up_out)
        acted.note()
        return op(self, gate_up_out)

    return Match("glu", variant, methods={"_apply_gate": apply_gate}, acted=acted)


RULES = (Rule(("glu",), matches_mlp, probe_mlp, _key), Rule(("glu",), matches_experts, probe_experts, _key))
