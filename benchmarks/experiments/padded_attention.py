"""SDPA of right-padded rows: keys repeated for each query head, grouped keys as they are, and no mask at all.

    python benchmarks/experiments/padded_attention.py

Forward and backward at the attention of the paper's models and of others: transformers' function, ours
(liger_trainer/attention.py), and causal attention that is given no mask (liger_trainer/padding.py), the last with the
kernels that torch does not choose, too. Prints the kernel, times, extra memory, the first calls at two new lengths, for
which cuDNN plans anew (16 and 8 tokens fewer: batches are padded to multiples of 16), and the largest difference of the
gradients, where padding has none. ``--smoke`` runs tiny shapes on the CPU.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from benchmarks.measure import extra_peak_mib, median_ms, relative_error, synchronize
from liger_trainer.rules.attention import FUSED, grouped_sdpa

# batch, tokens, query heads, key heads, head_dim
SHAPES = {
    "Mistral-7B": (128, 384, 32, 8, 128),
    "Llama-3-8B": (64, 352, 32, 8, 128),
    "Qwen2-7B": (48, 320, 28, 4, 128),
    "Gemma-7B": (48, 320, 16, 16, 256),
    "Phi-3-mini": (128, 384, 32, 32, 96),
    "Llama-3.2-1B": (8, 1024, 32, 8, 64),
}
SMOKE = {"tiny": (2, 32, 4, 2, 16)}
KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class Rows(NamedTuple):
    """Leaves of a graph, what hides padding and later tokens from them, and the gradient of the output."""

    states: list[Tensor]  # query, key and value as projections and ``transpose(1, 2)`` leave them
    mask: Tensor
    upstream: Tensor


def padded_rows(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, device: str) -> Rows:
    """Random rows with padding on the right."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = (heads, kv_heads, kv_heads)
    states = [torch.randn(batch, tokens, n, head_dim, device=device, dtype=dtype).transpose(1, 2) for n in sizes]
    lengths = torch.randint(tokens // 4, tokens + 1, (batch, 1, 1, 1), device=device)
    columns = torch.arange(tokens, device=device)
    upstream = torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype)
    upstream *= columns[:, None, None] < lengths  # no loss depends on padding
    return Rows([s.requires_grad_() for s in states], (columns[:, None] >= columns) & (columns < lengths), upstream)


def chosen(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> SDPBackend:
    """The kernel that torch chooses."""
    grouped = key.shape[1] != query.shape[1]
    return SDPBackend(torch._fused_sdp_choice(query, key, value, mask, 0.0, mask is None, enable_gqa=grouped))


def groups_of(rows: Rows) -> int:
    """Query heads that share a key head."""
    return rows.states[0].shape[1] // rows.states[1].shape[1]


def output(attend, rows: Rows, masked: bool) -> Tensor:
    """What the attention function returns for the rows."""
    module = SimpleNamespace(num_key_value_groups=groups_of(rows), is_causal=True)
    return attend(module, *rows.states, rows.mask if masked else None)[0]


def gradients(attend, rows: Rows, masked: bool) -> list[Tensor]:
    """Forward and backward."""
    return torch.autograd.grad(output(attend, rows, masked), rows.states, rows.upstream)


def ways_of(name: str, rows: Rows, device: str) -> dict[str, tuple]:
    """What to measure: function, whether it is given the mask, its kernel, and whether that is not torch's choice."""
    query, *shared = rows.states
    repeated = [query, *(repeat_kv(t, groups_of(rows)) for t in shared)]
    ways = {"repeated": (sdpa_attention_forward, True, chosen(*repeated, rows.mask), False)}
    if groups_of(rows) > 1:
        ways["grouped"] = (grouped_sdpa, True, chosen(*rows.states, rows.mask), False)
        if ways["grouped"][2].value not in FUSED:
            print(f"{name:12s} no fused kernel groups heads under a mask: the line of grouped heads repeats them, too")
    ways["no mask"] = (sdpa_attention_forward, False, chosen(*rows.states, None), False)
    for kernel in KERNELS if device == "cuda" else ():
        if kernel != ways["no mask"][2]:
            way = f"no mask {kernel.name.partition('_')[0].lower()}"
            ways[way] = (sdpa_attention_forward, False, kernel, True)
    return ways


def measure(name: str, shape: tuple[int, ...], device: str) -> None:
    """Print a line for each way."""
    batch, tokens, *heads = shape
    rows, *shorter = (padded_rows(batch, n, *heads, device) for n in (tokens, tokens - 16, tokens - 8))
    expected = None
    for way, (attend, masked, kernel, forced) in ways_of(name, rows, device).items():
        forward, both = (partial(function, attend, rows, masked) for function in (output, gradients))
        with sdpa_kernel(kernel) if forced else nullcontext():
            try:
                ours = both()
            except RuntimeError as error:
                print(f"{name:12s} {way:17s} {str(error).splitlines()[0][:100]}", flush=True)
                continue
            expected = expected or ours
            error = max(relative_error(a, b.float()) for a, b in zip(ours, expected, strict=True))
            fwd, full = median_ms(forward, device), median_ms(both, device)
            first = [once_ms(partial(gradients, attend, new, masked), device) for new in shorter]
            memory = extra_peak_mib(both, rows.states, device) or 0.0
        print(
            f"{name:12s} {way:17s} {kernel.name:19s} forward {fwd:7.3f} ms, with backward {full:7.3f} ms, "
            f"first time {first[0]:6.1f} and {first[1]:6.1f} ms, {memory:6.0f} MiB, gradients differ by {error:.1e}",
            flush=True,
        )


def once_ms(function, device: str) -> float:
    """The time of one call, host and device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def main() -> int:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    smoke = parser.parse_args().smoke
    for name, shape in (SMOKE if smoke else SHAPES).items():
        measure(name, shape, "cpu" if smoke else "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
