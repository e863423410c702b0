"""How an op appears to ``torch.compile``: as one opaque operator with a gradient, never traced into.

Eager calls go through the op's ``autograd.Function``. Where the public function finds ``torch.compiler.is_compiling()``
it calls instead an operator that wraps the same host functions, since neither Dynamo nor AOTAutograd can trace the
launcher. To give an op this form, write next to its ``autograd.Function``

- ``fwd(...)``, typed as ``torch.library.custom_op`` wants it: tensors, numbers and strings in; a tensor or a tuple of
  tensors out, no output sharing memory with another or with an input. What backward needs is among the outputs. An
  output that is sometimes absent is empty then (``or_empty``), because an operator cannot return None;
- ``fake_fwd(...)``, which gives empty tensors of the right shape, dtype and strides from shapes alone;
- the same two for backward, registered with ``opaque_op(name, bwd, fake_bwd)``;
- ``save(ctx, inputs, output)``, which keeps tensors with ``ctx.save_for_backward`` and settings on ``ctx``;
- ``differentiate(ctx, *grads)``, which calls the backward operator and gives one gradient or None an input.
  It is traced: it may only call operators.

Every output that is no result (a saved statistic) must be marked non-differentiable in ``save``.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def opaque_op(
    name: str,
    run: Callable,
    fake: Callable,
    differentiate: Callable | None = None,
    save: Callable | None = None,
    *,
    waits: bool = False,
) -> Callable:
    """Register ``liger_trainer::name``, which runs ``run`` and is seen by the compiler as ``fake``, and return it.

    ``waits``: the host reads a number off the device in it, which a CUDA graph cannot hold; the compiler then makes
    graphs of what is before and after.
    """
    tags = (torch.Tag.cudagraph_unsafe,) if waits else ()
    op = torch.library.custom_op(f"liger_trainer::{name}", run, mutates_args=(), tags=tags)
    op.register_fake(fake)
    if differentiate is not None:
        op.register_autograd(differentiate, setup_context=save)
    return op


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """``t``, or an empty tensor in place of None."""
    return like.new_empty(0) if t is None else t
