"""Options of the vocabulary losses: their checks, and the form in which kernels and chunk loops take them."""

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..runtime.checks import check_device, check_floating

REDUCTIONS = ("none", "mean", "sum")
LOW_MEMORY_MIB, MOST_LOW_MEMORY_MIB = 64, 256  # for the logits with low_memory: at least, and at most
LOW_MEMORY_COLUMNS = 8192  # in between, of a vocabulary chunk: narrower ones starve GEMMs, and sum dhidden more often
AUTO_MIB = 512.0  # the least that "auto" takes, and what it takes where it does not look at the free memory
NO_STATS, LABEL_STATS, ALL_STATS = 0, 1, 2  # none; the fields of TokenStats; the fields of TokenLogProbs
NUM_STATS = 5  # the fields of TokenLogProbs
Params = tuple[Tensor, Tensor, Tensor | None]  # hidden [N, H], weight [V, H], bias [V]
Gradients = list[Tensor | None]  # of hidden, weight and bias
Wanted = tuple[bool, bool, bool]  # which of hidden, weight and bias need a gradient
NOTHING_WANTED: Wanted = (False, False, False)


class MemoryKeywords(TypedDict, total=False):
    """The fields of ``MemoryOptions`` as keyword arguments of the ops."""

    logits_budget_mib: float | Literal["auto"]
    low_memory: bool


@dataclass(frozen=True)
class MemoryOptions:
    """How much memory a fused vocabulary loss may use. No option changes the result beyond rounding.

    Args:
        logits_budget_mib: memory budget, in MiB, for one chunk of logits. Fewer, larger chunks are faster. The fp32 sum
            of the weight's gradient comes on top; it takes as much memory as a bf16 gradient does. A single chunk needs
            no sum, so the budget is ignored when one chunk needs no more memory than several chunks plus the sum.
            "auto" is 512 MiB, or more while a CUDA device has more free memory (``chunk_sizes.py`` has the rule). Sizes
            of chunks change the order of sums: two runs are bit-equal with a number, and with "auto" under
            ``torch.use_deterministic_algorithms(True)``.
        low_memory: compute the logits twice, in vocabulary chunks of some 8192 columns that take 64 to 256 MiB. This
            needs no sum of the weight's gradient, only one of the gradient of ``hidden`` in fp32. It is slower and
            equally precise.

    Raises:
        ValueError: ``logits_budget_mib`` is neither "auto" nor a number greater than 0.
    """

    logits_budget_mib: float | Literal["auto"] = "auto"
    low_memory: bool = False

    def __post_init__(self) -> None:
        budget = self.logits_budget_mib
        if budget != "auto" and not (isinstance(budget, (int, float)) and budget > 0):
            raise ValueError(f"logits_budget_mib: got {budget!r}; must be greater than 0, or 'auto'")

    @property
    def buffer_mib(self) -> float:
        """Upper bound for the logits of a token chunk; with "auto", the least one."""
        return min(self._budget_mib, LOW_MEMORY_MIB) if self.low_memory else self._budget_mib

    def vocab_chunk_mib(self, num_rows: int, itemsize: int) -> float:
        """Upper bound for the logits ``[num_rows, columns]`` of a vocabulary chunk."""
        if not self.low_memory:
            return self._budget_mib
        wanted = num_rows * LOW_MEMORY_COLUMNS * itemsize / 2**20
        return min(self._budget_mib, MOST_LOW_MEMORY_MIB, max(LOW_MEMORY_MIB, wanted))

    @property
    def _budget_mib(self) -> float:
        return AUTO_MIB if self.logits_budget_mib == "auto" else self.logits_budget_mib

    @property
    def as_numbers(self) -> tuple[float, float]:
        """The options in the form of an operator's arguments; 0 stands for "auto"."""
        return 0.0 if self.logits_budget_mib == "auto" else self.logits_budget_mib, float(self.low_memory)

    @classmethod
    def from_numbers(cls, logits_budget_mib: float, low_memory: float) -> "MemoryOptions":
        """The options of ``as_numbers``."""
        return cls(logits_budget_mib or "auto", bool(low_memory))


MEMORY_FIELDS = tuple(field.name for field in fields(MemoryOptions))


def memory_options(op: str, keywords: MemoryKeywords) -> MemoryOptions:
    """The options given to ``op`` as keywords; ``TypeError`` for an unknown one."""
    for name in keywords:
        if name not in MEMORY_FIELDS:
            raise TypeError(f"{op}: got an unexpected keyword argument {name!r}; must be one of {list(MEMORY_FIELDS)}")
    return MemoryOptions(**keywords)


class LogitTransform(NamedTuple):
    """``z = outer * tanh(inner * x)`` with a soft-cap, ``z = inner * x`` without."""

    inner: float
    outer: float
    has_softcap: bool

    @property
    def keywords(self) -> dict[str, Any]:
        """The same as ``logit_scale`` and ``softcap``; a temperature is part of both."""
        if not self.has_softcap:
            return {"logit_scale": self.inner, "softcap": None}
        return {"logit_scale": self.inner * self.outer, "softcap": self.outer}


def logit_transform(logit_scale: float, softcap: float | None, temperature: float = 1.0) -> LogitTransform:
    """Scale, soft-cap and temperature as two factors; ``ValueError`` for a cap or temperature that is not positive."""
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}; must be greater than 0")
    if softcap is None:
        return LogitTransform(logit_scale / temperature, 1.0, False)
    if softcap <= 0:
        raise ValueError(f"softcap: got {softcap}; must be greater than 0, or None for no soft-cap")
    return LogitTransform(logit_scale / softcap, softcap / temperature, True)


@dataclass(frozen=True)
class HeadOptions:
    """Everything about a vocabulary loss that is not a tensor.

    ``wanted`` says which of hidden, weight and bias need a gradient. With ``ALL_STATS`` the op is ``linear_logprobs``:
    log-probs and entropy are differentiable, and the loss is the negative log-prob.
    """

    transform: LogitTransform
    ignore_index: int
    dtype: torch.dtype  # dtype of the GEMMs
    wanted: Wanted
    memory: MemoryOptions
    stats: int
    reduction: str = "none"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    predictions: bool = False  # whether the most probable tokens are wanted too

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of losses, statistics and sums: fp32, or fp64 where the GEMMs are in fp64."""
        return sum_dtype(self.dtype)

    @property
    def gradients_in_forward(self) -> bool:
        """Whether a loss's gradients are known in forward, up to one factor."""
        return self.reduction != "none" and any(self.wanted)

    @property
    def sums_over_tokens(self) -> bool:
        """Whether a wanted gradient is a sum over all tokens: weight or bias."""
        return self.wanted[1] or self.wanted[2]

    @property
    def by_vocabulary(self) -> bool:
        """Whether forward uses vocabulary chunks.

        For the gradient of hidden alone, a loss uses token chunks even with ``low_memory``: they need no sum then.
        """
        only_hidden = self.wanted[0] and not self.sums_over_tokens
        return self.memory.low_memory and (self.stats == ALL_STATS or not only_hidden)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums of values of ``dtype``: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wanted:
    """``HeadOptions.wanted``; call it outside the autograd Function, in which autograd is already switched off."""
    if not torch.is_grad_enabled():
        return NOTHING_WANTED
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def check_labels_form(labels: Tensor, like_name: str, like: Tensor) -> None:
    """Check shape, dtype and device of ``labels`` against the tensor whose last dimension they drop."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: got dtype {labels.dtype}; must be torch.int64 or torch.int32")
    if labels.shape != like.shape[:-1]:
        expected = f"{like_name}.shape[:-1] = {tuple(like.shape[:-1])}"
        raise ValueError(f"labels: got shape {tuple(labels.shape)}; must be {expected}")
    check_device("labels", labels, like)


def check_num_items(num_items: Tensor | float | None) -> None:
    """Raise ``ValueError`` unless ``num_items`` is a positive number, a tensor of one element, or ``None``."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: got a tensor of shape {tuple(num_items.shape)}; must hold one element")
    elif num_items is not None and not num_items > 0:
        raise ValueError(f"num_items: got {num_items}; must be greater than 0")


def check_loss_args(
    labels: Tensor, label_smoothing: float, z_loss: float, reduction: str, num_items: Tensor | float | None,
    token_weights: Tensor | None,
) -> None:  # fmt: skip
    """Raise ``ValueError`` or ``TypeError`` for a loss option outside its range."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}; must be in [0, 1]")
    if z_loss < 0.0:
        raise ValueError(f"z_loss: got {z_loss}; must be at least 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; must be one of {', '.join(map(repr, REDUCTIONS))}")
    check_num_items(num_items)
    if token_weights is None:
        return
    check_floating("token_weights", token_weights)
    if token_weights.shape != labels.shape:
        expected = f"labels.shape = {tuple(labels.shape)}"
        raise ValueError(f"token_weights: got shape {tuple(token_weights.shape)}; must be {expected}")
    check_device("token_weights", token_weights, labels)
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("token_weights: got a tensor that requires grad; must be constant, as .detach() makes it")


def check_linear_args(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check the operands of a vocabulary projection and return the dtype of its GEMMs, which autocast may set."""
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; must be [V, H] with V > 0")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        expected = f"[..., H] with H = weight.shape[1] = {weight.shape[1]}"
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}; must be {expected}")
    check_labels_form(labels, "hidden", hidden)
    if bias is not None and bias.shape != weight.shape[:1]:
        expected = f"weight.shape[:1] = {tuple(weight.shape[:1])}"
        raise ValueError(f"bias: got shape {tuple(bias.shape)}; must be {expected}")
    parameters = [("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in parameters:
        check_device(name, tensor, hidden)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    for name, tensor in parameters:
        if tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name}: got dtype {tensor.dtype}; must be hidden.dtype = {hidden.dtype}, unless under autocast"
            )
    return hidden.dtype


def on_host_or_device(num_items: Tensor | float | None, device: torch.device) -> Tensor | float | None:
    """``num_items`` as a Python number or a one-element tensor on ``device``, without waiting for an accelerator."""
    if not isinstance(num_items, Tensor):
        return num_items
    if num_items.device.type == "cpu" and device.type != "cpu":
        return float(num_items)
    return num_items.detach().to(device)
