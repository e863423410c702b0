"""What becomes of class weights and token scaling: token weights. And the z-loss as a number of its own."""

import torch
from torch import Tensor

from .. import reference
from ..runtime.checks import check_device, check_floating


def check_class_weights(class_weights: Tensor | None, vocab_size: int, label_smoothing: float, like: Tensor) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``class_weights`` is ``None`` or fits the vocabulary."""
    if class_weights is None:
        return
    check_floating("class_weights", class_weights)
    if tuple(class_weights.shape) != (vocab_size,):
        raise ValueError(f"class_weights: got shape {tuple(class_weights.shape)}; must be {(vocab_size,)}")
    check_device("class_weights", class_weights, like)
    if label_smoothing:
        raise ValueError(
            f"class_weights: got some with label_smoothing {label_smoothing}; must be None, or 0 smoothing"
        )


def weighted_by_class(
    class_weights: Tensor, labels: Tensor, token_weights: Tensor | None, num_items: Tensor | float | None,
    reduction: str, ignore_index: int,
) -> tuple[Tensor, Tensor | float | None]:  # fmt: skip
    """Class weights as ``(token_weights, num_items)``: the mean divides by the sum of the labels' weights, as in torch.

    Labels out of range get any weight; the op finds them.
    """
    valid = labels != ignore_index
    wide = class_weights.detach().to(torch.promote_types(class_weights.dtype, torch.float32))
    of_label = wide[labels.clamp(0, class_weights.shape[0] - 1)].masked_fill(~valid, 0.0)
    if reduction == "mean" and num_items is None:
        total = of_label.sum()
        num_items = total + (total == 0)  # without weight the sum of the losses is 0 too
    return of_label if token_weights is None else of_label * token_weights, num_items


def scaled_by_probability(log_probs: Tensor, token_weights: Tensor | None) -> Tensor:
    """Token weights times the probabilities of the labels."""
    probs = log_probs.detach().exp()
    return probs if token_weights is None else probs * token_weights


def reduced_z_loss(
    lse: Tensor, labels: Tensor, z_loss: float, token_weights: Tensor | None, reduction: str,
    num_items: Tensor | float | None, ignore_index: int,
) -> Tensor:  # fmt: skip
    """The z-loss that a loss contains, reduced as the loss is; detached, from ``lse`` of the labels' shape."""
    valid = labels != ignore_index
    values = z_loss * lse.detach().square()
    if token_weights is not None:
        values = values * token_weights.to(values.dtype)
    return reference.reduce_loss(values.where(valid, 0.0), valid, reduction, num_items)
