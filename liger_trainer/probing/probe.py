"""Numeric probes: does a module compute what one of our ops computes?

A probe runs the module's own class-level ``forward`` on a few random numbers on the CPU. It runs on a probe copy, which
has the module's settings and random parameters. So a probe works for weights that are on the meta device, sharded,
quantised or on a GPU, and it never touches the module.
"""

import copy
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# Largest error, relative to the largest value, at which two results count as the same computation.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Packages of whose modules it is known how they use masks and padding.
PACKAGES = {"builtins", "abc", "typing", "torch", "transformers", "peft"}
_PLAIN = (int, float, str, tuple, list, dict, type(None), torch.dtype, torch.Size)


def generator() -> torch.Generator:
    """The probes' own random numbers. The process-wide generator, which training uses, stays as it is."""
    return torch.Generator().manual_seed(0x11)


def is_known(cls: type) -> bool:
    """Whether the class and its bases are of packages whose use of masks and padding is known."""
    return all(base.__module__.partition(".")[0] in PACKAGES for base in cls.__mro__)


def submodules(module: nn.Module) -> Iterator[nn.Module]:
    """All modules in ``module``, itself included; a module that is shared comes more than once.

    For what is asked at each forward: ``module.modules()`` also builds names and takes several times as long.
    """
    pending = [module]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(filter(None, current._modules.values()))


def name_in(model: nn.Module, module: nn.Module | None) -> str:
    """Name of ``module`` in ``model``; empty if it is not there."""
    return next((name for name, candidate in model.named_modules() if candidate is module), "")


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter; ZeRO-3 leaves an empty 1-D tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def hollow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class and settings without parameters, buffers, children, hooks or a bound ``forward``."""
    hollow = object.__new__(type(module))
    nn.Module.__init__(hollow)  # makes the empty tables; a subclass's own __init__ would need its arguments
    hollow.__dict__.update({k: v for k, v in vars(module).items() if k not in vars(hollow) and k != "forward"})
    return hollow


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers: no hook of the user's may fire on a probe's numbers."""
    copied = hollow_copy(module)
    copied._parameters, copied._buffers = module._parameters, module._buffers
    copied._modules = {n: None if child is None else without_hooks(child) for n, child in module._modules.items()}
    return copied


def probe_copy(
    module: nn.Module, dtype: torch.dtype, children: dict[str, nn.Module] | None = None, parameters: bool = True
) -> nn.Module:
    """A training-mode copy of ``module`` without hooks or buffers, with random parameters on the CPU.

    Args:
        module: The module to copy.
        dtype: Dtype of the parameters.
        children: Replaces child modules by name. The others are deep-copied, so they should be small.
        parameters: ``False`` leaves the parameters out, for methods that do not read them.
    """
    copied = hollow_copy(module)
    random = generator()
    copied._parameters = {
        name: None if p is None else nn.Parameter(torch.rand(full_shape(p), generator=random).add_(0.5).to(dtype))
        for name, p in module._parameters.items()
        if parameters
    }
    for name, child in module._modules.items():
        if child is not None:
            child = children[name] if children and name in children else copy.deepcopy(without_hooks(child)).train()
        copied._modules[name] = child
    return copied


def settings_key(module: nn.Module) -> tuple:
    """What a probe's result may depend on: the code, every attribute, and the shapes of parameters and children.

    Functions, configs and other objects are compared by identity.
    """
    machinery = vars(nn.Module())
    attributes = tuple(
        (name, repr(value) if isinstance(value, _PLAIN) else id(value))
        for name, value in sorted(vars(module).items())
        if name not in machinery
    )
    parameters = tuple((n, None if p is None else tuple(full_shape(p))) for n, p in module._parameters.items())
    children = tuple((n, None if c is None else settings_key(c)) for n, c in module._modules.items())
    return type(module), type(module).forward, attributes, parameters, children


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest error relative to the largest value; infinite if shapes or dtypes differ or the error is NaN."""
    if not torch.is_tensor(theirs) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    error = ((ours.double() - theirs.double()).abs().amax() / theirs.double().abs().amax().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def autocast_states(*states: Tensor) -> list[Tensor]:
    """The states in the dtype to which autocast would cast them in SDPA, because that decides about the kernel."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(states)
    dtype = torch.get_autocast_dtype(device)
    return [state if state.dtype == torch.float64 else state.to(dtype) for state in states]


def forward_parameters(function: Callable) -> list[inspect.Parameter] | None:
    """The parameters of ``function`` after ``self``, or ``None`` if it has no readable signature."""
    try:
        return list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return None


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether the class-level forward takes exactly one argument besides ``self``."""
    parameters = forward_parameters(type(module).forward)
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return parameters is not None and len(parameters) == 1 and parameters[0].kind in named
