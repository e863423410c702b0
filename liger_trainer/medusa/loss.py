"""The loss of a Medusa head: plain, or fused so that each head's activations are freed before the next head runs.

The fused loss runs a head's residual blocks and ``linear_cross_entropy`` on detached hidden states and computes the
gradients in its forward. Logits and activations are freed there; only the gradients of the head's parameters stay until
backward. All heads share the hidden states, so their gradients with respect to these are summed in one fp32 buffer
(``HiddenGradient``), which joins the autograd graph through ``open_gate``.

With gradient accumulation over micro-batches, the gradients of the parameters exist twice from forward to backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.linear_loss.gradients import graph_is_kept, scale_gradients
from ..kernels.reference import IGNORE_INDEX

# In fp16, the largest factor that gradients carry from forward to backward, like a loss scale of that size. It is kept
# small because a GradScaler lowers its own scale when gradients overflow, but does not know about this one.
MAX_LATE_SCALE = 2.0**10
HeadLoss = Callable[..., Tensor]


def residual_blocks(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply ``h + silu(R h + b)`` once per block.

    Args:
        hidden: ``[..., H]``.
        weight: ``[L * H, H]``, the matrices ``R`` of the ``L`` blocks, stacked.
        bias: ``[L * H]``.

    Returns:
        ``[..., H]``.
    """
    width = hidden.shape[-1]
    for r, b in zip(weight.split(width), bias.split(width), strict=True):
        hidden = hidden + F.silu(F.linear(hidden, r, b))
    return hidden


def plain_head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Sum the cross-entropies of materialised fp32 logits, as an unpatched causal LM does.

    Args:
        hidden: ``[N, H]``, the output of a head's residual blocks.
        weight: ``[V, H]``.
        labels: ``[N]``, aligned with ``hidden``; -100 is ignored.
        logit_scale: Factor of the logits.
        softcap: Unless ``None``, ``logits = softcap * tanh(logits / softcap)`` after scaling.

    Returns:
        A 0-d tensor, 0 if every label is ignored.
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
        self.total: Tensor | None = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        self.upstream: Tensor | None = None  # gradient of the sum of the heads' losses, known in backward


class _Gate(torch.autograd.Function):
    """An empty tensor that represents the hidden states; its backward returns what the heads have summed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shared: HiddenGradient) -> Tensor:
        ctx.shared, ctx.dtype = shared, hidden.dtype
        return hidden.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        if graph_is_kept():
            return (shared.total * shared.upstream).to(ctx.dtype), None
        total, shared.total = shared.total, None
        return total.mul_(shared.upstream).to(ctx.dtype), None


@torch.compiler.disable()
def open_gate(hidden: Tensor, shared: HiddenGradient) -> Tensor:
    """Make the empty tensor that each head's loss depends on, in place of ``hidden``.

    All heads' losses must get the same upstream gradient, as the terms of a sum do.
    """
    return _Gate.apply(hidden, shared)


class HeadCall:
    """The arguments of one head's call, and the loss that it computes.

    FSDP2 casts every floating-point tensor that enters or leaves a unit to the compute dtype, which would round
    ``num_items`` and ``loss`` to bf16. It does not look into this object. It does look into dataclasses, so this is not
    one.

    Args:
        labels: ``[...]``, aligned with the hidden states: position t holds the token that the head predicts there.
        num_items: Divisor of the sum of the cross-entropies, with the head's weight in the total included.
        head_loss: Computes the sum of the cross-entropies from ``(hidden [N, H], weight [V, H], labels [N])`` and
            ``options`` through ordinary autograd. ``None``: the fused loss.
        options: Keyword arguments of ``head_loss``, or of ``linear_cross_entropy`` for the fused loss.
        shared: Sum of the gradients of the hidden states. ``None`` if these need no gradient or the loss is not fused.
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

    def pop_loss(self) -> Tensor:
        """Return the loss and drop it here: activation checkpointing keeps this object and would keep the graph."""
        loss, self.loss = self.loss, None
        assert loss is not None, "the head's forward stores a loss"
        return loss

    def begin(self) -> bool:
        """Whether this is the head's first run, and not a recomputation of its activations in backward.

        Raises:
            ValueError: Gradients were enabled when the call was made and are disabled in the head, which means
                reentrant activation checkpointing. It passes on gradients of a module's outputs only, and ``loss`` is
                not one.
        """
        if self._differentiable and not torch.is_grad_enabled():
            raise ValueError(
                "use_reentrant=True: a Medusa head ran without gradients in a training forward, which reentrant "
                "activation checkpointing causes, so backward would miss its loss. Checkpoint the heads with "
                "use_reentrant=False, or do not checkpoint them: their fused loss keeps no activations"
            )
        first, self._begun = not self._begun, True
        return first


class _FusedHeadLoss(torch.autograd.Function):
    """A head's loss from detached hidden states, with the gradients computed in forward.

    ``first`` marks the call's first run. A second run, for activation checkpointing, saves the same gradients of the
    parameters for backward, but the gradient of the hidden states is already in the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor | None, hidden: Tensor, call: HeadCall, first: bool, *parameters: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        shared = call.shared if first else None
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            x = hidden.detach().requires_grad_(shared is not None)
            leaves = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
            loss = _loss(x, leaves, call)
            wanted = [t for t in (x, *leaves) if t.requires_grad]
            late = _late_scale(hidden, call)
            grads = iter(torch.autograd.grad(loss, wanted, late))
        if shared is not None:
            grad = next(grads)
            assert shared.total is not None, "the sum is taken only in backward, after all heads have run"
            shared.total.add_(grad if late is None else grad.float() / late)
        ctx.shared, ctx.late = call.shared, late
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.save_for_backward(*(next(grads) if p.requires_grad else None for p in parameters))
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (4 + len(ctx.dtypes))
        if ctx.shared is not None:
            ctx.shared.upstream = upstream
        scale = upstream.float() if ctx.late is None else upstream.float() / ctx.late
        gate_grad = upstream.new_empty(0) if ctx.shared is not None else None
        grads = scale_gradients(ctx.saved_tensors, ctx.dtypes, scale, keep=graph_is_kept())
        return gate_grad, None, None, None, *grads


def _as_it_is(tensor: Tensor) -> Tensor:
    """Keep saved tensors as they are: a head's forward uses them itself, so checkpoints must not drop them."""
    return tensor


def _loss(hidden: Tensor, parameters: Sequence[Tensor], call: HeadCall) -> Tensor:
    residual_weight, residual_bias, weight = parameters
    x = residual_blocks(hidden, residual_weight, residual_bias)
    loss = linear_cross_entropy(x, weight, call.labels, num_items=call.num_items, **call.options)
    assert isinstance(loss, Tensor), "without the option that adds statistics, the op returns the loss alone"
    return loss


def _late_scale(hidden: Tensor, call: HeadCall) -> Tensor | None:
    """In fp16, the factor by which forward enlarges gradients and backward divides them again; else ``None``.

    The loss is divided by the number of tokens, and gradients that small would underflow before the loss scale is
    applied in backward. The factor is at most ``MAX_LATE_SCALE``, because undivided sums over thousands of tokens would
    overflow.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype != torch.float16:
        return None
    return (
        torch.as_tensor(call.num_items, dtype=torch.float32, device=hidden.device).reshape(()).clamp(max=MAX_LATE_SCALE)
    )


@torch.compiler.disable()  # the compiler cannot trace gradients that are computed inside a forward
def fused_head_loss(
    hidden: Tensor, gate: Tensor | None, call: HeadCall, parameters: Sequence[Tensor], first: bool
) -> Tensor:
    """Compute a head's share of the loss without materialising the logits.

    Args:
        hidden: ``[..., H]``, detached: gradients go through ``gate`` into ``call.shared``.
        gate: From ``open_gate``, or ``None`` if the hidden states need no gradient.
        call: With ``head_loss=None``.
        parameters: ``residual_weight`` ``[L * H, H]``, ``residual_bias`` ``[L * H]`` and ``weight`` ``[V, H]``.
        first: The result of ``call.begin()``.

    Returns:
        ``sum of cross-entropies / call.num_items``, 0-d, in fp32.
    """
    if torch.is_grad_enabled() and (gate is not None or any(p.requires_grad for p in parameters)):
        return _FusedHeadLoss.apply(gate, hidden, call, first, *parameters)
    with torch.no_grad():
        return _loss(hidden, parameters, call)


class _TieEmpty(torch.autograd.Function):
    """``(loss, empty tensor)`` from one autograd node."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return loss.view_as(loss), loss.new_empty(0, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


def tie_empty(loss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``loss`` and an empty tensor of ``dtype`` as outputs of one autograd node.

    Sharded engines gather a module's weights for backward in a hook on the module's outputs. If the module returns the
    empty tensor and ``loss + empty.sum()`` is differentiated, that hook runs before the gradient of ``loss``.
    """
    return _TieEmpty.apply(loss, dtype)
