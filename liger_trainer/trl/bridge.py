"""Our per-token log-probabilities behind TRL's own fused LM head, for models that ``use_liger`` patched.

TRL's trainers call ``model(..., fused_lm_head=True)``, whose forward ends in ``_ChunkedLogProbFunction.apply``. That
name in ``trl.trainer.utils`` becomes a dispatcher: while the forward of a patched model is running it computes with
``linear_logprobs``, otherwise it is TRL's own function. The loss math, the metrics and every other model stay TRL's.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..kernels.linear_logprobs import Speculation, linear_logprobs
from ..patching import add_hooks, core_model, patch_state
from ..probing.sharding import check_materialized, gathered, is_partitioned
from ..report import Applied


@dataclass
class _Head:
    """One model's settings behind TRL's head; its methods are forward hooks."""

    options: dict[str, Any]
    speculation: Speculation = field(default_factory=Speculation)
    calls_fused: int = 0

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Make this head the running one for a forward with ``fused_lm_head=True``."""
        _Dispatcher.running = self if kwargs.get("fused_lm_head") else None

    def after_forward(self, module: nn.Module, args: tuple, output) -> None:
        """No head is running any more."""
        _Dispatcher.running = None


class _Dispatcher:
    """Stands where TRL looks up its autograd function."""

    running: _Head | None = None

    def __init__(self, original):
        self.original = original

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """TRL's signature and outputs: log-probs, entropy, log-sum-of-squared-probs, mean logits, is-top-1."""
        head = self.running
        if head is None:
            return self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        head.calls_fused = 1 if torch.compiler.is_compiling() else head.calls_fused + 1
        check_materialized("lm_head.weight", weight)
        with _gathered_again_in_backward(weight, bias):
            out = linear_logprobs(
                hidden, weight, targets, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                speculation=head.speculation, **head.options,
            )  # fmt: skip
        optional = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return out.log_probs, *(getattr(out, name) if name in outputs else None for name in optional)


def _gathered_again_in_backward(*parameters: Tensor | None):
    """A context in which saving a ZeRO-3 parameter for backward saves whose it is, not where its values are now.

    TRL's forward gathers lm_head's weight for this one call: by the time of backward its values are partitioned again.
    """
    managed = [p for p in parameters if hasattr(p, "ds_id")]
    if not managed:
        return nullcontext()

    def pack(tensor: Tensor) -> Tensor | int:
        return next((i for i, p in enumerate(managed) if p is tensor), tensor)

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not is_partitioned(managed[packed]):  # DeepSpeed has it there for a module that it saw reading it
            return managed[packed]
        with gathered(managed[packed]) as (whole,):
            return whole.detach().clone()

    return saved_tensors_hooks(pack, unpack)


def attach(model: nn.Module) -> None:
    """Use ``linear_logprobs`` behind TRL's fused head of ``model``, which ``apply_liger`` has patched."""
    import trl.trainer.utils as trl_utils

    state, core = patch_state(model), core_model(model)
    if state.trl_head is not None:
        return
    if not isinstance(trl_utils._ChunkedLogProbFunction, _Dispatcher):
        trl_utils._ChunkedLogProbFunction = _Dispatcher(trl_utils._ChunkedLogProbFunction)
    head = state.trl_head = _Head(state.config.options_of("fused_loss"))
    add_hooks(core, state, head.before_forward, head.after_forward)
    variant = "linear_logprobs, behind TRL's fused head"
    state.report.applied.append(Applied("fused_loss", "", type(core).__name__, variant))
