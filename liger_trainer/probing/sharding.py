"""Parameters of which a sharded engine (FSDP2, DeepSpeed ZeRO-3) leaves only a part, or nothing, on each rank."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T", Tensor, Tensor | None)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter; ZeRO-3 leaves an empty 1-D tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has the parameter's values spread over the ranks at this moment."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


@contextmanager
def gathered(*parameters: T) -> Iterator[list[T]]:
    """The whole parameters as plain tensors, outside the module calls for which the engine gathers them itself.

    A collective operation: every rank has to enter. The tensors are not to be kept past the context.
    """
    partitioned = [p for p in parameters if p is not None and is_partitioned(p)]
    context = nullcontext()
    if partitioned:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(partitioned)
    with context:
        yield [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def check_materialized(name: str, parameter: Tensor) -> None:
    """Raise ``ValueError`` for a parameter whose whole values are not there, before a kernel reads past its end."""
    if isinstance(parameter, DTensor):
        state = f"a DTensor sharded as {parameter.placements}"
    elif parameter.numel() == 0:
        state = f"empty, shape {tuple(parameter.shape)}"
    else:
        return
    raise ValueError(
        f"{name} is not materialised: it is {state}. A sharded engine gathers a weight only while its own module's "
        "forward runs, so call the module, not its weight, and call the model through the wrapper that the engine made."
    )
