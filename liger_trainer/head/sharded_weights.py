"""Weights that a sharded engine (FSDP2, DeepSpeed ZeRO-3) splits over the ranks: checking and gathering them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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


def gathered_again_in_backward(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """A context in which autograd saves a reference to a ZeRO-3 parameter instead of its current values.

    The caller gathers lm_head's weight for one call only. By the time of backward the values are partitioned again,
    so the saved reference gathers them once more.
    """
    managed = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not managed:
        return nullcontext()

    def pack(tensor: Tensor) -> Tensor | int:
        return next((i for i, p in enumerate(managed) if p is tensor), tensor)

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not is_partitioned(managed[packed]):  # DeepSpeed has gathered it for a module that it saw reading it
            return managed[packed]
        with gathered(managed[packed]) as (whole,):
            return whole.detach().clone()

    return saved_tensors_hooks(pack, unpack)
