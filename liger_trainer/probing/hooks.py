"""Hooks on a module: an engine's, which gather and free weights, and those of others, which may change its results."""

import functools
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_has_any_global_hook = torch_module._has_any_global_hook
ENGINES = ("torch.distributed.", "deepspeed.", "accelerate.")


def is_of_engine(hook: Any) -> bool:
    """Whether a distributed engine made this hook or this function."""
    return _module_of(hook).startswith(ENGINES)


def _module_of(hook: Any) -> str:
    """Name of the Python module that a hook comes from."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", None) or type(hook).__module__


def has_hooks_on_outputs(module: nn.Module) -> bool:
    """Whether something other than an engine looks at the module's output or at its gradient, by a hook."""
    tables = (
        module._forward_hooks, module._backward_hooks, module._backward_pre_hooks, torch_module._global_forward_hooks,
        torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
    )  # fmt: skip
    return any(not is_of_engine(hook) for table in tables for hook in table.values())


def reader_of_outputs(module: nn.Module) -> Any:
    """A forward hook of the user that may read what the module returns, or None."""
    hooks = (*module._forward_hooks.values(), *torch_module._global_forward_hooks.values())
    known = (*ENGINES, "transformers.", "peft.", "liger_trainer.")
    return next((hook for hook in hooks if not _module_of(hook).startswith(known)), None)


def is_intercepted(module: nn.Module) -> bool:
    """Whether a call of the module runs something besides its class's forward: hooks or a forward of its own.

    Those of engines do not count. It is asked at each call of a module's parent, so the usual answer has to be cheap.
    """
    forward = module.__dict__.get("forward")
    if forward is not None and not is_of_engine(forward):
        return True
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    if not hooked and not _has_any_global_hook():
        return False
    before = (*module._forward_pre_hooks.values(), *torch_module._global_forward_pre_hooks.values())
    return not all(map(is_of_engine, before)) or has_hooks_on_outputs(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when the module is called, an engine's included."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or bool(_has_any_global_hook())


def has_own_call(module: nn.Module) -> bool:
    """Whether anything besides its class's forward runs when the module is called, an engine's hooks included."""
    return "forward" in module.__dict__ or has_hooks(module)


def is_bare_linear(module: nn.Module | None) -> bool:
    """Whether calling ``module`` is just ``F.linear`` with its parameters: no subclass, adapter, hook or shard."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not has_own_call(module)
