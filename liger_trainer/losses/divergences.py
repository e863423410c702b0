"""Divergences of a student's next-token distribution from a teacher's, row by row, in ordinary differentiable torch.

With p the teacher's and q the student's distribution over the vocabulary:

- ``forward_kl``: sum p log(p / q) (Hinton et al., arXiv 1503.02531, up to a constant)
- ``reverse_kl``: sum q log(q / p) (MiniLLM, arXiv 2306.08543)
- ``jsd``: beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q (eq. 1 of GKD, arXiv 2306.13649)
- ``tvd``: half the sum of |p - q| (f-distill, arXiv 2307.15190)
- ``cosine``: 1 - cosine of the angle between the two rows of logits
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OF_DISTRIBUTIONS = ("forward_kl", "reverse_kl", "jsd", "tvd")
DIVERGENCES = (*OF_DISTRIBUTIONS, "cosine")
LOWEST_LOG_PROB = -1e4  # stands for the logarithm of 0: its exponential is 0, and products with it stay finite


def divergence(kind: str, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """The divergence ``kind`` of each row.

    Args:
        kind: one of ``DIVERGENCES``.
        teacher: log-probabilities ``[n, V]``, or logits for ``"cosine"``.
        student: the same; differentiable.
        beta: share of the teacher in the mixture of ``"jsd"``, in (0, 1).

    Returns:
        ``[n]``.
    """
    match kind:
        case "forward_kl":
            return (teacher.exp() * (teacher - student)).sum(-1)
        case "reverse_kl":
            return (student.exp() * (student - teacher)).sum(-1)
        case "jsd":
            mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
            of_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
            return beta * of_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)
        case "tvd":
            return (teacher.exp() - student.exp()).abs().sum(-1) / 2
        case _:
            return 1 - F.cosine_similarity(teacher, student, dim=-1)


def with_rest(log_probs: Tensor) -> Tensor:
    """``[n, K + 1]``: ``[n, K]`` log-probabilities of some outcomes, and that of all others together.

    The others keep at least the rounding error of 1: a sum of K probabilities is not known more precisely.
    """
    total = log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(log_probs.dtype).eps)
    return torch.cat((log_probs, torch.log1p(-total)), dim=-1)


def at_tokens(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    """``[n, K]`` of ``log_probs`` ``[n, V]`` at ``token_ids``; the logarithm of 0 where the id is negative."""
    return log_probs.gather(-1, token_ids.clamp(min=0)).masked_fill(token_ids < 0, LOWEST_LOG_PROB)
