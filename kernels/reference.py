"""Every op of this package in plain PyTorch.

These definitions are the contract: the Triton kernels must agree with them, and the tests and benchmarks compare
against them. Without Triton they compute all ops but the losses over a vocabulary, which go through their chunks there
as well (linear_loss/plain_rows.py); of those they are what torch.func and second derivatives differentiate. They follow
the order of operations and the roundings of the transformers modules they stand for, so on CPU a patched model gives
the numbers of an unpatched one, and takes no more memory. Formulas, saved tensors and bytes moved are in README.md.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # label of a position that has none, everywhere in the Hugging Face stack
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")  # the kernels know them by their place here


class TokenStats(NamedTuple):
    """Per-token statistics of the next-token distribution, each of the labels' shape, 0 (False) where ignored.

    ``log_probs`` (fp32): log-probability of the label. ``entropy`` (fp32): entropy in nats.
    ``is_top1`` (bool): the label is the argmax, the first one where several logits tie.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


class TokenLogProbs(NamedTuple):
    """Outputs of ``linear_logprobs``, each fp32 (``is_top1`` bool) and of the labels' shape, 0 where ignored.

    ``log_probs`` and ``entropy`` are differentiable. ``log_sum_sq_probs`` is ``log(sum_v p_v^2)`` and
    ``mean_logits`` the mean over the vocabulary of the transformed logits; both are for metrics.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    scale_in_fp32: bool = False,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight_offset + weight)`` over the last dimension, statistics in fp32."""
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(compute)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if scale_in_fp32:
        scale = weight.to(compute)
        return (normed * (scale + weight_offset if weight_offset else scale)).to(x.dtype)
    scale = weight + weight_offset if weight_offset else weight
    return scale * normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0,
    scale_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset=weight_offset, scale_in_fp32=scale_in_fp32), total


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    weight_offset: float = 0.0, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``(x - mean) / sqrt(var + eps) * (weight_offset + weight) + bias``, rounded once to ``out_dtype``."""
    if out_dtype is None and torch.is_autocast_enabled(x.device.type) and x.device.type == "cuda":
        out_dtype = torch.float32  # what autocast does to torch's own layer_norm on CUDA
    if (
        not weight_offset
        and out_dtype in (None, x.dtype)
        and all(v is None or v.dtype == x.dtype for v in (weight, bias))
    ):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)  # which computes in fp32 itself, without a copy of x
    compute = torch.promote_types(x.dtype, torch.float32)
    out = F.layer_norm(
        x.to(compute),
        x.shape[-1:],
        None if weight is None else weight.to(compute) + weight_offset,
        None if bias is None else bias.to(compute),
        eps,
    )
    return out.to(out_dtype or x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """``(a, b) -> (-b, a)`` for the two halves of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    """``(a, b) -> (-b, a)`` for neighbouring elements of the last dimension."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None,
    deinterleave: bool = False, unsqueeze_dim: int = 1, compute_in_fp32: bool = False,
) -> tuple[Tensor, Tensor] | Tensor:  # fmt: skip
    """``x * cos + rotate(x) * sin`` on the first ``rotary_dim`` elements of each head; the rest passes through.

    ``cos`` and ``sin`` are ``[B or 1, T, rotary_dim]``, or ``[B or 1, T, rotary_dim / 2]`` with one entry per
    rotated pair when ``rotary_dim`` is given and twice their width. ``deinterleave`` moves the first elements of
    neighbouring pairs into the first half.
    """
    width = cos.shape[-1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    if width != rotary_dim:
        expand = (lambda t: t.repeat_interleave(2, dim=-1)) if interleaved else (lambda t: torch.cat((t, t), dim=-1))
        cos, sin = expand(cos), expand(sin)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotate = rotate_pairs if interleaved else rotate_half

    def apply(x: Tensor) -> Tensor:
        head, tail = x[..., :rotary_dim], x[..., rotary_dim:]
        wide = head.float() if compute_in_fp32 else head
        rotated = (wide * cos + rotate(wide) * sin).to(x.dtype)
        if deinterleave:
            rotated = torch.cat((rotated[..., ::2], rotated[..., 1::2]), dim=-1)
        return rotated if tail.shape[-1] == 0 else torch.cat((rotated, tail), dim=-1)

    return apply(q) if k is None else (apply(q), apply(k))


def _gate_and_up(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return gate, up


def _times(x: Tensor, multiplier: float) -> Tensor:
    return x if multiplier == 1.0 else x * multiplier


def swiglu(
    gate: Tensor, up: Tensor | None = None, *, gate_multiplier: float = 1.0, down_multiplier: float = 1.0
) -> Tensor:
    """``silu(gate) * up``; with ``up=None``, ``gate`` holds both as ``[..., 2 * I]``, gate first."""
    gate, up = _gate_and_up(gate, up)
    return _times(F.silu(_times(gate, gate_multiplier)) * up, down_multiplier)


def geglu(
    gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh", gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """``gelu(gate) * up``; ``approximate`` is ``"tanh"`` or ``"none"`` as in ``torch.nn.functional.gelu``."""
    gate, up = _gate_and_up(gate, up)
    return _times(F.gelu(_times(gate, gate_multiplier), approximate=approximate) * up, down_multiplier)


def clamped_swiglu(
    gate_up: Tensor, *, limit: float = 7.0, alpha: float = 1.702, offset: float = 1.0, interleaved: bool = False
) -> Tensor:
    """``(clamp(up) + offset) * g * sigmoid(alpha * g)``, ``g = min(gate, limit)``, of a packed ``[..., 2 * I]``."""
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    gate = gate * torch.sigmoid(gate * alpha)
    up = up.clamp(min=-limit, max=limit)
    return (up + offset) * gate


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension in at least fp32, rounded to ``x``'s dtype."""
    return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def transform_logits(logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """``logits * logit_scale``, then ``softcap * tanh(logits / softcap)``, in at least fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def _of_all_transforms(tensor: Tensor) -> Tensor:
    """The whole tensor, of which a function under ``torch.vmap`` sees a row, and whose values it may not read."""
    functorch: Any = cast(Any, torch._C)._functorch  # torch's stubs lack it
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise ``ValueError`` for a label neither ``ignore_index`` nor in ``[0, vocab_size)``. Reads the device."""
    if not torch.compiler.is_compiling():
        labels = _of_all_transforms(labels)
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if torch.compiler.is_compiling():  # reading the device would break the graph
        torch._assert_async(~bad.any(), f"labels: found one not in [0, {vocab_size}) and not {ignore_index}")
    elif bool(bad.any()):
        allowed = f"[0, {vocab_size}) or ignore_index={ignore_index}"
        raise ValueError(f"labels: got {int(labels[bad][0])}; must be in {allowed}")


def reduce_loss(token_loss: Tensor, valid: Tensor, reduction: str, num_items: Tensor | float | None) -> Tensor:
    """Reduce per-token losses; a batch with no valid token gives a differentiable zero."""
    if reduction == "none":
        return token_loss
    if num_items is not None:
        if torch.is_tensor(num_items):
            num_items = num_items.to(token_loss.device).reshape(())
        none = num_items == 0  # then there is no valid token either, and the sum is 0
        return token_loss.sum() / (num_items + none)
    return token_loss.sum() if reduction == "sum" else token_loss.sum() / valid.sum().clamp(min=1)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0, reduction: str = "mean",
    num_items: Tensor | float | None = None, token_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of ``logits`` ``[..., V]`` and ``labels`` ``[...]``, plus ``z_loss * logsumexp^2`` per token."""
    check_labels(labels, logits.shape[-1], ignore_index)
    z = transform_logits(logits, logit_scale, softcap)
    valid = labels != ignore_index
    lse = z.logsumexp(-1)
    target = z.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    token_loss = lse - target
    if label_smoothing:
        token_loss = (1 - label_smoothing) * token_loss + label_smoothing * (lse - z.mean(-1))
    if z_loss:
        token_loss = token_loss + z_loss * lse.square()
    if token_weights is not None:
        token_loss = token_loss * token_weights.to(token_loss.dtype)
    return reduce_loss(token_loss.masked_fill(~valid, 0.0), valid, reduction, num_items)


def row_divergence(teacher: Tensor, student: Tensor, kind: str, beta: float) -> Tensor:
    """The divergence ``kind`` of each row of log-probabilities ``[..., V]`` of teacher and student."""
    if kind == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if kind == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    if kind == "tvd":
        return (teacher.exp() - student.exp()).abs().sum(-1) / 2
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * of_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)


def divergence(
    logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, kind: str = "forward_kl", beta: float = 0.5,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None, reduction: str = "mean", num_items: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """Divergence of ``softmax(logits)`` from ``softmax(teacher_logits)``, which get no gradient."""
    student = transform_logits(logits, logit_scale, softcap) / temperature
    teacher = transform_logits(teacher_logits.detach(), teacher_logit_scale, teacher_softcap) / temperature
    losses = row_divergence(teacher.log_softmax(-1), student.log_softmax(-1), kind, beta)
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask != 0
    return reduce_loss(losses.masked_fill(~valid, 0.0), valid, reduction, num_items)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``hidden @ weight.T + bias`` as a Linear module computes it, autocast included."""
    return F.linear(hidden, weight, bias)


def linear_splade(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *, pooling: str = "max",
    activation: str = "relu",
) -> Tensor:  # fmt: skip
    """Pooled ``log1p(relu(hidden @ weight.T + bias))`` of the tokens in ``mask``, ``[B, V]``."""
    logits = linear_logits(hidden, weight, bias)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).relu().log1p()
    scores = scores.log1p() if activation == "log1p_relu" else scores
    scores = scores if mask is None else scores * (mask != 0).unsqueeze(-1)
    return scores.max(dim=1).values if pooling == "max" else scores.sum(dim=1)


def token_stats(z: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> TokenLogProbs:
    """Statistics of transformed logits ``z`` ``[..., V]``; see ``TokenLogProbs``."""
    valid = labels != ignore_index
    index = labels.where(valid, 0).unsqueeze(-1)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    fields = (
        log_p.gather(-1, index).squeeze(-1),
        -(p * log_p).sum(-1),
        z.argmax(-1) == labels,
        p.square().sum(-1).log(),
        z.mean(-1),
    )
    return TokenLogProbs(*(f.masked_fill(~valid, 0) for f in fields))


def lora_linear(
    x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, weight: Tensor | None = None, bias: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T + bias + scale * (x a^T) b^T``, in ``x``'s dtype; ``base`` takes the place of the base product.

    Where ``a`` or ``b`` is wider than ``x``, the adapter's product is computed in its dtype, then rounded to ``x``'s.
    """
    dtype = torch.promote_types(x.dtype, torch.promote_types(a.dtype, b.dtype))
    out = (scale * F.linear(F.linear(x.to(dtype), a.to(dtype)), b.to(dtype))).to(x.dtype)
    if weight is not None:
        out = F.linear(x, weight.to(x.dtype)) + out
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out if base is None else base + out


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0,
    token_weights: Tensor | None = None, reduction: str = "mean", num_items: Tensor | float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """``cross_entropy(hidden @ weight.T + bias, labels)``, optionally with detached per-token statistics."""
    logits = linear_logits(hidden, weight, bias)
    loss = cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, reduction=reduction, num_items=num_items, token_weights=token_weights,
    )  # fmt: skip
    if not return_stats:
        return loss
    stats = token_stats(transform_logits(logits.detach(), logit_scale, softcap), labels, ignore_index)
    return loss, TokenStats(stats.log_probs, stats.entropy, stats.is_top1)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
) -> TokenLogProbs:  # fmt: skip
    """Per-token statistics of ``softmax(transform(hidden @ weight.T + bias) / temperature)``."""
    check_labels(labels, weight.shape[0], ignore_index)
    z = transform_logits(linear_logits(hidden, weight, bias), logit_scale, softcap) / temperature
    out = token_stats(z, labels, ignore_index)
    return out._replace(log_sum_sq_probs=out.log_sum_sq_probs.detach(), mean_logits=out.mean_logits.detach())
