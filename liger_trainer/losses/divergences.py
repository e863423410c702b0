"""Log-probabilities of some tokens and of all others together, for a teacher of whom only the top tokens are known."""

import torch
from torch import Tensor

from ..kernels import reference

DIVERGENCES = (*reference.DIVERGENCES, "cosine")
LOWEST_LOG_PROB = -1e4  # stands for the logarithm of 0: its exponential is 0, and products with it stay finite


def with_rest(log_probs: Tensor) -> Tensor:
    """``[n, K + 1]``: ``[n, K]`` log-probabilities of some outcomes, and that of all others together.

    The others keep at least the rounding error of 1: a sum of K probabilities is not known more precisely.
    """
    total = log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(log_probs.dtype).eps)
    return torch.cat((log_probs, torch.log1p(-total)), dim=-1)


def at_tokens(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """``[n, K]`` of ``log_probs`` ``[n, V]`` at ``token_ids``; the logarithm of 0 where the id is negative."""
    return log_probs.gather(-1, token_ids.clamp(min=0)).masked_fill(token_ids < 0, LOWEST_LOG_PROB)
