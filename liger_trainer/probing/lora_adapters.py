"""What a call of a PEFT LoRA layer has to compute, read as PEFT's forward reads it, and whether our op takes it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.runtime.launch import is_plain
from .hooks import has_own_call, is_bare_linear

TABLES = ("lora_A", "lora_B", "lora_dropout")
UNCAST = tuple(f"peft.tuners.lora.{name}" for name in ("bnb", "awq", "aqlm", "eetq", "hqq"))  # under autocast of CUDA


class Adapter(NamedTuple):
    """One active adapter of a layer.

    Args:
        a: ``lora_A``.
        b: ``lora_B``.
        dropout: what ``lora_A`` gets is its output.
        scaling: a number, or the tensor that PEFT's hotswapping makes of it.
    """

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    scaling: float | Tensor

    @property
    def drops(self) -> bool:
        """Whether dropout acts."""
        return type(self.dropout) is nn.Dropout and self.dropout.training

    @property
    def weights(self) -> tuple[Tensor, Tensor, float]:
        """A, B and the scale of their product. A scaling that is a tensor is multiplied into B: no number is read."""
        a, b = self.a.weight, self.b.weight
        return (a, b * self.scaling, 1.0) if torch.is_tensor(self.scaling) else (a, b, self.scaling)

    def bias(self, base: Tensor | None = None) -> Tensor | None:
        """The base's bias plus the scaled one of the adapter."""
        if self.b.bias is None:
            return base
        own = self.b.bias * self.scaling
        return own if base is None else base + own


def is_off(module: Any) -> bool:
    """Whether the layer is its base alone: its adapters are disabled or merged, or it has none of the active ones."""
    attributes = module.__dict__
    if attributes["_disable_adapters"] or attributes["merged_adapters"]:
        return True
    here = module._modules["lora_A"]._modules
    return not any(name in here for name in module.active_adapters)


def dropped(module: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    """What the adapter gets of ``x``. PEFT's layers cast ``x`` first, and a GPU's mask depends on the dtype."""
    casts = type(module).__module__ not in UNCAST or not torch.is_autocast_enabled("cuda")
    return adapter.dropout(x.to(adapter.a.weight.dtype) if casts else x)


def _active(module: Any) -> Iterator[Adapter]:
    """The adapters that act, in their order."""
    firsts, seconds, dropouts = (module._modules[name]._modules for name in TABLES)
    for name in module.active_adapters:
        if name in firsts:
            yield Adapter(firsts[name], seconds[name], dropouts[name], module.scaling[name])


def _obstacle(adapter: Adapter, x: Tensor, autocast: bool) -> str | None:
    """Why our op may not take the place of this adapter's layers, if so."""
    a, b, dropout, _ = adapter
    if not is_bare_linear(a) or not is_bare_linear(b):
        return "lora_A or lora_B has hooks, sharded weights or a class of its own"
    if a.bias is not None:
        return "lora_A has a bias"
    if has_own_call(dropout) or (type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout):
        return "its dropout has hooks or a class of its own"
    first, second = a.weight, b.weight
    if first.device != x.device or second.device != x.device:
        return f"lora_A is on {first.device}, lora_B on {second.device}, the input on {x.device}"
    if x.dim() == 0 or first.shape[1] != x.shape[-1] or second.shape[1] != first.shape[0]:
        return f"shapes {(*first.shape,)} of lora_A, {(*second.shape,)} of lora_B and {(*x.shape,)} of the input"
    # The op computes wider adapters as PEFT does, but adds their product in x's dtype: fp16 lacks fp32's range.
    dtype = first.dtype
    is_taken = autocast or dtype == x.dtype or (x.dtype == torch.bfloat16 and dtype == torch.float32)
    if is_taken and second.dtype == dtype:
        return None
    return f"dtypes {dtype} of lora_A, {second.dtype} of lora_B and {x.dtype} of the input"


def usable(module: Any, x: Tensor) -> list[Adapter] | str:
    """The adapters that act, at least one unless ``is_off``, or why PEFT's own forward has to run."""
    attributes = module.__dict__
    if not is_plain(x):
        return f"its input is a {type(x).__name__}"
    if not attributes.get("cast_input_dtype_enabled", True):
        return "the cast of its input is disabled"
    if any(name in module.active_adapters for name in attributes.get("lora_variant", ())):
        return "an active adapter is of a variant"
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype == torch.float64:
        return "its input is fp64 under autocast"
    adapters = [*_active(module)]
    for adapter in adapters:
        obstacle = _obstacle(adapter, x, autocast)
        if obstacle is not None:
            return obstacle
    return adapters
