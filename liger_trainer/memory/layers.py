"""One call of a decoder layer: its hidden states, and the flag by which transformers checkpoints it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states ``[..., batch, tokens, hidden]`` among a layer's arguments; they come first."""
    values = (*args, kwargs.get("hidden_states"), *kwargs.values())
    found = (v for v in values if torch.is_tensor(v) and v.dim() >= 3 and v.is_floating_point())
    return next(found, None)


def output_with_gradient(output: Any) -> Tensor | None:
    """A layer's new hidden states, if backward comes to them."""
    first = output[0] if isinstance(output, tuple) else output
    return first if torch.is_tensor(first) and first.requires_grad else None


@contextmanager
def flag(layer: Any, recomputes: bool) -> Iterator[None]:
    """Let the layer recompute or not, in place of the user's setting."""
    if recomputes == layer.gradient_checkpointing:
        yield
        return
    changed: dict[str, Any] = {"gradient_checkpointing": recomputes}
    if recomputes:
        changed["_gradient_checkpointing_func"] = functools.partial(checkpoint, use_reentrant=False)
    attributes = vars(layer)
    before = {name: attributes[name] for name in changed if name in attributes}
    attributes.update(changed)
    try:
        yield
    finally:
        for name in changed:
            del attributes[name]
        attributes.update(before)


def is_of_torch(function: Any) -> bool:
    """Whether transformers set this checkpoint function without offloading."""
    return isinstance(function, functools.partial) and function.func is checkpoint


def has_past(kwargs: dict[str, Any]) -> bool:
    """Whether there are keys and values of earlier tokens, which transformers drops for a checkpointed layer."""
    past = kwargs.get("past_key_values")
    if past is None:
        return False
    return not hasattr(past, "get_seq_length") or int(past.get_seq_length()) > 0
