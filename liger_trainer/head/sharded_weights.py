"""Weights that a sharded engine (FSDP2, DeepSpeed ZeRO-3) splits over the ranks: checking and gathering them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T", Tensor, Tensor | None)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 currently has the parameter's values split over the ranks."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


@contextmanager
def gathered(*parameters: T) -> Iterator[list[T]]:
    """The whole parameters as plain tensors, outside the module calls for which the engine gathers them itself.

    This is a collective operation, so every rank must enter. Do not keep the tensors after the context ends.
    """
    partitioned = [p for p in parameters if p is not None and is_partitioned(p)]
    context = nullcontext()
    if partitioned:
        from deepspeed import zero

        context = zero.GatheredParameters(partitioned)
    with context:
        yield [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def check_materialized(name: str, parameter: Tensor) -> None:
    """Check that the parameter's whole values are on this rank, before a kernel reads past its end.

    Raises:
        ValueError: The parameter is sharded or empty.
    """
    if isinstance(parameter, DTensor):
        state = f"a DTensor sharded as {parameter.placements}"
    elif parameter.numel() == 0:
        state = f"an empty tensor of shape {tuple(parameter.shape)}"
    else:
        return
    raise ValueError(
        f"{name}: got {state}; must be materialised. A sharded engine gathers a weight only while the forward of its "
        "own module runs: call the module, do not use its weight directly, and call the model through the wrapper that "
        "the engine made"
    )
