"""The loss of a Medusa head: plain, or fused so that nothing of one head is alive while the next one is computed.

The fused loss of a head runs its residual blocks and ``linear_cross_entropy`` on detached hidden states inside its own
forward, and takes the gradients there. What stays until backward is the gradient of the head's parameters; logits and
activations are freed before the next head starts. The gradient with respect to the hidden states, which all heads
share, is summed in one fp32 buffer (``HiddenGradient``), which enters the autograd graph through ``open_gate``.

Where gradients are accumulated over micro-batches, those of the parameters exist twice from forward to backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..head.fused_head import IGNORE_INDEX
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.linear_loss.scale_gradients import graph_is_kept, scale_gradients
from ..kernels.runtime.launch import use_triton

# In fp16, the largest factor that gradients carry from forward to backward, like a loss scale of that size. No larger:
# a GradScaler lowers its own scale where gradients overflow, but knows nothing of this one.
MAX_LATE_SCALE = 2.0**10
HeadLoss = Callable[..., Tensor]


def residual_blocks(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``h + silu(R h + b)``, one block after the other.

    Args:
        hidden: ``[..., H]``.
        weight: ``[L * H, H]``, the ``R`` of ``L`` blocks below one another.
        bias: ``[L * H]``.
    """
    width = hidden.shape[-1]
    for r, b in zip(weight.split(width), bias.split(width), strict=True):
        hidden = hidden + F.silu(F.linear(hidden, r, b))
    return hidden


def plain_head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The sum of the cross-entropies of materialised logits in fp32: what an unpatched causal LM computes.

    Args:
        hidden: ``[N, H]``, the output of a head's residual blocks.
        weight: ``[V, H]``.
        labels: ``[N]``, aligned with ``hidden``; -100 counts nothing.
        logit_scale: factor of the logits.
        softcap: then ``logits = softcap * tanh(logits / softcap)``, unless ``None``.

    Returns:
        0-d; 0 where no label counts.
    """
    logits = F.linear(hidden, weight)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


class HiddenGradient:
    """The gradient with respect to the hidden states, summed over the heads while they run; ``[..., H]`` in fp32."""

    def __init__(self, hidden: Tensor):
        self.total = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        self.upstream: Tensor | None = None  # of the sum of the heads' losses, known in backward


class _Gate(torch.autograd.Function):
    """An empty tensor that stands for the hidden states; its backward hands out what the heads have summed."""

    @staticmethod
    def forward(ctx, hidden, shared):
        ctx.shared, ctx.dtype = shared, hidden.dtype
        return hidden.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        shared = ctx.shared
        if graph_is_kept():
            return (shared.total * shared.upstream).to(ctx.dtype), None
        total, shared.total = shared.total, None
        return total.mul_(shared.upstream).to(ctx.dtype), None


@torch.compiler.disable
def open_gate(hidden: Tensor, shared: HiddenGradient) -> Tensor:
    """An empty tensor to pass to each head in the place of ``hidden``: it is what a head's loss depends on.

    The upstream gradients of all heads' losses must be equal, as those of a sum are.
    """
    return _Gate.apply(hidden, shared)


class HeadCall:
    """One head's call: what it is to compute, and the ``loss`` it has computed.

    Travels in one object because FSDP2 casts every floating-point tensor that enters or leaves a unit to the compute
    dtype: ``num_items`` and ``loss`` would be rounded to bf16. It looks into dataclasses, too, so this is none.

    Args:
        labels: ``[...]``, aligned with the hidden states: position t holds the token that the head predicts there.
        num_items: divisor of the sum of the cross-entropies, the head's weight in the total included.
        head_loss: computes the sum of the cross-entropies from ``(hidden [N, H], weight [V, H], labels [N])`` and
            ``options`` through ordinary autograd. ``None``: fused.
        options: keyword arguments of ``head_loss``; of ``linear_cross_entropy``, where fused.
        shared: sum of the hidden states' gradient, where fused and wanted.
    """

    def __init__(
        self,
        labels: Tensor,
        num_items: Tensor | float,
        head_loss: HeadLoss | None,
        options: dict[str, Any],
        shared: HiddenGradient | None,
    ):
        self.labels, self.num_items = labels, num_items
        self.head_loss, self.options, self.shared = head_loss, options, shared
        self.loss: Tensor | None = None
        self._differentiable, self._begun = torch.is_grad_enabled(), False

    def begin(self) -> bool:
        """Whether the head runs for the first time, not again in backward to compute its activations anew.

        Raises:
            ValueError: gradients were on where the call was made and are off in the head. Reentrant activation
                checkpointing does that, and passes on the gradients of a module's outputs only: ``loss`` is none.
        """
        if self._differentiable and not torch.is_grad_enabled():
            raise ValueError(
                "use_reentrant=True: a Medusa head ran without gradients inside a training forward, as reentrant "
                "activation checkpointing of the head does, and its loss would be lost for backward. Checkpoint the "
                "heads with use_reentrant=False, or not at all: their fused loss keeps no activations"
            )
        first, self._begun = not self._begun, True
        return first


class _FusedHeadLoss(torch.autograd.Function):
    """A head's loss from detached hidden states, its gradients taken in forward.

    ``first``: the call's first run. A second one, for activation checkpointing, saves the same gradients of the
    parameters for backward; that of the hidden states is in the sum already.
    """

    @staticmethod
    def forward(ctx, gate, hidden, call, first, *parameters):
        ctx.set_materialize_grads(False)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            x = hidden.detach().requires_grad_(call.shared is not None and first)
            leaves = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
            loss = _loss(x, leaves, call)
            wanted = [t for t in (x, *leaves) if t.requires_grad]
            late = _late_scale(hidden, call)
            grads = iter(torch.autograd.grad(loss, wanted, late))
        if x.requires_grad:
            grad = next(grads)
            call.shared.total.add_(grad if late is None else grad.float() / late)
        ctx.shared, ctx.late = call.shared, late
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.save_for_backward(*(next(grads) if p.requires_grad else None for p in parameters))
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if upstream is None:
            return (None,) * (4 + len(ctx.dtypes))
        if ctx.shared is not None:
            ctx.shared.upstream = upstream
        scale = upstream.float() if ctx.late is None else upstream.float() / ctx.late
        gate_grad = upstream.new_empty(0) if ctx.shared is not None else None
        return gate_grad, None, None, None, *_scaled(ctx.saved_tensors, ctx.dtypes, scale)


def _as_it_is(tensor: Tensor) -> Tensor:
    """What is saved inside a head's forward is used there: not for a checkpoint to drop, nor to be offloaded."""
    return tensor


def _loss(hidden: Tensor, parameters: list[Tensor], call: HeadCall) -> Tensor:
    residual_weight, residual_bias, weight = parameters
    x = residual_blocks(hidden, residual_weight, residual_bias)
    return linear_cross_entropy(x, weight, call.labels, num_items=call.num_items, **call.options)


def _late_scale(hidden: Tensor, call: HeadCall) -> Tensor | None:
    """In fp16 the factor by which gradients are kept too large until backward, where a loss scale comes in.

    The loss divides by the number of tokens, and without the loss scale gradients that small would underflow. Up to
    ``MAX_LATE_SCALE``: undivided, sums over thousands of tokens would overflow.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype != torch.float16:
        return None
    return (
        torch.as_tensor(call.num_items, dtype=torch.float32, device=hidden.device).reshape(()).clamp(max=MAX_LATE_SCALE)
    )


def _scaled(grads: tuple[Tensor | None, ...], dtypes: list[torch.dtype], scale: Tensor) -> list[Tensor | None]:
    if any(grad is not None and use_triton(grad) for grad in grads):
        return scale_gradients(list(grads), dtypes, scale, keep=graph_is_kept())
    return [None if grad is None else (grad * scale).to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


@torch.compiler.disable  # gradients inside a forward are no graph that it could trace
def fused_head_loss(
    hidden: Tensor, gate: Tensor | None, call: HeadCall, parameters: list[Tensor], first: bool
) -> Tensor:
    """A head's share of the loss, ``sum of cross-entropies / call.num_items``, in fp32, without the logits.

    Args:
        hidden: ``[..., H]``, detached: gradients go through ``gate`` into ``call.shared``.
        gate: from ``open_gate``, or ``None`` where the hidden states want no gradient.
        call: with ``head_loss=None``.
        parameters: ``residual_weight`` ``[L * H, H]``, ``residual_bias`` ``[L * H]`` and ``weight`` ``[V, H]``.
        first: what ``call.begin()`` said.
    """
    if torch.is_grad_enabled() and (gate is not None or any(p.requires_grad for p in parameters)):
        return _FusedHeadLoss.apply(gate, hidden, call, first, *parameters)
    with torch.no_grad():
        return _loss(hidden, parameters, call)


class _TieEmpty(torch.autograd.Function):
    """``(loss, empty tensor)`` from one node."""

    @staticmethod
    def forward(ctx, loss, dtype):
        ctx.set_materialize_grads(False)
        return loss.view_as(loss), loss.new_empty(0, dtype=dtype)

    @staticmethod
    def backward(ctx, grad, _):
        return grad, None


def tie_empty(loss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``loss`` and an empty tensor of ``dtype`` that leave one autograd node.

    Sharded engines gather a module's weights for backward by a hook on its outputs. With the empty tensor as the
    module's output and ``loss + empty.sum()`` differentiated, that hook runs before the gradients of ``loss``.
    """
    return _TieEmpty.apply(loss, dtype)
