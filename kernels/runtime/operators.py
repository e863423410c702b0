"""How an op appears to ``torch.compile``: as one opaque operator with a gradient, never traced into.

Eager calls go through the op's ``autograd.Function``. While compiling, the public function calls an operator that wraps
the same host functions, because neither Dynamo nor AOTAutograd can trace a launch. To give an op this form, write next
to its ``autograd.Function``

- ``fake_fwd(...)``, which takes the arguments of the host function ``fwd`` and returns empty tensors of the right
  shape, dtype and strides from shapes alone;
- ``fake_bwd(...)``, the same for the host function ``bwd``, registered together by ``opaque_op(name, bwd, fake_bwd)``;
- ``save(ctx, inputs, output)``, which keeps tensors with ``ctx.save_for_backward`` and settings on ``ctx``, and marks
  every output that is only saved (a statistic) as non-differentiable;
- ``differentiate(ctx, *grads)``, which calls the backward operator and returns the gradients of the first inputs. It is
  traced: it may only call operators.

Host functions are annotated. Their arguments are tensors, numbers and strings; they return a tensor, or a tuple of
tensors and Nones whose length is in the annotation.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from itertools import zip_longest
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor


def _returning_tensors(function: Callable) -> Callable:
    """``function`` with outputs that an operator may have: empty for None, and a copy of what shares memory."""

    @wraps(function)
    def wrapped(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        outputs = function(*arguments)
        if torch.is_tensor(outputs):
            return outputs
        like = next(a for a in arguments if torch.is_tensor(a))
        tensors: list[Tensor] = []
        for output in outputs:
            tensor = like.new_empty(0) if output is None else output
            shared = any(tensor.untyped_storage()._cdata == t.untyped_storage()._cdata for t in tensors)
            tensors.append(tensor.clone() if shared else tensor)
        return tuple(tensors)

    return wrapped


def opaque_op(
    name: str,
    run: Callable,
    fake: Callable,
    differentiate: Callable | None = None,
    save: Callable | None = None,
    *,
    waits: bool = False,
) -> Callable:
    """Register ``liger_trainer::name``, which runs ``run`` and looks to the compiler like ``fake``, and return it.

    An operator cannot return None: outputs of ``run`` and ``fake`` that are None become empty tensors.

    Args:
        name: The operator's name.
        run: The host function.
        fake: Returns empty tensors like the outputs of ``run``.
        differentiate: Returns gradients of the first inputs; the ones that are not needed are dropped.
        save: Keeps what ``differentiate`` needs.
        waits: ``run`` reads a number off the device, which a CUDA graph cannot hold. The compiler then makes graphs of
            what comes before and after.
    """
    signature = inspect.signature(run)
    implementation = _returning_tensors(run)
    if signature.return_annotation is not Tensor:
        returns: Any = tuple[(Tensor,) * len(get_args(signature.return_annotation))]
        implementation.__dict__["__signature__"] = signature.replace(return_annotation=returns)
    tags = (torch.Tag.cudagraph_unsafe,) if waits else ()
    op = torch.library.custom_op(f"liger_trainer::{name}", implementation, mutates_args=(), tags=tags)
    op.register_fake(_returning_tensors(fake))
    if differentiate is not None:

        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            given = differentiate(ctx, *grads)
            return tuple(
                grad if needed else None for grad, needed in zip_longest(given, ctx.needs_input_grad, fillvalue=None)
            )

        op.register_autograd(backward, setup_context=save)
    return op


FunctionT = TypeVar("FunctionT", bound=Callable)


def uncompiled(function: FunctionT) -> FunctionT:
    """``torch.compiler.disable`` whose result keeps the function's signature for type checkers."""
    return cast(FunctionT, torch.compiler.disable(function))
