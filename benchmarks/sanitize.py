"""Every kernel once, forward and backward, on small odd shapes: what to run under a memory and race checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py

The results are compared with the plain definitions, so that a kernel that did not run does not pass.
"""

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


def leaf(*shape: int) -> torch.Tensor:
    """A bf16 leaf of random numbers."""
    return torch.randn(*shape, device=DEVICE).bfloat16().requires_grad_()


def check(name: str, ours, theirs, leaves: list[torch.Tensor]) -> None:
    """Run forward, and backward twice, of both and compare them."""
    results = []
    for function in (ours, theirs):
        out = function()
        outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
        total = sum((t.float() * torch.arange(t.numel(), device=DEVICE).view(t.shape).cos()).sum() for t in outputs)
        grads, again = (torch.autograd.grad(total, leaves, retain_graph=first) for first in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), f"{name}: backward twice differs"
        results.append([*(t.detach() for t in outputs), *grads])
    for a, b in zip(*results, strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6)
        assert error < 3e-2, f"{name}: {error:.3f}"
    print(name, "ok", flush=True)


def main() -> None:
    """Run all of them."""
    torch.manual_seed(0)
    x, r, w, b = leaf(ROWS, COLS), leaf(ROWS, COLS), leaf(COLS), leaf(COLS)
    narrow, narrow_w = leaf(ROWS, 3, 24), leaf(24)
    check("rms_norm", lambda: rms_norm(x, w), lambda: reference.rms_norm(x, w), [x, w])
    check(
        "rms_norm, narrow", lambda: rms_norm(narrow, narrow_w), lambda: reference.rms_norm(narrow, narrow_w), [narrow]
    )
    check("add_rms_norm", lambda: add_rms_norm(x, r, w), lambda: reference.add_rms_norm(x, r, w), [x, r, w])
    check("layer_norm", lambda: layer_norm(x, w, b), lambda: reference.layer_norm(x, w, b), [x, w, b])
    gemma = {"weight_offset": 1.0, "scale_in_fp32": True}
    check("rms_norm, gemma", lambda: rms_norm(x, w, **gemma), lambda: reference.rms_norm(x, w, **gemma), [x, w])
    check("rms_norm, frozen", lambda: rms_norm(x), lambda: reference.rms_norm(x), [x])
    check("layer_norm, frozen", lambda: layer_norm(x), lambda: reference.layer_norm(x), [x])
    fixed = x.detach()
    check("rms_norm, weight alone", lambda: rms_norm(fixed, w), lambda: reference.rms_norm(fixed, w), [w])
    bias = lambda op: lambda: op(narrow, narrow_w, narrow_w)  # noqa: E731
    plain_norm = lambda op: lambda: op(fixed, w, b)  # noqa: E731
    check("layer_norm, weights alone", plain_norm(layer_norm), plain_norm(reference.layer_norm), [w, b])
    shift = lambda op: lambda: op(x, None, b)  # noqa: E731
    check("layer_norm, bias alone", shift(layer_norm), shift(reference.layer_norm), [x, b])
    check("layer_norm, narrow", bias(layer_norm), bias(reference.layer_norm), [narrow, narrow_w])
    q, k = leaf(2, 3, 19, 24), leaf(2, 1, 19, 24)
    cos, sin = torch.randn(2, 1, 19, 16, device=DEVICE).bfloat16()
    for options in ({}, {"interleaved": True}, {"interleaved": True, "deinterleave": True, "rotary_dim": 16}):
        width = 8 if "rotary_dim" in options else 16
        tables = cos[..., :width], sin[..., :width]
        check(
            f"rope {options}",
            lambda o=options, t=tables: rope(q, k, *t, **o),
            lambda o=options, t=tables: reference.rope(q, k, *t, **o),
            [q, k],
        )
    alone = lambda op: lambda: op(q, None, cos, sin)  # noqa: E731
    check("rope, q alone", alone(rope), alone(reference.rope), [q])
    for leaves in ([x, r], [x], [r]):
        gate, up = (t if any(t is one for one in leaves) else t.detach() for t in (x, r))
        both = lambda op, g=gate, u=up: lambda: op(g, u)  # noqa: E731
        check(f"swiglu, {len(leaves)} trained", both(swiglu), both(reference.swiglu), leaves)
    check("geglu, packed", lambda: geglu(x), lambda: reference.geglu(x), [x])
    exact = {"approximate": "none"}
    check("geglu, exact", lambda: geglu(x, r, **exact), lambda: reference.geglu(x, r, **exact), [x, r])
    for interleaved in (False, True):
        options = {"limit": 1.0, "interleaved": interleaved}
        check(
            "clamped_swiglu",
            lambda o=options: clamped_swiglu(x, **o),
            lambda o=options: reference.clamped_swiglu(x, **o),
            [x],
        )
    down = leaf(50, COLS)
    plain = ACTIVATIONS["silu"][1]
    check("gated_linear", lambda: gated_linear(x, r, down), lambda: plain(x, r) @ down.t(), [x, r, down])
    labels = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    labels[::4] = -100
    logits, weight = leaf(ROWS, VOCAB), leaf(VOCAB, COLS)
    every = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "token_weights": torch.rand(ROWS, device=DEVICE)}
    items = torch.tensor(7.0, device=DEVICE)
    for options in ({}, every, {"num_items": items}, {"reduction": "none"}):
        ours = lambda o=options: cross_entropy(logits, labels, **o)  # noqa: E731
        check(f"cross_entropy {list(options)}", ours, lambda o=options: reference.cross_entropy(logits, labels, **o),
              [logits])  # fmt: skip
    exact = lambda: reference.linear_cross_entropy(x, weight, labels)  # noqa: E731
    for options in ({"logits_budget_mib": 0.01}, {"low_memory": True}, {"low_memory": True, "logits_budget_mib": 0.01}):
        ours = lambda o=options: linear_cross_entropy(x, weight, labels, **o)  # noqa: E731
        check(f"linear_cross_entropy {options}", ours, exact, [x, weight])
    capped = {"softcap": 5.0, "label_smoothing": 0.1}
    capped["num_items"] = items
    for options in ({}, {"low_memory": True}):
        ours = lambda o=options: linear_cross_entropy(x, weight, labels, logits_budget_mib=0.01, **capped, **o)  # noqa: E731
        check(f"linear_cross_entropy, capped {options}", ours,
              lambda: reference.linear_cross_entropy(x, weight, labels, **capped), [x, weight])  # fmt: skip
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]

    def under_autocast():
        with torch.autocast(DEVICE, torch.bfloat16):
            return linear_cross_entropy(*wide, labels)

    check("linear_cross_entropy, autocast", under_autocast, lambda: reference.linear_cross_entropy(*wide, labels), wide)
    for speculation in (None, Speculation()):
        ours = lambda s=speculation: linear_logprobs(x, weight, labels, speculation=s, logits_budget_mib=0.01)[:2]  # noqa: E731
        check("linear_logprobs", ours, lambda: reference.linear_logprobs(x, weight, labels)[:2], [x, weight])
    frozen = weight.detach()
    ours = lambda: linear_logprobs(x, frozen, labels, logits_budget_mib=0.01)[:2]  # noqa: E731
    check("linear_logprobs, frozen", ours, lambda: reference.linear_logprobs(x, frozen, labels)[:2], [x])
    for low_memory in (False, True):
        first = lambda op, **o: lambda: op(x, frozen, labels, softcap=5.0, **o)[0]  # noqa: E731
        options = {"logits_budget_mib": 0.01, "low_memory": low_memory}
        check(
            f"linear_logprobs, capped {options}",
            first(linear_logprobs, **options),
            first(reference.linear_logprobs),
            [x],
        )


if __name__ == "__main__":
    main()
