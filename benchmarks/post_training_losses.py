"""Post-training losses from hidden states: ours, liger-kernel's chunked ones and plain PyTorch, forward and backward.

``python -m benchmarks.post_training_losses OUT.json [--device cpu] [--small] [--seconds 110]`` times each at the shapes
of liger-kernel's own benchmark scripts. An arm that does not fit is recorded as out of memory. The arms are also what
``tests/losses/test_against_liger_kernel.py`` compares.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.op_worker import describe_device
from liger_trainer import losses as ours

BETA = 0.1
WARMUP, REPEATS = 2, 5


class Shape(NamedTuple):
    """Sequences (pairs count twice), tokens, vocabulary, hidden size of the student and of the teacher or reference."""

    batch: int
    tokens: int
    vocab: int
    hidden: int
    ref_hidden: int


@dataclass
class Inputs:
    """Hidden states, weights and labels; ``labels`` is -100 in the first quarter of each row, the prompt."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    advantages: Tensor

    def log_probs(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Log-probabilities of the labels from full logits, 0 at prompts."""
        logits = F.linear(hidden, weight).float()
        found = logits.log_softmax(-1).gather(-1, self.labels.clamp(min=0)[..., None])[..., 0]
        return found * (self.labels != -100)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Sums of the policy's and the reference's log-probabilities."""
        with torch.no_grad():
            ref = self.log_probs(self.ref_hidden, self.ref_weight).sum(1)
        return self.log_probs(self.hidden, self.weight).sum(1), ref

    @property
    def reference(self) -> dict[str, Tensor]:
        """The reference's, as our functions take them."""
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}


def make_inputs(shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    """Random inputs, whose logits have a standard deviation of about 1."""
    torch.manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype) * scale

    batch, tokens, vocab, hidden, ref_hidden = shape
    labels = torch.randint(0, vocab, (batch, tokens), device=device)
    labels[:, : tokens // 4] = -100
    return Inputs(
        normal(batch, tokens, hidden).requires_grad_(),
        normal(vocab, hidden, scale=hidden**-0.5).requires_grad_(),
        labels,
        normal(batch, tokens, ref_hidden),
        normal(vocab, ref_hidden, scale=ref_hidden**-0.5),
        torch.linspace(-1, 1, batch, device=device),
    )


def _plain_dpo(x: Inputs) -> Tensor:
    (chosen, rejected), (ref_chosen, ref_rejected) = (value.chunk(2) for value in x.pairs())
    return -F.logsigmoid(BETA * (chosen - ref_chosen - rejected + ref_rejected)).mean()


def _plain_orpo(x: Inputs) -> Tensor:
    log_probs, count = x.log_probs(x.hidden, x.weight), (x.labels != -100).sum(1)
    chosen, rejected = (log_probs.sum(1) / count).chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    pairs = len(chosen)
    return -log_probs[:pairs].sum() / count[:pairs].sum() - BETA * F.logsigmoid(odds).mean()


def _plain_kto(x: Inputs) -> Tensor:
    policy, ref = x.pairs()
    sign = torch.where(_desirable(x), 1.0, -1.0)
    return (1 - torch.sigmoid(BETA * sign * (policy - ref))).mean()


def _plain_grpo(x: Inputs) -> Tensor:
    log_probs, active = x.log_probs(x.hidden, x.weight), x.labels != -100
    ratio = (log_probs - log_probs.detach()).exp()
    with torch.no_grad():
        ref = x.log_probs(x.ref_hidden, x.ref_weight)
    kl = (ref - log_probs).exp() - (ref - log_probs) - 1
    return ((-ratio * x.advantages[:, None] + 0.04 * kl) * active).sum() / active.sum()


def _plain_jsd(x: Inputs) -> Tensor:
    student = F.linear(x.hidden, x.weight).float().log_softmax(-1)
    teacher = F.linear(x.ref_hidden, x.ref_weight).float().log_softmax(-1)
    mixture = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
    jsd = (teacher.exp() * (teacher - mixture) + student.exp() * (student - mixture)).sum(-1) / 2
    active = x.labels != -100
    return (jsd * active).sum() / active.sum()


def _desirable(x: Inputs) -> Tensor:
    return torch.arange(len(x.labels), device=x.labels.device) % 2 == 0


def _liger(name: str, **options: Any) -> Any:
    chunked = importlib.import_module("liger_kernel.chunked_loss")
    return getattr(chunked, f"LigerFusedLinear{name}Loss")(compiled=torch.cuda.is_available(), **options)


def _liger_pairs(name: str, x: Inputs, reference: bool, **options: Any) -> Tensor:
    refs = {"ref_input": x.ref_hidden, "ref_weight": x.ref_weight} if reference else {}
    return _liger(name, beta=BETA, **options)(x.weight, x.hidden, x.labels, **refs)[0]


def _liger_kto(x: Inputs) -> Tensor:
    return _liger("KTO", beta=BETA, use_ref_model=True)(
        x.hidden, x.weight, x.labels, preference_labels=_desirable(x), ref_input=x.ref_hidden,
        ref_weight=x.ref_weight, kl=torch.zeros(1, device=x.hidden.device),
    )[0]  # fmt: skip


def _liger_grpo(x: Inputs) -> Tensor:
    return _liger("GRPO", beta=0.04, loss_type="bnpo")(
        x.hidden, x.weight, x.labels.clamp(min=0), (x.labels != -100).long(), x.advantages, ref_input=x.ref_hidden,
        ref_weight=x.ref_weight,
    )[0]  # fmt: skip


def _liger_jsd(x: Inputs) -> Tensor:
    """Without the prompts, at which its soft loss would be computed too."""
    keep = x.labels.reshape(-1) != -100
    student, teacher, labels = (t.flatten(0, 1)[keep] for t in (x.hidden, x.ref_hidden, x.labels))
    soft = _liger("JSD", weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    return soft(student, x.weight, teacher, x.ref_weight, labels)


class Case(NamedTuple):
    """A loss in three forms."""

    shape: Shape
    arms: dict[str, Callable[[Inputs], Any]]


PAIRS = Shape(16, 1024, 128256, 4096, 4096)
CASES = {
    "dpo": Case(PAIRS, {
        "liger_trainer": lambda x: ours.dpo_loss(x.hidden, x.weight, x.labels, **x.reference, beta=BETA),
        "liger-kernel": lambda x: _liger_pairs("DPO", x, True),
        "plain": _plain_dpo,
    }),
    "orpo": Case(PAIRS, {
        "liger_trainer": lambda x: ours.orpo_loss(x.hidden, x.weight, x.labels, beta=BETA),
        "liger-kernel": lambda x: _liger_pairs("ORPO", x, False),
        "plain": _plain_orpo,
    }),
    "kto": Case(Shape(32, 512, 128256, 1024, 1024), {
        "liger_trainer": lambda x: ours.kto_loss(
            x.hidden, x.weight, x.labels, **x.reference, desirable=_desirable(x), kl=0.0, beta=BETA
        ),
        "liger-kernel": _liger_kto,
        "plain": _plain_kto,
    }),
    "grpo": Case(PAIRS._replace(batch=8), {
        "liger_trainer": lambda x: ours.grpo_loss(
            x.hidden, x.weight, x.labels, **x.reference, advantages=x.advantages, loss_type="bnpo", beta=0.04,
            use_bias_correction_kl=False,
        ),
        "liger-kernel": _liger_grpo,
        "plain": _plain_grpo,
    }),
    "jsd": Case(Shape(4, 1024, 128256, 2048, 4096), {
        "liger_trainer": lambda x: ours.distillation_loss(
            x.hidden, x.weight, x.labels, teacher_hidden=x.ref_hidden, teacher_weight=x.ref_weight, divergence="jsd"
        ),
        "liger-kernel": _liger_jsd,
        "plain": _plain_jsd,
    }),
}  # fmt: skip


def run(arm: Callable[[Inputs], Any], x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients of hidden states and weight."""
    loss = arm(x)
    dhidden, dweight = torch.autograd.grad(loss, (x.hidden, x.weight))
    return loss, dhidden, dweight


def measure(step: Callable[[], Tensor], device: str) -> dict[str, Any]:
    """Median time of ``step``, a forward and backward that returns the loss; its peak memory above what was there."""
    on_gpu = device == "cuda"
    loss, times, before, started = float("nan"), [], 0, time.perf_counter()
    for repeat in range(WARMUP + REPEATS):
        if repeat == WARMUP and on_gpu:  # what compiled and tuned code allocates is not counted
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        loss = step().item()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None
    timed = times[WARMUP:]
    return {
        "status": "ok", "ms": statistics.median(timed), "ms_min": min(timed), "ms_max": max(timed), "peak_gib": peak,
        "loss": loss, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> None:
    """Measure every arm of every case and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--seconds", type=float, default=110.0, help="cases that would start later are left out")
    args = parser.parse_args()
    end, rows = time.monotonic() + args.seconds, []
    for name, case in CASES.items():
        if time.monotonic() > end:
            rows.append({"case": name, "status": "left out: no time"})
            continue
        shape = Shape(4, 16, 101, 32, 32) if args.small else case.shape
        x = make_inputs(shape, args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
        for arm, function in case.arms.items():
            try:
                row = measure(lambda arm=function, x=x: run(arm, x)[0], args.device)
            except (torch.OutOfMemoryError, ImportError) as error:
                row = {"status": type(error).__name__, "note": str(error)[:200]}
            rows.append({"case": name, "arm": arm, "shape": shape._asdict(), **row})
            print(json.dumps(rows[-1]), flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()
        del x
        args.out.write_text(json.dumps({"device": describe_device(args.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
