"""A view of transformers' table of attention functions, in which some functions are ours for one module."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import AttentionInterface

from .rebinding import cached_weakly, forward_function


def attention_tables(module: nn.Module) -> dict[str, AttentionInterface]:
    """The tables of attention functions that the class's forward looks functions up in, by their global names."""
    function = forward_function(module)
    if function is None:
        return {}
    return {name: function.__globals__[name] for name in _table_names(function)}


@cached_weakly
def _table_names(forward: Any) -> tuple[str, ...]:
    values = ((name, forward.__globals__.get(name)) for name in forward.__code__.co_names)
    return tuple(name for name, value in values if isinstance(value, AttentionInterface))


class AttentionTable(AttentionInterface):
    """``table`` as it is at each call, with each function changed by ``change``.

    Args:
        table: The table that is looked into at each call, so a function that others register later is seen.
        change: Gives the function to use in place of one of the table, or of the default that the model passes for
            eager attention; the same function if nothing is to change.
    """

    def __init__(self, table: AttentionInterface, change: Callable[[Callable], Callable]):
        self.table, self.change = table, change

    def over(self, inner: "AttentionTable") -> "AttentionTable":
        """This table's change on top of ``inner``'s."""
        return AttentionTable(inner, self.change)

    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        """The function to call, as in transformers."""
        return self.change(self.table.get_interface(attn_implementation, default))

    def __getitem__(self, name: str) -> Callable:
        return self.change(self.table[name])

    def __setitem__(self, name: str, function: Callable) -> None:
        self.table[name] = function

    def __delitem__(self, name: str) -> None:
        del self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)
