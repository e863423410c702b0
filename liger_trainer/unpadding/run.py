"""Running a decoder stack on a row of a batch's real tokens."""

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .layout import Layout
from .mixers import remember_bounds


class Positions(enum.Enum):
    """The positions a model uses if none are given."""

    COLUMN = "column of the batch"
    COUNT = "number of real tokens before"
    AFTER_PAD = "number of real tokens before, from the id of padding on"  # fairseq's models, as RoBERTa


def takes_all(layout: Layout, given: dict[str, Any]) -> bool:
    """Whether each tensor among the arguments has a place for each token, or there are as many as rows."""
    tensors = (value for value in given.values() if torch.is_tensor(value))
    return all(tensor.dim() == 0 or layout.takes(tensor) for tensor in tensors)


def run_unpadded(
    original: Callable, stack: nn.Module, given: dict[str, Any], layout: Layout, positions: Positions
) -> Any:
    """Run ``original`` on a row of the batch's real tokens.

    Args:
        original: The class's forward of ``stack``.
        stack: The decoder stack.
        given: The arguments for the padded batch, by name.
        layout: Where the tokens go.
        positions: Which positions the model would use if none are given.

    Returns:
        What ``original`` returns, with tensors in the shape of the batch, zero at padding.
    """
    row = {
        name: layout.gather(value) if torch.is_tensor(value) and value.dim() else value
        for name, value in given.items()
        if name != "attention_mask"
    }
    if row.get("position_ids") is None:
        row["position_ids"] = _positions(stack, layout, positions)
    remember_bounds(row["position_ids"], layout.bounds)
    output = original(stack, **{**row, "attention_mask": layout.bounds, "use_cache": False})
    return tree_map(lambda value: layout.scatter(value) if torch.is_tensor(value) else value, output)


def _positions(stack: Any, layout: Layout, positions: Positions) -> Tensor:
    if positions is Positions.COLUMN:
        return layout.slots
    if positions is Positions.COUNT:
        return layout.counted
    pad = getattr(stack.config, "pad_token_id", None) or 0
    trailing = torch.arange(layout.total, device=layout.row.device) >= layout.real
    return torch.where(trailing, pad, layout.counted + pad + 1)
