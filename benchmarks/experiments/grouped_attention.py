"""SDPA under a padding mask with keys and values repeated for each query head, and with grouped ones as they are.

    python benchmarks/experiments/grouped_attention.py

Forward and backward of transformers' function and of ours (liger_trainer/attention.py), at the attention of the paper's
models and of others; the kernel that torch chooses for each, times, extra memory, and the largest difference of the
gradients. ``--smoke`` runs tiny shapes on the CPU.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from benchmarks.measure import extra_peak_mib, median_ms, relative_error
from liger_trainer.attention import FUSED, grouped_sdpa

# batch, tokens, query heads, key heads, head_dim
SHAPES = {
    "Mistral-7B": (128, 384, 32, 8, 128),
    "Llama-3-8B": (64, 352, 32, 8, 128),
    "Qwen2-7B": (48, 320, 28, 4, 128),
    "Llama-3.2-1B": (8, 1024, 32, 8, 64),
}
SMOKE = {"tiny": (2, 16, 4, 2, 16)}


def inputs(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, device: str) -> tuple:
    """Query, key and value as projections and ``transpose(1, 2)`` leave them, and a causal mask with padding."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = (heads, kv_heads, kv_heads)
    states = [torch.randn(batch, tokens, n, head_dim, device=device, dtype=dtype).transpose(1, 2) for n in sizes]
    lengths = torch.randint(tokens // 4, tokens + 1, (batch, 1, 1, 1), device=device)
    columns = torch.arange(tokens, device=device)
    mask = (columns[:, None] >= columns) & (columns < lengths)
    return [s.requires_grad_() for s in states], mask


def measure(name: str, shape: tuple[int, ...], device: str) -> None:
    """Print a line for each way."""
    leaves, mask = inputs(*shape, device)
    module = SimpleNamespace(num_key_value_groups=shape[2] // shape[3], is_causal=True)
    upstream = torch.randn_like(sdpa_attention_forward(module, *leaves, mask)[0])
    expected = None
    for way, attend in (("repeated", sdpa_attention_forward), ("grouped", grouped_sdpa)):

        def forward(attend=attend):
            return attend(module, *leaves, mask)[0]

        def both(forward=forward):
            return torch.autograd.grad(forward(), leaves, upstream)

        query, key, value = leaves
        if way == "repeated":
            key, value = (repeat_kv(t, module.num_key_value_groups) for t in (key, value))
        kernel = SDPBackend(torch._fused_sdp_choice(query, key, value, mask, 0.0, False, enable_gqa=way == "grouped"))
        if way == "grouped" and kernel.value not in FUSED:
            print(f"{name:14s} no fused kernel groups heads: the keys of the next line are repeated as well")
        gradients = both()
        expected = expected or gradients
        error = max(relative_error(a, b.float()) for a, b in zip(gradients, expected, strict=True))
        fwd, full = median_ms(forward, device), median_ms(both, device)
        memory = extra_peak_mib(both, leaves, device) or 0.0
        print(
            f"{name:14s} {way:9s} {kernel.name:22s} forward {fwd:7.3f} ms, with backward {full:7.3f} ms, "
            f"{memory:6.0f} MiB, gradients differ by {error:.1e}",
            flush=True,
        )


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
