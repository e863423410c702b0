"""Cross-entropy losses as modules: of logits, and of hidden states with the projection inside."""

from typing import Unpack, cast

import torch
from torch import Tensor, nn

from ..kernels.cross_entropy import cross_entropy
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.linear_loss.options import REDUCTIONS, MemoryKeywords, memory_options
from ..kernels.reference import IGNORE_INDEX


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; must be one of {', '.join(map(repr, REDUCTIONS))}")


class LigerCrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy of logits, by ``liger_trainer.kernels.cross_entropy``, with the arguments of torch's module.

    A batch whose labels are all ignored gives 0, where torch's mean gives NaN.

    Args:
        weight: ``[C]``, a weight for each class, or ``None``.
        ignore_index: label of the positions that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: share of the loss that goes to the mean over the classes; 0 with ``weight``.
        z_loss, softcap, logit_scale: as in ``cross_entropy``.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        _check_reduction(reduction)
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale

    def forward(self, input: Tensor, target: Tensor, num_items: Tensor | float | None = None) -> Tensor:
        """The loss, in fp32, or fp64 for fp64 logits.

        Args:
            input: logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``: the classes are the second dimension, as in torch.
            target: class indices ``[]``, ``[N]`` or ``[N, d1, ...]``; probabilities are not supported.
            num_items: divides the sum instead of the mean's divisor.
        """
        logits = input if input.dim() < 2 else input.movedim(1, -1)
        loss = cross_entropy(
            logits, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
            softcap=self.softcap, logit_scale=self.logit_scale, reduction=self.reduction, num_items=num_items,
            class_weights=self.weight,
        )  # fmt: skip
        return cast(Tensor, loss)


class LigerLinearCrossEntropyLoss(nn.Module):
    """``cross_entropy(linear(input), target)`` without the logits, by ``liger_trainer.kernels.linear_cross_entropy``.

    Arguments and state dict are those of ``torch.nn.LinearCrossEntropyLoss``, which torch has since 2.13. To share the
    weight of a model's head, assign it: ``loss.linear.weight = model.lm_head.weight``.

    Args:
        in_features: size of the input's last dimension.
        num_classes: number of classes.
        bias: whether the projection has a bias.
        device, dtype: of the projection.
        weight: ``[num_classes]``, a weight for each class, or ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of the positions that do not count, and cost nothing.
        label_smoothing: share of the loss that goes to the mean over the classes; 0 with ``weight``.
        z_loss, softcap, logit_scale: as in ``cross_entropy``.
        **memory: the fields of ``linear_loss.options.MemoryOptions``, such as ``low_memory``.

    Raises:
        ValueError: an option out of range.
        TypeError: an unknown option.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        **memory: Unpack[MemoryKeywords],
    ) -> None:
        _check_reduction(reduction)
        memory_options("LigerLinearCrossEntropyLoss", memory)
        super().__init__()
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.z_loss, self.softcap, self.logit_scale, self.memory = z_loss, softcap, logit_scale, memory

    def forward(self, input: Tensor, target: Tensor, num_items: Tensor | float | None = None) -> Tensor:
        """The loss, in fp32, or fp64 for fp64 inputs.

        Args:
            input: ``[..., in_features]``.
            target: class indices ``[...]``.
            num_items: divides the sum instead of the mean's divisor.
        """
        loss = linear_cross_entropy(
            input, self.linear.weight, target, self.linear.bias, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
            logit_scale=self.logit_scale, reduction=self.reduction, num_items=num_items, class_weights=self.weight,
            **self.memory,
        )  # fmt: skip
        return cast(Tensor, loss)
