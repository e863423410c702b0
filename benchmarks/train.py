"""Benchmark of whole training steps under the stock Trainer: every arm of every round in a process of its own.

    python benchmarks/train.py --models llama-3.2-1b,qwen2.5-1.5b --settings 8x1024,32x1024c --rounds 3
    python benchmarks/train.py --models llama-3.2-1b --settings 8x1024 --profile ours
    python benchmarks/train.py --smoke

A setting is BATCHxSEQUENCE, with a ``c`` for activation checkpointing. Weights are bf16, the optimizer is fused
AdamW, attention is SDPA, tokens are random. Rounds are interleaved (A B C A B C); a row holds the medians over its
rounds. Results go to ``<out>/train-<device>.json``, profiles to ``<out>/profile-<device>.json``.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, tables
from benchmarks.kernels import names

ARMS = ("hf", "ours", "liger", "trl_head", "liger_trl_head", "compile")
MODELS = ("llama-3.2-1b", "qwen2.5-1.5b", "llama-3-8b", "tiny")  # the names of models.py
MEDIANS = ("step_ms", "tokens_per_s", "peak_allocated_gib", "peak_reserved_gib", "first_loss", "last_loss")
PROFILED_STEPS = 3


def setting(text: str) -> dict:
    """``"32x1024c"`` -> batch 32, sequence 1024, checkpointing."""
    match = re.fullmatch(r"(\d+)x(\d+)(c?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected BATCHxSEQUENCE, with a c for checkpointing, as in 32x1024c"
        )
    return {"setting": text, "batch": int(match[1]), "seq": int(match[2]), "checkpointing": bool(match[3])}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names(MODELS), default=["llama-3.2-1b", "qwen2.5-1.5b"])
    parser.add_argument(
        "--settings",
        type=lambda text: [setting(part) for part in text.split(",")],
        default=[setting("8x1024"), setting("32x1024c")],
    )
    parser.add_argument("--arms", type=names(ARMS), default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first timed one")
    parser.add_argument("--steps", type=int, default=15, help="timed steps, whole windows of them")
    parser.add_argument("--window", type=int, default=5, help="steps between two readings of the clock")
    parser.add_argument(
        "--profile", choices=ARMS, metavar="ARM", help=f"profile {PROFILED_STEPS} steps of one arm instead"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result file")
    parser.add_argument("--device-budget", type=float, metavar="SECONDS", help="start no worker after that")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, one round")
    parser.add_argument("--commit", help="what to record as the commit; default $LIGER_COMMIT, else git's")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.warmup < 1 or args.steps < 1 or args.rounds < 1:
        parser.error("--warmup, --steps and --rounds must be at least 1")
    if args.smoke:
        args.models, args.settings, args.rounds, args.warmup, args.steps = ["tiny"], [setting("2x16")], 1, 1, 2
        args.window = 1
    if args.profile:
        args.arms, args.rounds, args.steps, args.window = [args.profile], 1, PROFILED_STEPS, PROFILED_STEPS
    if args.window < 1 or args.steps % args.window:
        parser.error(f"--steps must be a multiple of --window, got {args.steps} and {args.window}")
    return args


def plan(args: argparse.Namespace) -> list[dict]:
    """The workers' jobs in order: a model and setting at a time, its rounds interleaved over the arms."""
    common_part = {
        "warmup": args.warmup,
        "steps": args.steps,
        "window": args.window,
        "device": "cpu" if args.smoke else "cuda",
        "profile": bool(args.profile),
    }
    return [
        {"model": model, **shape, "arm": arm, "round": number, **common_part}
        for model in args.models
        for shape in args.settings
        for number in range(args.rounds)
        for arm in args.arms
    ]


def run_job(job: dict, timeout: float):
    """Run one worker; yields its hello, if it got that far, and exactly one row."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    row = None
    for message in common.run_worker(command, timeout):
        if message["kind"] == "hello":
            yield message
        elif message["kind"] == "row":
            row = message
        elif row is None:
            print(message["tail"], file=sys.stderr)
            note = f"worker ended with status {message['code']}: {message['tail'][-400:]}"
            row = {"kind": "row", "status": "error", "note": note}
    yield row


class Relay:
    """Runs the workers one after another, each already started, with its imports done, while the one before it runs.

    A waiting worker has not touched the device. Its gate, a file, tells it to go or to stop.
    """

    def __init__(self, jobs: list[dict]):
        self.jobs = jobs

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.pool = ThreadPoolExecutor(max_workers=2)
        self.started = {}
        return self

    def __exit__(self, *error):
        for index in self.started:
            if not self._gate(index).exists():
                self._open(index, "stop")
        self.pool.shutdown()
        self.folder.cleanup()

    def _gate(self, index: int) -> Path:
        return Path(self.folder.name) / str(index)

    def _open(self, index: int, word: str) -> None:
        draft = self._gate(index).with_suffix(".draft")
        draft.write_text(word)
        draft.rename(self._gate(index))  # at once, so that no worker reads half of it

    def _start(self, index: int) -> None:
        if index < len(self.jobs) and index not in self.started:
            job = self.jobs[index] | {"gate": str(self._gate(index))}
            self.started[index] = self.pool.submit(lambda: list(run_job(job, timeout=1200)))

    def run(self, job: dict) -> list[dict]:
        """The messages of ``job``'s worker, when it has ended; starts the next one meanwhile."""
        index = self.jobs.index(job)
        self._start(index)
        self._start(index + 1)
        self._open(index, "go")
        return self.started[index].result()

    def skip(self, job: dict) -> None:
        """Do without ``job``."""
        index = self.jobs.index(job)
        if index in self.started:
            self._open(index, "stop")


def combine(job: dict, rounds: list[dict]) -> dict:
    """The row of one arm: medians over its good rounds, or what went wrong in the last one."""
    identity = {k: v for k, v in job.items() if k not in ("round", "device", "profile")}
    good = [r for r in rounds if r["status"] == "ok"]
    last = {k: v for k, v in rounds[-1].items() if k != "kind"}
    if not good:
        return identity | last | {"rounds": 0}
    medians = {f: statistics.median([r[f] for r in good]) if good[0][f] is not None else None for f in MEDIANS}
    extra = {k: v for k, v in good[-1].items() if k.startswith("profile_")}
    failures = [r["note"] for r in rounds if r["status"] != "ok"]
    each = {
        "rounds": len(good),
        "rounds_step_ms": [r["step_ms"] for r in good],
        "steps_ms": [r["steps_ms"] for r in good],
    }
    return identity | {"status": "ok", **medians, **each, "failed_rounds": failures} | extra


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 where our own arm failed."""
    args = parse_args(argv)
    if args.worker:
        from benchmarks import train_worker

        train_worker.main(json.loads(args.worker))
        return 0
    jobs = plan(args)
    end = time.monotonic() + (args.device_budget or 24 * 3600)
    subject = "profile" if args.profile else "train"
    results, rounds, hopeless = None, {}, set()
    progress = common.Progress(len(jobs))
    with Relay(jobs) as relay:
        for job in jobs:
            key = (job["model"], job["setting"], job["arm"])
            left = end - time.monotonic()
            if key in hopeless or left <= 0:  # absent or out of memory: the next round would be the same
                relay.skip(job)
                why = "skipped" if left > 0 else "device budget spent"
                progress.step(f"{' '.join(key)} round {job['round'] + 1}: {why}")
                continue
            for message in relay.run(job):
                if message["kind"] == "hello":
                    if results is None:
                        path = args.out / f"{subject}-{common.slug(message['device'])}.json"
                        results = common.ResultFile(
                            path, ("model", "setting", "arm"), common.provenance(message, args.commit)
                        )
                    continue
                rounds.setdefault(key, []).append(message)
                if message["status"] != "ok":
                    hopeless.add(key)
                if results is not None:
                    results.add(combine(job, rounds[key]))
                progress.step(f"{' '.join(key)} round {job['round'] + 1}: {describe(message)}")
    progress.close()
    if results is None:
        print("no worker started: see the errors above", file=sys.stderr)
        return 1
    if args.profile:
        print(tables.profile_text(results.new))
    print(tables.train_text(results.new))
    print(f"written: {results.path}")
    return int(any(r["arm"] == "ours" and r["status"] != "ok" for r in results.new))


def describe(row: dict) -> str:
    """One round in a few words."""
    if row["status"] != "ok":
        return f"{row['status']} {row.get('note', '')[:200]}"
    numbers = {"ms": row["step_ms"], "tok/s": row["tokens_per_s"], "GiB": row["peak_allocated_gib"]}
    text = " ".join(f"{common.format_number(v)} {k}" for k, v in numbers.items())
    return f"{text} loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
