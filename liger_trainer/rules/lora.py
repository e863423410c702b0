"""Rule for PEFT's LoRA linear layers: ``base(x) + scaling * lora_B(lora_A(dropout(x)))`` for each active adapter.

The probe runs the layer's own forward with small linear layers in place of its children, so neither the base's weights
nor its quantisation matter. Which adapters are active, their scaling, and whether they are merged or disabled is read
at each call, as PEFT's forward reads them.

A base that is a plain ``nn.Linear``, or bitsandbytes's 4-bit one, is computed by our op, adapter included. Any other
base is called as it is, and the adapter's product is added to its output. The rule for gated MLPs hands over gate and
up, which then are one op (``outputs_of``), and a down projection whose input need not be kept (``gated_output``).

A second rule is for modules whose forward calls several LoRA layers on the same input, as attention does for queries,
keys and values. The first of these calls then computes all of them, and the others return what is there, provided that
they get the same tensor, unchanged.
"""

import functools
import importlib
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import LigerConfig
from ..kernels.lora_linear import Projection, compute_dtype, gated_lora_linear, lora_linear, unchecked_lora_linears
from ..probing.hooks import has_hooks, has_own_call, is_bare_linear
from ..probing.lora_adapters import TABLES, Adapter, dropped, is_off, usable
from ..probing.probe import TOLERANCE, difference, generator, hollow_copy
from ..probing.rebinding import Bound, forward_function
from ..probing.rule import Acted, Match, Rule, Skip
from ..probing.shared_inputs import shared_inputs

logger = logging.getLogger(__name__)
_ACTED: weakref.WeakKeyDictionary[Any, Acted] = weakref.WeakKeyDictionary()  # of our forwards
# (dtype of x and the base, dtype of the adapters, whether bf16 autocast is on)
SAMPLES = (
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, False),
    (torch.float32, torch.float32, True),
    (torch.bfloat16, torch.float32, True),
)
FOUR_BIT = ("Linear4bit", "LinearNF4", "LinearFP4")  # bitsandbytes's
WIDTHS = 16, 12  # of the probe's base layer


def is_adapter_layer(module: nn.Module) -> bool:
    """A layer of PEFT that holds another one, whatever its method."""
    return isinstance(getattr(type(module), "adapter_layer_names", None), tuple) and "base_layer" in module._modules


def _key(module: nn.Module) -> tuple:
    return type(module), type(module).forward, _obstacle(module) or _variant(module._modules["base_layer"])


def _obstacle(module: nn.Module) -> str | None:
    """Why no adapter of this layer can be replaced, if so."""
    tables = [table for name in TABLES if isinstance(table := module._modules.get(name), nn.ModuleDict)]
    if len(tables) < len(TABLES) or not tables[0]:
        return f"{type(module).__name__} is not a LoRA linear layer, so PEFT's own forward runs"
    variants, names = vars(module).get("lora_variant", {}), [*tables[0]]
    if all(name in variants for name in names):
        return f"its adapter is of a variant ({type(variants[names[0]]).__name__}), so PEFT's own forward runs"
    if not all(isinstance(child, nn.Linear) for table in tables[:2] for child in table.children()):
        return "its adapter is not made of linear layers, so PEFT's own forward runs"
    return None


def probe(module: nn.Module, config: LigerConfig) -> Match:
    """Whether the layer's forward is that of LoRA, with two adapters at once."""
    obstacle = _obstacle(module)
    if obstacle is not None:
        raise Skip(obstacle)
    for dtype, adapters, autocast in SAMPLES:
        copied = _probe_copy(module, dtype, adapters)
        x = torch.randn(2, 3, WIDTHS[0], generator=generator()).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            theirs, ours = type(module).forward(copied, x), _forward(copied, x)
        computed = torch.bfloat16 if autocast else dtype
        if isinstance(ours, str) or difference(ours, theirs) > TOLERANCE[computed]:
            raise Skip("its forward is not base(x) + scaling * lora_B(lora_A(x))")
    acted, variant = Acted(), _variant(module._modules["base_layer"])
    return Match("lora", variant, methods={"forward": _bound_forward(type(module).forward, acted)}, acted=acted)


def _probe_copy(module: nn.Module, dtype: torch.dtype, adapters: torch.dtype) -> Any:
    """The layer with small random linear layers as children, and two adapters."""
    copied: Any = hollow_copy(module)
    random, (width, out) = generator(), WIDTHS

    def linear(into: int, to: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
        made: Any = nn.utils.skip_init(nn.Linear, into, to, bias, dtype=dtype)  # would use the process-wide generator
        for parameter in made.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) / 4)
        return made

    ranks = {"first": 4, "second": 3}
    copied.base_layer = linear(width, out, dtype, bias=True)
    copied.lora_A = nn.ModuleDict({name: linear(width, rank, adapters) for name, rank in ranks.items()})
    copied.lora_B = nn.ModuleDict({name: linear(rank, out, adapters, bias=True) for name, rank in ranks.items()})
    copied.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in ranks})
    state = {
        "scaling": {"first": 0.5, "second": -1.5}, "lora_variant": {}, "use_dora": dict.fromkeys(ranks, False),
        "_active_adapter": [*ranks], "_disable_adapters": False, "merged_adapters": [],
        "cast_input_dtype_enabled": True,
    }  # fmt: skip
    vars(copied).update(state)
    return copied


def _bound_forward(original: Callable, acted: Acted) -> Callable:
    told: set[str] = set()

    @functools.wraps(original)
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # PEFT's forward also takes ``adapter_names``.
        if args or kwargs or is_off(self):
            return original(self, x, *args, **kwargs)
        out = _shared_output(self, x)
        out = _forward(self, x) if out is None else out
        if isinstance(out, str):
            if out not in told and not torch.compiler.is_compiling():
                told.add(out)
                logger.warning("liger_trainer: %s runs PEFT's own forward: %s", type(self).__name__, out)
            return original(self, x)
        acted.note()
        return out

    _ACTED[forward] = acted
    return forward


class _Group:
    """LoRA layers that one call of their parent calls on one input.

    Args:
        layers: The layers.
        note: Called with whether they are computed together.
    """

    def __init__(self, layers: Sequence[nn.Module], note: Callable[[bool], None]):
        self.layers = layers
        self._note = note
        self._outputs: dict[nn.Module, Tensor] = {}
        self._seen: tuple = ()

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output for ``x``, or None if it has to be computed by itself."""
        seen = id(x), x._version, compute_dtype(x), torch.is_grad_enabled()
        if not self._seen:
            self._seen, self._input = seen, x  # as long as the tensor is held, its id is its own
            taken = [_taken(each, x) for each in self.layers]
            projections = [projection for projection, _ in taken if projection is not None]
            is_whole = len(projections) == len(self.layers)
            if is_whole:
                self._outputs = dict(zip(self.layers, unchecked_lora_linears(x, projections), strict=True))
            if is_whole or not any(map(is_off, self.layers)):
                self._note(is_whole)
        return self._outputs.pop(layer, None) if seen == self._seen else None


class _Running(threading.local):
    """The group of the parent whose forward is running in this thread."""

    group: _Group | None = None


_RUNNING = _Running()


def _shared_output(layer: nn.Module, x: Tensor) -> Tensor | None:
    group = _RUNNING.group
    if group is None or layer not in group.layers or x.is_inference():  # which has no version
        return None
    return group.output(layer, x)


def _grouped_forward(names: Sequence[str], acted: Acted, forward: Callable) -> Callable:
    """``forward`` of a parent, in whose calls the layers of these names are a group."""
    was_whole = True

    def note(is_whole: bool) -> None:
        nonlocal was_whole
        if is_whole:
            acted.note()
        if is_whole != was_whole:
            acted.restate(_group_variant(names, is_whole))
        was_whole = is_whole

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        outer, _RUNNING.group = _RUNNING.group, _Group([getattr(self, name) for name in names], note)
        try:
            return forward(self, *args, **kwargs)
        finally:
            _RUNNING.group = outer

    return wrapper


def _shared_layers(module: nn.Module) -> tuple[str, ...]:
    """Names of the LoRA layers that the module's forward calls on one input, and that our op computes as a whole."""
    layers = {n for n, child in module._modules.items() if child is not None and _may_be_whole(child)}
    function = forward_function(module) if len(layers) > 1 else None
    groups = shared_inputs(function) if function is not None else ()
    return max((tuple(n for n in group if n in layers) for group in groups), key=len, default=())


def _may_be_whole(layer: nn.Module) -> bool:
    """Whether this is a LoRA layer without dropout over a base that our op computes."""
    if not is_adapter_layer(layer) or _obstacle(layer) is not None:
        return False
    dropouts = cast(nn.Module, layer._modules["lora_dropout"]).children()
    return _computes(layer._modules["base_layer"]) and all(type(d) is nn.Identity for d in dropouts)


def _computes(base: Any) -> bool:
    """Whether our op computes this base, unless hooks or shards come later. Quantised weights are parameters of types
    of their own.
    """
    return (type(base) is nn.Linear and type(base.weight) is nn.Parameter) or type(base).__name__ in FOUR_BIT


def _variant(base: Any) -> str:
    if not _computes(base):
        of = type(base.weight).__name__ if type(base) is nn.Linear else type(base).__name__
        return f"lora_linear, beside {of}"
    return "lora_linear" if type(base) is nn.Linear else f"lora_linear, over {type(base).__name__}"


def _group_variant(names: Sequence[str], is_whole: bool) -> str:
    return f"{', '.join(names)} {'as one op' if is_whole else 'one by one'}"


def probe_parent(module: nn.Module, config: LigerConfig) -> Match:
    """The group that the module's forward calls on one input."""
    names, acted = _shared_layers(module), Acted()
    wrapper = functools.partial(_grouped_forward, names, acted)
    return Match("lora", _group_variant(names, True), wraps=((module, wrapper),), acted=acted)


def outputs_of(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """``[layer(x) for layer in layers]``, as one op if all are LoRA layers that ours computes."""
    taken = [_taken(layer, x) for layer in layers]
    projections = [projection for projection, _ in taken if projection is not None]
    if len(projections) < len(layers):
        return [layer(x) for layer in layers]
    for _, acted in taken:
        acted.note()
    return [*unchecked_lora_linears(x, projections)]


def gated_output(layer: nn.Module, gate: Tensor, up: Tensor | None, activation: str) -> Tensor | None:
    """``layer(act(gate) * up)`` without keeping its input, or None if it is not a LoRA layer that our op computes."""
    projection, acted = _taken(layer, gate)
    if projection is None:
        return None
    acted.note()
    return gated_lora_linear(gate, up, projection, activation)


def _taken(layer: nn.Module, x: Tensor) -> tuple[Projection | None, Acted]:
    """What our op needs to be the whole of this layer, if it can, and the layer's ``Acted``."""
    bound = None if torch.compiler.is_compiling() else layer.__dict__.get("forward")
    acted = _ACTED.get(bound.function) if isinstance(bound, Bound) else None
    if acted is None or has_hooks(layer) or is_off(layer):
        return None, Acted()
    adapters = usable(layer, x)
    if isinstance(adapters, str) or len(adapters) > 1:
        return None, acted
    return _projection(layer, adapters[0], x), acted


def _projection(module: Any, adapter: Adapter, x: Tensor) -> Projection | None:
    """The base with this adapter as one product, if our op can compute the base."""
    base = module._modules["base_layer"]
    weight = None if adapter.drops else _weight_of(base, x)
    a, b, scale = adapter.weights
    if weight is None or weight.device != x.device or weight.shape != (b.shape[0], a.shape[1]):
        return None
    return Projection(a, b, scale, weight, adapter.bias(base.bias))


class _FourBit:
    """The weight of bitsandbytes's ``Linear4bit``."""

    def __init__(self, weight: Any):
        self._packed, self._state = weight.data, weight.quant_state
        self.shape, self.device = torch.Size(self._state.shape), self._packed.device

    def to(self, dtype: torch.dtype) -> Tensor:
        """Its values."""
        functional = importlib.import_module("bitsandbytes.functional")  # it is there: it made the weight
        return functional.dequantize_4bit(self._packed, self._state).to(dtype)


def _weight_of(base: Any, x: Tensor) -> Tensor | _FourBit | None:
    """The base's weight, if the base does nothing but multiply by it and add its bias in the dtype of the op."""
    if is_bare_linear(base):
        autocast = torch.is_autocast_enabled(x.device.type)
        return base.weight if autocast or base.weight.dtype == x.dtype else None
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if type(base).__name__ not in FOUR_BIT or not type(base).__module__.startswith("bitsandbytes.") or state is None:
        return None
    if has_own_call(base) or torch.compiler.is_compiling() or type(base.weight).__name__ != "Params4bit":
        return None
    if not base.compute_type_is_set:  # as its forward does in its first call
        base.set_compute_type(x)
        base.compute_type_is_set = True
    fits = tuple(state.shape) == (base.out_features, base.in_features) and not base.weight.requires_grad
    return _FourBit(base.weight) if fits and x.dtype == compute_dtype(x) == (base.compute_dtype or x.dtype) else None


def _forward(module: Any, x: Tensor) -> Tensor | str:
    """The layer's output, or why PEFT's own forward has to compute it."""
    adapters = usable(module, x)
    if isinstance(adapters, str):
        return adapters
    whole = _projection(module, adapters[0], x)
    out = module._modules["base_layer"](x) if whole is None else unchecked_lora_linears(x, (whole,))[0]
    for adapter in adapters if whole is None else adapters[1:]:
        inputs = dropped(module, adapter, x) if adapter.drops else x
        same = out.dtype == compute_dtype(inputs)
        added = lora_linear(inputs, *adapter.weights, bias=adapter.bias(), base=out if same else None)
        out = added if same else (out + added).to(out.dtype)
    return out


RULES = (
    Rule(("lora",), is_adapter_layer, probe, _key),
    # Its match names the module, so modules that are alike do not share it.
    Rule(("lora",), lambda module: len(_shared_layers(module)) > 1, probe_parent, id),
)
