"""Time against memory of ``linear_cross_entropy``: budgets, the low-memory setting, ideas that are not in the product.

    python benchmarks/experiments/linear_ce_curve.py --out curve.json

Every number is a median of forward + backward, beside the three GEMMs alone in the same process. ``extra`` is peak
memory over the inputs and the gradients. A variant that fails is reported and the next one runs. Without a GPU the
script runs a tiny shape, to see that it runs at all.
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from liger_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear_logprobs import linear_logprobs
from liger_trainer.kernels.linear_loss import loss as linear_loss
from liger_trainer.kernels.linear_loss import token_chunks as chunking
from liger_trainer.kernels.linear_loss.options import logit_transform
from liger_trainer.kernels.linear_loss.softmax_rows import loss_rows
from liger_trainer.kernels.linear_loss.weight_sum import WeightSum, add_mm_into, mm_into

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SHAPES = [
    (4096, 4096, 128256),  # one chunk of all rows takes less memory than two and a sum
    (8192, 4096, 128256),
    (16384, 2048, 128256),
    (16384, 1536, 151936),
    (8192, 3072, 256000),
    (32768, 4096, 128256),
]
MIB = 2**20


def milliseconds(fn, repeats=5, warmup=1) -> float:
    """Median time of one call."""
    times = []
    for i in range(warmup + repeats if CUDA else 1):
        if CUDA:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            fn()
            stop.record()
            stop.synchronize()
            elapsed = start.elapsed_time(stop)
        else:
            begin = time.perf_counter()
            fn()
            elapsed = 1e3 * (time.perf_counter() - begin)
        if i >= warmup or not CUDA:
            times.append(elapsed)
    return statistics.median(times)


def extra_mib(fn, gradients_bytes: int) -> float | None:
    """Peak of allocated memory over what was there before and the gradients themselves."""
    if not CUDA:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - gradients_bytes) / MIB


@contextmanager
def replaced(home, name, value):
    """``home.name`` is ``value`` inside."""
    old = getattr(home, name)
    setattr(home, name, value)
    try:
        yield
    finally:
        setattr(home, name, old)


class WholeSum:
    """The weight's sum as one fp32 tensor with one GEMM a chunk, converted at the end: what ``WeightSum`` replaced."""

    def __init__(self, weight, dtype):
        self.dtype, self.total = dtype, None
        self.weight = weight

    def add(self, dlogits, x):
        """Take in a chunk."""
        if self.total is None:
            self.total = mm_into(torch.empty_like(self.weight, dtype=torch.float32), dlogits.t(), x)
        else:
            add_mm_into(self.total, dlogits.t(), x)

    def finish(self):
        """The sum, rounded."""
        return self.total.to(self.dtype)


class RoundedSum(WholeSum):
    """The sum in the weight's own 16 bits, rounded at every chunk: faster and smaller, and not precise."""

    def add(self, dlogits, x):
        """Take in a chunk."""
        if self.total is None:
            self.total = torch.mm(dlogits.t(), x)
        else:
            self.total.addmm_(dlogits.t(), x)


def three_gemms(hidden, weight, chunk=4096):
    """The floor: logits, dhidden, dweight, with 16-bit outputs and nothing summed over chunks."""
    n = min(chunk, hidden.shape[0])
    logits = torch.empty(n, weight.shape[0], dtype=DTYPE, device=DEVICE)
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def run(parts=("logits", "hidden", "weight")):
        for start in range(0, hidden.shape[0], n):
            x = hidden[start : start + n]
            out = logits[: x.shape[0]]
            if "logits" in parts:
                torch.mm(x, weight.t(), out=out)
            if "hidden" in parts:
                torch.mm(out, weight, out=hidden_grad[start : start + n])
            if "weight" in parts:
                torch.mm(out.t(), x, out=weight_grad)

    return run


def side_stream(hidden, weight, labels, budget_mib):
    """The chunk scheme with the row kernel of one chunk beside the next chunk's logits GEMM, in two buffers."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    n = chunking.rows_per_chunk(num_rows, vocab_size, hidden.element_size(), budget_mib / 2)
    side, main, transform = torch.cuda.Stream(), torch.cuda.current_stream(), logit_transform(1.0, None)

    def run():
        buffers = [torch.empty(n, vocab_size, dtype=DTYPE, device=DEVICE) for _ in range(2)]
        token_loss, lse = (torch.empty(num_rows, dtype=torch.float32, device=DEVICE) for _ in range(2))
        hidden_grad, weight_sum = torch.empty_like(hidden), WeightSum(weight, DTYPE)
        spans = [slice(i, min(i + n, num_rows)) for i in range(0, num_rows, n)]

        def project(i):
            out = buffers[i % 2][: spans[i].stop - spans[i].start]
            torch.mm(hidden[spans[i]], weight.t(), out=out)
            return out

        logits = project(0)
        for i, span in enumerate(spans):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                loss_rows(
                    logits, labels[span], token_loss[span], lse[span], transform, ignore_index=-100, write_grad=True,
                    grad_scale=1 / num_rows,
                )  # fmt: skip
            ahead = project(i + 1) if i + 1 < len(spans) else None
            main.wait_stream(side)
            mm_into(hidden_grad[span], logits, weight)
            weight_sum.add(logits, hidden[span])
            logits = ahead
        return token_loss.sum() / num_rows, hidden_grad, weight_sum.finish()

    return run


def variants(hidden, weight, labels):
    """``(name, gradient bytes, callable)`` in the order in which they are run."""
    last_ignored = labels.clone()
    last_ignored[511::512] = -100
    both = hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size()

    def step(op, w=weight, y=labels, **options):
        def run():
            loss = op(hidden, w, y, **options)
            loss.backward()
            hidden.grad = weight.grad = None

        return run

    def patched(home, name, value, fn):
        def run():
            with replaced(home, name, value):
                fn()

        return run

    def log_probs(h, w, y, low_memory=False):
        return linear_logprobs(h, w, y, low_memory=low_memory).log_probs.mean()

    def no_grad(**options):
        def run():
            with torch.no_grad():
                linear_cross_entropy(hidden, weight, labels, **options)

        return run

    ce = linear_cross_entropy
    for budget in (256, 512, 1024, 2048):
        yield f"chunks {budget}", both, step(ce, logits_budget_mib=budget)
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    in_chunks = {
        budget: patched(chunking, "bytes_over_gradient", lambda *_: 0, step(ce, logits_budget_mib=budget))
        for budget in (512, 1024)
        if chunking.rows_per_chunk(tokens, vocab_size, hidden.element_size(), budget) < tokens
    }
    for budget, function in in_chunks.items():
        yield f"chunks {budget}, even where one takes less", both, function
    yield "chunks 512, last label of each 512 ignored", both, step(ce, y=last_ignored)
    for budget in (32, 64, 256, 512, 1024):
        name = "low_memory" if budget == 64 else f"slabs {budget}"
        slabs = step(ce, low_memory=True, logits_budget_mib=budget)
        yield name, both, patched(linear_loss, "LOW_MEMORY_MIB", budget, slabs)
    yield "low_memory, last label of each 512 ignored", both, step(ce, y=last_ignored, low_memory=True)
    yield "forward only, chunks 512", 0, no_grad()
    yield "forward only, low_memory", 0, no_grad(low_memory=True)
    frozen = weight.detach()
    yield "frozen weight, chunks 512", both - frozen.numel() * frozen.element_size(), step(ce, w=frozen)
    yield "frozen weight, low_memory", both - frozen.numel() * frozen.element_size(), step(ce, frozen, low_memory=True)
    yield "logprobs, recompute by slabs 512", both, step(log_probs)
    yield "logprobs, low_memory", both, step(log_probs, low_memory=True)
    for budget, whole in in_chunks.items():
        yield f"one fp32 sum, chunks {budget}", both, patched(chunking, "WeightSum", WholeSum, whole)
        yield f"bf16 sum, chunks {budget}", both, patched(chunking, "WeightSum", RoundedSum, whole)
        if CUDA:
            yield f"side stream, chunks {budget}", both, side_stream(hidden.detach(), frozen, labels, budget)


def gemms_of(x, weight, total) -> dict:
    """The GEMMs of a chunk with inputs ``x``, and other ways to write them."""
    half, flat = weight.shape[0] // 2, torch.empty(weight.shape[0], x.shape[0], dtype=DTYPE, device=DEVICE)
    logits, out_w, out_x = torch.mm(x, weight.t()), torch.empty_like(weight), torch.empty_like(x)
    flat.copy_(logits.t())

    def in_halves():
        for rows in (slice(half), slice(half, None)):
            add_mm_into(total[rows], logits[:, rows].t(), x)

    return {
        "logits": lambda: torch.mm(x, weight.t(), out=logits),
        "logits transposed": lambda: torch.mm(weight, x.t(), out=flat),
        "dhidden": lambda: torch.mm(logits, weight, out=out_x),
        "dhidden from transposed": lambda: torch.mm(flat.t(), weight, out=out_x),
        "dweight bf16": lambda: torch.mm(logits.t(), x, out=out_w),
        "dweight bf16 from transposed": lambda: torch.mm(flat, x, out=out_w),
        "dweight fp32": lambda: mm_into(total, logits.t(), x),
        "dweight fp32 +=": lambda: add_mm_into(total, logits.t(), x),
        "dweight fp32 += from transposed": lambda: add_mm_into(total, flat, x),
        "dweight fp32 += in halves": in_halves,
    }


def gemm_table(hidden, weight) -> list[dict]:
    """TFLOP/s of each GEMM by tokens in a chunk."""
    table = []
    total = torch.zeros(weight.shape, dtype=torch.float32, device=DEVICE)
    for n in (512, 1024, 2048, 4096) if CUDA else (64,):
        for name, fn in gemms_of(hidden[:n], weight, total).items():
            ms = milliseconds(fn)
            tflops = 2 * n * weight.numel() / ms / 1e9
            table.append({"tokens": n, "gemm": name, "ms": ms, "tflops": tflops})
            print(f"  n {n:5d}  {name:34s} {ms:8.3f} ms  {tflops:6.0f} TFLOP/s", flush=True)
    return table


def main() -> None:
    """Measure every variant at every shape and write the file after each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=115, help="start no shape after this")
    args = parser.parse_args()
    began = time.perf_counter()
    results = {"device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__, "shapes": []}
    for tokens, width, vocab_size in SHAPES if CUDA else [(64, 32, 500)]:
        if time.perf_counter() - began > args.seconds:
            print("out of time", flush=True)
            break
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, device=DEVICE, dtype=DTYPE).requires_grad_()
        weight = (torch.randn(vocab_size, width, device=DEVICE, dtype=DTYPE) * 0.02).requires_grad_()
        labels = torch.randint(0, vocab_size, (tokens,), device=DEVICE)
        gemms = three_gemms(hidden.detach(), weight.detach())
        floors = {"3": milliseconds(gemms)}
        floors |= {part: milliseconds(partial(gemms, (part,))) for part in ("logits", "hidden", "weight")}
        entry = {"tokens": tokens, "hidden": width, "vocab": vocab_size, "floor_ms": floors, "variants": []}
        results["shapes"].append(entry)
        print(f"BT {tokens} H {width} V {vocab_size}: three GEMMs {floors['3']:.2f} ms, {floors}", flush=True)
        del gemms
        for name, gradient_bytes, fn in variants(hidden, weight, labels):
            try:
                fn()  # compiles
                extra, ms = extra_mib(fn, gradient_bytes), milliseconds(fn, repeats=3 if tokens > 16384 else 5)
                row = {"name": name, "ms": ms, "ratio": ms / floors["3"], "extra_mib": extra}
                print(f"  {name:46s} {ms:8.2f} ms  {row['ratio']:5.3f}x  extra {extra or 0:7.0f} MiB", flush=True)
            except Exception as error:  # an experiment: the other variants still count
                row = {"name": name, "error": repr(error)[:300]}
                hidden.grad = weight.grad = None
                print(f"  {name:46s} {row['error']}", flush=True)
            entry["variants"].append(row)
            args.out.write_text(json.dumps(results, indent=1))
        if not CUDA or (tokens, width) in ((8192, 4096), (16384, 1536)):
            entry["gemms"] = gemm_table(hidden.detach(), weight.detach())
        args.out.write_text(json.dumps(results, indent=1))
        del hidden, weight, labels, fn
        if CUDA:
            torch.cuda.empty_cache()
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
