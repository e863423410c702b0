"""Every kernel once, forward and backward, on small odd shapes: what to run under a memory and race checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py

The results are compared with the plain definitions, so that a kernel that did not run does not pass.
"""

import functools
import sys
from pathlib import Path

import torch

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from liger_trainer.kernels.add_rms_norm import add_rms_norm
from liger_trainer.kernels.clamped_swiglu import clamped_swiglu
from liger_trainer.kernels.cross_entropy import cross_entropy
from liger_trainer.kernels.gated_linear import ACTIVATIONS, gated_linear
from liger_trainer.kernels.geglu import geglu
from liger_trainer.kernels.layer_norm import layer_norm
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear_logprobs import Speculation, linear_logprobs
from liger_trainer.kernels.rms_norm import rms_norm
from liger_trainer.kernels.rope import rope
from liger_trainer.kernels.swiglu import swiglu

from liger_trainer.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLS, VOCAB = 37, 200, 331
NARROW = 8  # so small a hidden size that the logits are taken in chunks, which saves memory (kernels/README.md)


def leaf(*shape: int) -> torch.Tensor:
    """A bf16 leaf of random numbers."""
    return torch.randn(*shape, device=DEVICE).bfloat16().requires_grad_()


def run(function, leaves: list[torch.Tensor]) -> tuple[list, tuple, tuple, tuple]:
    """Outputs, the same of a call that no backward can follow, and the gradients of a backward pass and of a second."""
    with torch.no_grad():
        alone = function()
    out = function()
    pairs = zip(out, alone, strict=True) if isinstance(out, tuple) else [(out, alone)]
    outputs, alone = zip(*((a, b) for a, b in pairs if a.requires_grad), strict=True)
    total = sum((t.float() * torch.arange(t.numel(), device=DEVICE).view(t.shape).cos()).sum() for t in outputs)
    grads, again = (torch.autograd.grad(total, leaves, retain_graph=first) for first in (True, False))
    return [t.detach() for t in outputs], alone, grads, again


def check(name: str, ours, theirs, leaves: list[torch.Tensor]) -> None:
    """Run forward, with and without gradients, and backward twice, of both and compare them."""
    results = []
    for function in (ours, theirs):
        outputs, alone, grads, again = run(function, leaves)
        assert all(map(torch.equal, outputs, alone)), f"{name}: differs without gradients"
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), f"{name}: backward twice differs"
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6)
        assert error < 3e-2, f"{name}: {error:.3f}"
    print(name, "ok", flush=True)


def check_op(op, leaves: list[torch.Tensor], call, note: str = "", **ours) -> None:
    """``check`` of ``call(op)`` against the same call of the op's definition; ``ours`` are options of ``op`` alone."""
    definition = getattr(reference, op.__name__)
    check(f"{op.__name__} {note}", lambda: call(functools.partial(op, **ours)), lambda: call(definition), leaves)


def main() -> None:
    """Run all of them."""
    torch.manual_seed(0)
    x, r, w, b = leaf(ROWS, COLS), leaf(ROWS, COLS), leaf(COLS), leaf(COLS)
    narrow, narrow_w = leaf(ROWS, 3, 24), leaf(24)
    check_op(rms_norm, [x, w], lambda op: op(x, w))
    check_op(rms_norm, [narrow], lambda op: op(narrow, narrow_w), "narrow")
    check_op(rms_norm, [x, w], lambda op: op(x, w, weight_offset=1.0, scale_in_fp32=True), "gemma")
    check_op(rms_norm, [x], lambda op: op(x), "frozen")
    fixed = x.detach()
    check_op(rms_norm, [w], lambda op: op(fixed, w), "weight alone")
    row = leaf(1, COLS)  # one program: no sum over programs
    check_op(rms_norm, [row, w], lambda op: op(row, w), "one row")
    check_op(layer_norm, [row, w, b], lambda op: op(row, w, b), "one row")
    check_op(add_rms_norm, [x, r, w], lambda op: op(x, r, w))
    check_op(layer_norm, [x, w, b], lambda op: op(x, w, b))
    check_op(layer_norm, [narrow, narrow_w], lambda op: op(narrow, narrow_w, narrow_w), "narrow")
    check_op(layer_norm, [x], lambda op: op(x), "frozen")
    check_op(layer_norm, [w, b], lambda op: op(fixed, w, b), "weights alone")
    check_op(layer_norm, [x, b], lambda op: op(x, None, b), "bias alone")
    q, k = leaf(2, 3, 19, 24), leaf(2, 1, 19, 24)
    cos, sin = torch.randn(2, 1, 19, 16, device=DEVICE).bfloat16()
    paired = cos[..., :8], sin[..., :8]
    check_op(rope, [q, k], lambda op: op(q, k, cos, sin))
    check_op(rope, [q], lambda op: op(q, None, cos, sin), "q alone")
    check_op(rope, [q, k], lambda op: op(q, k, cos, sin, interleaved=True), "interleaved")
    turn = {"interleaved": True, "deinterleave": True, "rotary_dim": 16}
    check_op(rope, [q, k], lambda op: op(q, k, *paired, **turn), "deinterleaved")
    check_op(swiglu, [x, r], lambda op: op(x, r))
    check_op(swiglu, [x], lambda op: op(x, r.detach()), "gate alone")
    check_op(swiglu, [r], lambda op: op(fixed, r), "up alone")
    check_op(geglu, [x], lambda op: op(x), "packed")
    check_op(geglu, [x, r], lambda op: op(x, r, approximate="none"), "exact")
    check_op(clamped_swiglu, [x], lambda op: op(x, limit=1.0))
    check_op(clamped_swiglu, [x], lambda op: op(x, limit=1.0, interleaved=True), "interleaved")
    down = leaf(50, COLS)
    plain = ACTIVATIONS["silu"][1]
    check("gated_linear", lambda: gated_linear(x, r, down), lambda: plain(x, r) @ down.t(), [x, r, down])
    labels = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    labels[::4] = -100
    logits = leaf(ROWS, VOCAB)
    items = torch.tensor(7.0, device=DEVICE)
    every = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "token_weights": torch.rand(ROWS, device=DEVICE)}
    check_op(cross_entropy, [logits], lambda op: op(logits, labels))
    check_op(cross_entropy, [logits], lambda op: op(logits, labels, **every), "with every option")
    check_op(cross_entropy, [logits], lambda op: op(logits, labels, num_items=items), "num_items")
    check_op(cross_entropy, [logits], lambda op: op(logits, labels, reduction="none"), "none")
    x, weight = leaf(ROWS, NARROW), leaf(VOCAB, NARROW)
    tight = {"logits_budget_mib": 0.01}  # many chunks or slabs
    for options in (tight, {"low_memory": True}, {"low_memory": True, **tight}):
        check_op(linear_cross_entropy, [x, weight], lambda op: op(x, weight, labels), str(options), **options)
    capped = {"softcap": 5.0, "label_smoothing": 0.1, "num_items": items}
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    frozen = weight.detach()
    for options in (tight, {"low_memory": True, **tight}):
        note = f"capped {options}"
        check_op(linear_cross_entropy, [x, weight], lambda op: op(x, weight, labels, **capped), note, **options)
        check_op(linear_logprobs, [x], lambda op: op(x, frozen, labels, softcap=5.0)[0], note, **options)

    def under_autocast():
        with torch.autocast(DEVICE, torch.bfloat16):
            return linear_cross_entropy(*wide, labels)

    check("linear_cross_entropy, autocast", under_autocast, lambda: reference.linear_cross_entropy(*wide, labels), wide)
    for speculation in (None, Speculation()):
        note = "" if speculation is None else "speculated"
        options = {"speculation": speculation, **tight}
        check_op(linear_logprobs, [x, weight], lambda op: op(x, weight, labels)[:2], note, **options)
    check_op(linear_logprobs, [x], lambda op: op(x, frozen, labels)[:2], "frozen", **tight)


if __name__ == "__main__":
    main()
