"""Arguments the loss ops share: what is allowed, and the form in which the kernels take them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.checks import check_device, check_floating

REDUCTIONS = ("none", "mean", "sum")


class LogitTransform(NamedTuple):
    """``z = outer * tanh(inner * x)`` with a soft-cap, ``z = inner * x`` without."""

    inner: float
    outer: float
    has_softcap: bool


def logit_transform(logit_scale: float, softcap: float | None, temperature: float = 1.0) -> LogitTransform:
    """Scale, soft-cap and temperature as two factors; ``ValueError`` for a cap or temperature that is not > 0."""
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}; must be greater than 0")
    if softcap is None:
        return LogitTransform(logit_scale / temperature, 1.0, False)
    if softcap <= 0:
        raise ValueError(f"softcap: got {softcap}; must be greater than 0, or None for no soft-cap")
    return LogitTransform(logit_scale / softcap, softcap / temperature, True)


def check_labels_form(labels: Tensor, like_name: str, like: Tensor) -> None:
    """Shape, dtype and device of ``labels`` against the tensor whose last dimension they drop."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: dtype {labels.dtype}; must be torch.int64 or torch.int32")
    if labels.shape != like.shape[:-1]:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)}; must be {like_name}.shape[:-1] = {tuple(like.shape[:-1])}"
        )
    check_device("labels", labels, like)


def check_loss_args(
    labels: Tensor, label_smoothing: float, z_loss: float, reduction: str, num_items, token_weights: Tensor | None
) -> None:
    """``ValueError`` or ``TypeError`` for loss options outside their range."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}; must be in [0, 1]")
    if z_loss < 0.0:
        raise ValueError(f"z_loss: got {z_loss}; must be at least 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; must be one of {', '.join(map(repr, REDUCTIONS))}")
    if torch.is_tensor(num_items):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: tensor of shape {tuple(num_items.shape)}; must hold one element")
    elif num_items is not None and not num_items > 0:
        raise ValueError(f"num_items: got {num_items}; must be greater than 0")
    if token_weights is None:
        return
    check_floating("token_weights", token_weights)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights: shape {tuple(token_weights.shape)}; must be labels.shape = {tuple(labels.shape)}"
        )
    check_device("token_weights", token_weights, labels)
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("token_weights: requires grad; weights are constants here, pass token_weights.detach()")


def check_linear_args(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logits_budget_mib: float
) -> torch.dtype:
    """Check the operands of a vocabulary projection and return the dtype its GEMMs run in, autocast included."""
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}; must be [V, H]")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: shape {tuple(hidden.shape)}; its last dimension must be weight.shape[1] = {weight.shape[1]}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: shape {tuple(weight.shape)}; the vocabulary must not be empty")
    check_labels_form(labels, "hidden", hidden)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}; must be weight.shape[:1] = {tuple(weight.shape[:1])}")
    if not logits_budget_mib > 0:
        raise ValueError(f"logits_budget_mib: got {logits_budget_mib}; must be greater than 0")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_device(name, tensor, hidden)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"hidden: dtype {hidden.dtype}, {name}: dtype {tensor.dtype}; must be equal, or run under autocast"
            )
    return hidden.dtype


def on_host_or_device(num_items: Tensor | float | None, device: torch.device) -> Tensor | float | None:
    """``num_items`` as a Python number or a one-element tensor on ``device``; an accelerator is never waited for."""
    if not torch.is_tensor(num_items):
        return num_items
    if num_items.device.type == "cpu" and device.type != "cpu":
        return float(num_items)
    return num_items.detach().to(device)
