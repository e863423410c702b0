"""The sparse-retrieval head: token scores over the vocabulary, pooled over each sequence's tokens, without the logits.

With x = hidden @ weight.T + bias and f(x) = log(1 + relu(x)), SPLADE (arXiv 2109.10086) represents a text by

    max   out[b, v] = max over tokens t of f(x[b, t, v])       sum   out[b, v] = sum over t of f(x[b, t, v])

f grows with x, so the maximum is taken of x, and its gradient goes to one token t*(b, v) for each b and v
(Sparton, arXiv 2603.25011). Forward computes the logits of one chunk of the vocabulary at a time, by cuBLAS, and
reduces them over the tokens at once. ``max`` saves t* ``[B, V]``, and backward needs no logits: with g = dout f'(x),

    dweight[v] = sum over b of g[b, v] hidden[b, t*(b, v)]
    dhidden[b, t] = sum over v with t*(b, v) = t of g[b, v] weight[v]

Both gather rows in a fixed order, the second one from entries that are sorted by token, so nothing is added
atomically. f'(x) comes from the output: e^-out, or e^(-out - y) with y = e^out - 1 for log(1 + log(1 + relu(x))).
``sum`` computes the chunks' logits again in backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .linear_loss.chunk_sizes import columns_per_chunk
from .linear_loss.gradients import add_mm_into
from .linear_loss.options import check_linear_args, sum_dtype
from .linear_loss.pooling_kernels import UNROLL, launch_dhidden, launch_dweight, launch_max, launch_sum, launch_sum_bwd
from .runtime.autograd import Function, differentiate
from .runtime.checks import check_device
from .runtime.launch import cdiv, next_power_of_2, use_triton
from .runtime.operators import uncompiled

POOLINGS = ("max", "sum")
ACTIVATIONS = ("relu", "log1p_relu")
LOGITS_BUDGET_MIB = 64.0  # about the L2 cache of an H100, from which the reduction then reads
WEIGHT_CHUNK_BYTES = 24 * 2**20  # rows of the weight that all sequences gather while they are in that cache


_COLS, _COLS_OPTIONS = 1024, (("num_warps", 4),)
_GATHER_OPTIONS = (("num_warps", 4),)


def _column_block(num_cols: int) -> int:
    return min(_COLS, next_power_of_2(num_cols))


class _Head:
    """Hidden states ``[B * T, H]``, weight and bias in the dtype of the GEMMs, and the chunks of the vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, budget_mib: float):
        self.hidden = hidden.reshape(-1, hidden.shape[-1]).to(dtype).contiguous()
        self.weight = weight.to(dtype).contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        rows, vocab = self.hidden.shape[0], weight.shape[0]
        size = columns_per_chunk(rows, vocab, dtype.itemsize, budget_mib)
        self.chunks = [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]
        self.buffer = torch.empty(rows * min(size, vocab), dtype=dtype, device=hidden.device)

    def logits(self, cols: slice) -> Tensor:
        """The logits ``[B * T, n]`` of a chunk; they overwrite those of the last one."""
        rows, n = self.hidden.shape[0], cols.stop - cols.start
        out = self.buffer[: rows * n].view(rows, n)
        weight = self.weight[cols].t()
        if self.bias is None:
            return torch.mm(self.hidden, weight, out=out)
        return torch.addmm(self.bias[cols], self.hidden, weight, out=out)


class LinearSpladeFunction(Function):
    """``[B, V]`` in fp32 of hidden ``[B, T, H]``, weight, bias and a padded int32 mask."""

    @staticmethod
    def definition(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pooling: str, activation: str,
        dtype: torch.dtype, budget_mib: float,
    ) -> Tensor:  # fmt: skip
        """The same in plain PyTorch."""
        mask = mask[:, : hidden.shape[1]]
        return reference.linear_splade(hidden, weight, bias, mask, pooling=pooling, activation=activation)

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pooling: str,
        activation: str, dtype: torch.dtype, budget_mib: float,
    ) -> Tensor:  # fmt: skip
        """Reduce one chunk of the vocabulary after the other."""
        batch, tokens = hidden.shape[:2]
        out = torch.zeros((batch, weight.shape[0]), dtype=torch.float32, device=hidden.device)
        argmax = torch.empty(out.shape, dtype=torch.int32, device=out.device) if pooling == "max" else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, dtype, budget_mib)
            for cols in head.chunks if hidden.numel() else ():
                logits = head.logits(cols)
                block = _column_block(logits.shape[1])
                shared: dict[str, Any] = {
                    "logits_ptr": logits, "mask_ptr": mask, "num_tokens": tokens, "num_cols": logits.shape[1],
                    "logits_row_stride": logits.stride(0), "mask_row_stride": mask.stride(0),
                    "out_row_stride": out.stride(0), "BLOCK_COLS": block,
                }  # fmt: skip
                grid = (batch, cdiv(logits.shape[1], block), 1)
                if argmax is not None:
                    launch_max(
                        grid, _COLS_OPTIONS, best_ptr=out[:, cols], argmax_ptr=argmax[:, cols], UNROLL=UNROLL, **shared
                    )
                else:
                    launch_sum(grid, _COLS_OPTIONS, out_ptr=out[:, cols], TWICE=activation == "log1p_relu", **shared)
        if argmax is not None:
            out.log1p_()
            if activation == "log1p_relu":
                out.log1p_()
        ctx.settings = (pooling, activation, dtype, budget_mib)
        ctx.save_for_backward(hidden, weight, bias, mask, *(() if argmax is None else (out, argmax)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias that are needed."""
        hidden, weight, bias, mask, *of_max = ctx.saved_tensors
        if torch.is_grad_enabled():
            args = (hidden, weight, bias, mask, *ctx.settings)
            return differentiate(LinearSpladeFunction.definition, args, (grad,))
        wanted, grad = ctx.needs_input_grad[:3], grad.float().contiguous()
        with torch.autocast(hidden.device.type, enabled=False):
            if of_max:
                out, argmax = of_max
                grads = _max_gradients(hidden, weight, out, argmax, grad, wanted, ctx.settings)
            else:
                grads = _sum_gradients(hidden, weight, bias, mask, grad, wanted, ctx.settings)
        return *_as_inputs(grads, (hidden, weight, bias)), *(None,) * 5


def _as_inputs(grads: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients in their inputs' shapes and dtypes."""
    pairs = zip(grads, inputs, strict=True)
    return [None if g is None or x is None else g.view(x.shape).to(x.dtype) for g, x in pairs]


def _max_gradients(
    hidden: Tensor, weight: Tensor, out: Tensor, argmax: Tensor, grad: Tensor, wanted: tuple[bool, ...], settings: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of ``max``: rows gathered from hidden states and weight."""
    activation, dtype = settings[1], settings[2]
    batch, tokens, width = hidden.shape
    slope = torch.exp(-out if activation == "relu" else -out - out.expm1())
    g = torch.where(argmax >= 0, grad * slope, 0.0)
    num_cols = weight.shape[0]
    dhidden = dweight = None
    if wanted[1]:
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        block_cols, block_width = 16, min(128, next_power_of_2(width))
        launch_dweight(
            (cdiv(num_cols, block_cols), cdiv(width, block_width), 1), _GATHER_OPTIONS,
            hidden_ptr=hidden.to(dtype).contiguous(), argmax_ptr=argmax, grad_ptr=g, dweight_ptr=dweight,
            num_sequences=batch, num_tokens=tokens, num_cols=num_cols, width=width, BLOCK_COLS=block_cols,
            BLOCK_WIDTH=block_width,
        )  # fmt: skip
    if wanted[0]:
        dhidden = torch.zeros((batch * tokens, width), dtype=torch.float32, device=hidden.device)
        of_weight = weight.to(dtype).contiguous()
        chunk = max(1, WEIGHT_CHUNK_BYTES // (width * of_weight.element_size()))
        for first in range(0, num_cols, chunk):
            _add_dhidden(dhidden, of_weight, g, argmax[:, first : first + chunk], first, tokens)
    return dhidden, dweight, g.sum(0) if wanted[2] else None


def _add_dhidden(dhidden: Tensor, weight: Tensor, g: Tensor, argmax: Tensor, first: int, tokens: int) -> None:
    """Add the share of the columns of ``argmax`` ``[B, chunk]``, which begin at ``first``."""
    (batch, chunk), (rows, width) = argmax.shape, dhidden.shape
    offsets = torch.arange(batch, device=argmax.device, dtype=torch.int32)[:, None] * tokens
    keys = torch.where(argmax >= 0, argmax + offsets, rows).reshape(-1)  # without a token: after all others
    keys, entries = keys.sort(stable=True)
    bounds = torch.searchsorted(keys, torch.arange(rows + 1, device=keys.device, dtype=keys.dtype))
    block_width = min(256, next_power_of_2(width))
    launch_dhidden(
        (rows, cdiv(width, block_width), 1), _GATHER_OPTIONS, weight_ptr=weight, entries_ptr=entries,
        bounds_ptr=bounds, grad_ptr=g, dhidden_ptr=dhidden, num_tokens=tokens, num_cols=g.shape[1], first_col=first,
        chunk=chunk, width=width, BLOCK_ENTRIES=8, BLOCK_WIDTH=block_width,
    )  # fmt: skip


def _sum_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, grad: Tensor, wanted: tuple[bool, ...],
    settings: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of ``sum``, from the logits, which are computed again."""
    activation, dtype, budget_mib = settings[1:]
    head, tokens = _Head(hidden, weight, bias, dtype, budget_mib), hidden.shape[1]
    wide = sum_dtype(dtype)
    dhidden = torch.zeros(head.hidden.shape, dtype=wide, device=hidden.device) if wanted[0] else None
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wanted[1] else None
    dbias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wanted[2] else None
    for cols in head.chunks if hidden.numel() else ():
        logits = head.logits(cols)
        block = _column_block(logits.shape[1])
        launch_sum_bwd(
            (logits.shape[0], cdiv(logits.shape[1], block), 1), _COLS_OPTIONS, logits_ptr=logits, mask_ptr=mask,
            grad_ptr=grad[:, cols], num_tokens=tokens, num_cols=logits.shape[1], logits_row_stride=logits.stride(0),
            mask_row_stride=mask.stride(0), grad_row_stride=grad.stride(0), TWICE=activation == "log1p_relu",
            BLOCK_COLS=block,
        )  # fmt: skip
        if dhidden is not None:
            add_mm_into(dhidden, logits, head.weight[cols])
        if dweight is not None:
            torch.mm(logits.t(), head.hidden, out=dweight[cols])
        if dbias is not None:
            dbias[cols] = logits.sum(0, dtype=wide)
    return dhidden, dweight, dbias


@uncompiled
def linear_splade(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *, pooling: str = "max",
    activation: str = "relu", logits_budget_mib: float = LOGITS_BUDGET_MIB,
) -> Tensor:  # fmt: skip
    """The sparse representation of each sequence: pooled ``log(1 + relu(hidden @ weight.T + bias))``, no logits.

    ``torch.compile`` breaks the graph here and runs the op as it is.

    Args:
        hidden: ``[B, T, H]``, what the vocabulary projection of a masked language model gets.
        weight: ``[V, H]``. ``hidden``, ``weight`` and ``bias`` have one dtype, or any under autocast.
        bias: ``[V]``.
        mask: ``[B, T]``, nonzero where a token counts; by default all do.
        pooling: ``"max"`` over the tokens, whose gradient goes to one token (the first of equal ones), or ``"sum"``.
        activation: ``"relu"``, or ``"log1p_relu"`` for ``log(1 + log(1 + relu(x)))`` (arXiv 2504.14839).
        logits_budget_mib: memory, in MiB, for the logits of one chunk of the vocabulary.

    Returns:
        ``[B, V]`` in fp32, or fp64 for fp64 inputs; 0 for a sequence of which no token counts.

    Raises:
        ValueError: a shape or option out of range.
        TypeError: a dtype that is not supported.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: got {pooling!r}; must be one of {', '.join(map(repr, POOLINGS))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; must be one of {', '.join(map(repr, ACTIVATIONS))}")
    if not logits_budget_mib > 0:
        raise ValueError(f"logits_budget_mib: got {logits_budget_mib}; must be positive")
    if hidden.dim() != 3 or hidden.shape[1] == 0:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}; must be [batch, tokens, hidden size], with tokens")
    counts = torch.ones(hidden.shape[:2], dtype=torch.int32, device=hidden.device)
    if mask is not None:
        if mask.shape != counts.shape:
            raise ValueError(f"mask: got shape {tuple(mask.shape)}; must be {tuple(counts.shape)}")
        check_device("mask", mask, hidden)
        counts = (mask != 0).int()
    dtype = check_linear_args(hidden, weight, counts, bias)
    counts = F.pad(counts, (0, -hidden.shape[1] % UNROLL))
    args = (hidden, weight, bias, counts, pooling, activation, dtype, float(logits_budget_mib))
    if dtype == torch.float64 or not use_triton(hidden, weight, bias):
        return LinearSpladeFunction.definition(*args)
    return LinearSpladeFunction.apply(*args)
