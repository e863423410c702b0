"""The sparse-retrieval head at 32 sequences of 256 tokens: ours, the plain head and torch.compile of it.

``python -m benchmarks.splade OUT.json [--device cpu] [--small]`` times forward and backward in bf16 for BERT's and
XLM-R's vocabularies, and records the peak memory above the inputs.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.op_worker import describe_device
from benchmarks.post_training_losses import measure
from liger_trainer.kernels.linear_splade import linear_splade

VOCABULARIES = (30522, 250002)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The head as SparseEncoder's modules compute it."""
    logits = F.linear(hidden, weight, bias) * mask.unsqueeze(-1)
    return logits.relu().log1p().max(dim=1).values


def main() -> None:
    """Measure every arm at every vocabulary and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    batch, tokens, width = (2, 8, 16) if args.small else (32, 256, 768)
    arms = {"liger_trainer": linear_splade, "plain": plain, "torch.compile": torch.compile(plain)}
    rows = []
    for vocab in (101,) if args.small else VOCABULARIES:
        torch.manual_seed(0)
        shapes = ((batch, tokens, width), (vocab, width), (vocab,))
        hidden, weight, bias = (torch.randn(s, device=args.device, dtype=dtype) for s in shapes)
        params = (hidden.requires_grad_(), weight.mul_(width**-0.5).requires_grad_(), bias.mul_(0.1).requires_grad_())
        lengths = torch.linspace(tokens // 4, tokens, batch, device=args.device)
        mask = (torch.arange(tokens, device=args.device) < lengths[:, None]).to(dtype)
        upstream = torch.randn(batch, vocab, device=args.device)
        for name, arm in arms.items():

            def step(arm=arm, params=params, mask=mask, upstream=upstream) -> Tensor:
                loss = (arm(*params, mask).float() * upstream).sum()
                torch.autograd.grad(loss, params)
                return loss

            try:
                row = measure(step, args.device)
            except torch.OutOfMemoryError as error:
                row = {"status": "oom", "note": str(error)[:200]}
            rows.append({"vocab": vocab, "arm": name, **row})
            print(json.dumps(rows[-1]), flush=True)
        args.out.write_text(json.dumps({"device": describe_device(args.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
