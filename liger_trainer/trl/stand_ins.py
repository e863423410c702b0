"""What TRL's trainers get in place of logits ``[batch, tokens, vocabulary]``: tensors whose rows are the same tokens.

A trainer slices, masks and flattens logits by rows, then hands them to few functions. Rows of a stand-in are taken in
the same way, and those functions find in it what they need, computed already. Anything else that would read values is
an error. The model's own scale and soft-cap leave a stand-in as it is, because the op has applied them.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.reference import IGNORE_INDEX, TokenLogProbs

# What models, engines and trainers do with rows.
_ROWS = frozenset((
    "__getitem__", "__get__", "__set__", "__len__", "__hash__", "__repr__", "__format__", "alias", "as_subclass",
    "chunk", "clone", "contiguous", "cpu", "cuda", "detach", "dim", "get_device", "is_contiguous", "is_floating_point",
    "nelement", "numel", "register_hook", "requires_grad_", "reshape", "size", "split", "stride", "to", "view",
))  # fmt: skip
_TRANSFORM = frozenset((
    "mul", "mul_", "div", "div_", "__mul__", "__rmul__", "__imul__", "__truediv__", "__itruediv__", "tanh", "tanh_",
))  # fmt: skip
LOG_PROB, MEAN, ENTROPY, PREDICTED, LABEL, COLUMNS = range(6)


class StandIn(Tensor):
    """Base of the stand-ins."""

    readers: ClassVar[dict[str, Callable[..., Any]]] = {}

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        reader = cls.readers.get(name)
        if reader is not None:
            return reader(*args, **(kwargs or {}))
        if name in _TRANSFORM and isinstance(args[0], StandIn) and not any(map(torch.is_tensor, args[1:])):
            return args[0]
        if name not in _ROWS:
            raise RuntimeError(
                f"{name or function}: got logits that are not built; must be one of the functions that this trainer "
                "calls on them in the TRL version that is supported. Set fused_loss: false in liger_config"
            )
        out: Any = super().__torch_function__(function, types, args, kwargs or {})
        if name in ("__getitem__", "view", "reshape") and out.shape[-1:] != args[0].shape[-1:]:
            raise RuntimeError(f"{name}: got a part of the vocabulary of logits that are not built; must be whole rows")
        return out


class HiddenRows(StandIn):
    """Hidden states ``[batch, tokens, hidden]``, for a trainer that compares two models' logits."""

    readers: ClassVar[dict[str, Callable[..., Any]]] = {"float": lambda rows: rows}


class TokenScores(StandIn):
    """Numbers of each token, fp32 or fp64, ``[batch, tokens, 5]``, for a trainer that reads log-probabilities.

    The columns are the label's log-probability, the mean of the logits, their entropy, the most probable token if that
    is the label and -1 otherwise, and the label. Only the first has a gradient.
    """


class NormalisedScores(TokenScores):
    """``TokenScores`` after ``log_softmax``."""


def token_scores(out: TokenLogProbs, labels: Tensor) -> Tensor:
    """The ``TokenScores`` of ``labels`` ``[batch, tokens]``."""
    predicted = torch.where(out.is_top1 != 0, labels, -1)
    columns = (out.log_probs, out.mean_logits.detach(), out.entropy.detach(), predicted, labels)
    return torch.stack([column.to(out.log_probs.dtype) for column in columns], dim=-1).as_subclass(TokenScores)


def plain(stand_in: Tensor) -> Tensor:
    """The same numbers as a plain tensor, with the same gradient."""
    with torch._C.DisableTorchFunctionSubclass():
        return stand_in.as_subclass(Tensor)


def log_probs_of(scores: Tensor, labels: Tensor, used: Tensor) -> Tensor:
    """The log-probabilities of ``labels`` where ``used``; elsewhere any finite number.

    Raises:
        ValueError: Those that were computed are of other labels.
    """
    rows = plain(scores)
    if bool((used & (rows[..., LABEL] != labels)).any()):
        raise ValueError("labels: got others than the tokens that follow in input_ids; must be the same")
    return rows[..., LOG_PROB]


def selective_log_softmax(
    scores: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """TRL's function of that name, of ``TokenScores``. Without a mask, label 0 may stand for a token to be ignored."""
    _check_temperature(temperature)
    found = log_probs_of(scores, index, index != 0 if row_mask is None else row_mask != 0)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def selective_log_softmax_and_entropy(
    scores: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """TRL's function of that name, of ``TokenScores``.

    Raises:
        ValueError: The entropy shall have a gradient, or the temperature is not 1.
    """
    if entropy_requires_grad:
        raise ValueError("entropy_requires_grad: got True; must be False with the fused loss")
    found, entropy = selective_log_softmax(scores, index, temperature, row_mask), plain(scores)[..., ENTROPY]
    return found, entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0.0)


def _check_temperature(temperature: float) -> None:
    if temperature != 1.0:
        raise ValueError(f"temperature: got {temperature}; must be 1 with the fused loss")


def _check_last(dim: int) -> None:
    if dim != -1:
        raise ValueError(f"dim: got {dim}; must be -1 with the fused loss")


def _mean(scores: Tensor, dim: int | None = None) -> Tensor:
    """The mean over the vocabulary, or over everything."""
    means = plain(scores)[..., MEAN]
    if dim is None:
        return means.mean()
    _check_last(dim)
    return means


def _argmax(scores: Tensor, dim: int) -> Tensor:
    """The most probable token where that is the label, and -1 elsewhere."""
    _check_last(dim)
    return plain(scores)[..., PREDICTED].long()


def _cross_entropy(
    scores: Tensor, labels: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = IGNORE_INDEX, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.cross_entropy`` with its defaults."""
    if (weight, size_average, reduce, reduction, label_smoothing) != (None, None, None, "mean", 0.0):
        raise ValueError("cross_entropy: got options; must be the mean with the fused loss")
    used = labels != ignore_index
    return -log_probs_of(scores, labels, used).where(used, 0.0).sum() / used.sum()


def _log_softmax(scores: Tensor, dim: int) -> Tensor:
    _check_last(dim)
    with torch._C.DisableTorchFunctionSubclass():
        return scores.as_subclass(NormalisedScores)


def _take_along_dim(scores: Tensor, indices: Tensor, dim: int) -> Tensor:
    """The log-probability of one token of each row."""
    index = indices.squeeze(-1)
    if dim != scores.dim() - 1 or index.dim() != dim:
        raise ValueError("take_along_dim: got several tokens of a row; must be one with the fused loss")
    return log_probs_of(scores, index, torch.ones_like(index, dtype=torch.bool)).unsqueeze(-1)


TokenScores.readers = {
    "mean": _mean, "argmax": _argmax, "cross_entropy": _cross_entropy, "log_softmax": _log_softmax,
    "float": lambda rows: rows,
}  # fmt: skip
NormalisedScores.readers = {"take_along_dim": _take_along_dim}
