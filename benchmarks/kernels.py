"""Benchmark of single ops: every arm in a process of its own, against the floor measured in the same process.

    python benchmarks/kernels.py --shapes anchors --device-budget 300
    python benchmarks/kernels.py --ops rms_norm,rope --arms ours,liger --shapes small --mode fwd,bwd
    python benchmarks/kernels.py --host

Results go to ``<out>/kernels-<device>.json``; rows measured again replace the old ones, all others stay.
"""

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # run as a script; benchmarks/ itself must not be on the path: this file would be `import kernels`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, shapes, tables

# Ours first, and the slow starter last: what a budget cuts is the end. The names are those of arms.py.
ARMS = ("ours", "hf", "torch", "liger", "trl", "cce", "ours_low_memory", "liger_fp32", "compile")
MODES = ("fwd", "bwd", "full")
KEYS = ("op", "shape", "arm")


def names(allowed: tuple[str, ...]):
    """An argparse type: comma-separated names out of ``allowed``."""

    def parse(text: str) -> list[str]:
        chosen = [n.strip() for n in text.split(",") if n.strip()]
        unknown = [n for n in chosen if n not in allowed]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"{text!r}: allowed are {', '.join(allowed)}")
        return chosen

    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=names(shapes.OPS), default=list(shapes.OPS))
    parser.add_argument("--arms", type=names(ARMS), default=list(ARMS))
    parser.add_argument("--shapes", type=names(("all", *shapes.SETS)), default=["anchors"])
    parser.add_argument("--mode", type=names(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result file")
    parser.add_argument("--device-budget", type=float, metavar="SECONDS", help="drop the last shapes to end in time")
    parser.add_argument("--ignored", type=float, metavar="SHARE", help="share of labels that are -100")
    parser.add_argument("--host", action="store_true", help="host microseconds per call instead of device time")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--commit", help="what to record as the commit; default $LIGER_COMMIT, else git's")
    parser.add_argument("--worker", metavar="ARM", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 where one of our own arms failed."""
    args = parse_args(argv)
    if args.worker:
        from benchmarks import kernel_worker

        kernel_worker.stand_by(args.worker)
        kernel_worker.main(json.loads(sys.stdin.readline()))
        return 0
    sets = ["smoke"] if args.smoke else ["host"] if args.host else args.shapes
    specs = shapes.select(sets, args.ops, args.ignored)
    modes = ["host"] if args.host else args.mode
    device = "cpu" if args.smoke else "cuda"
    end = time.monotonic() + (args.device_budget or 24 * 3600)
    results, failed, rows = None, False, []
    progress = common.Progress(len(specs) * len(args.arms))
    # Imports take up to 20 s. Device times do not depend on what the host does meanwhile; host times do.
    ready = {} if args.host or args.smoke else {arm: start_worker(arm) for arm in args.arms}
    for index, arm in enumerate(args.arms):
        seconds = max(end - time.monotonic(), 0) / (len(args.arms) - index)
        for message in measure_arm(arm, specs, modes, device, seconds, ready.pop(arm, None)):
            if message["kind"] == "hello":
                if results is None:
                    path = args.out / f"kernels-{common.slug(message['device'])}.json"
                    results = common.ResultFile(path, KEYS, common.provenance(message, args.commit))
                continue
            row = to_row(arm, message)
            failed |= arm.startswith("ours") and row["status"] in ("error", "oom", "inexact")
            progress.step(describe(row), quiet=row["status"] in ("absent", "unsupported"))
            # What the budget left out says nothing: an earlier run's row stays.
            if results is not None and row["status"] not in ("unsupported", "dropped"):
                if args.host:  # beside the device times of the same op, not in their place
                    row["shape"] += " host"
                results.add(row)
                rows.append(row)
    progress.close()
    if results is None:
        print("no worker started: see the errors above", file=sys.stderr)
        return 1
    print(tables.kernels_text(rows))
    print(f"written: {results.path}")
    return int(failed)


def start_worker(arm: str) -> common.Worker:
    """A process that imports what ``arm`` needs, without touching the device, and waits for its job."""
    return common.Worker([sys.executable, str(Path(__file__).resolve()), "--worker", arm], waits=True)


def measure_arm(
    arm: str, specs: list[dict], modes: list[str], device: str, seconds: float, worker: common.Worker | None = None
):
    """Run one arm's worker; where it dies, record the shape it died on and go on with the rest in a new one."""
    end, left = time.monotonic() + seconds, list(specs)
    while left:
        available = max(end - time.monotonic(), 0)
        job = {"arm": arm, "shapes": left, "modes": modes, "device": device, "seconds": available}
        worker, current = None, worker or start_worker(arm)
        started, rows = False, 0
        for message in current.messages(min(available * 1.1 + 60, 1800), job):
            if message["kind"] == "row":
                rows += 1
                left.remove(message["spec"])
                yield message
            elif message["kind"] == "hello":
                started = True
                yield message
        if message["code"] == 0:
            return
        note = f"worker ended with status {message['code']}: {message['tail'][-300:]}"
        print(message["tail"], file=sys.stderr)
        lost = 0 if rows else 1  # after a row the next shape may be innocent: a new worker begins with it
        if not started or end < time.monotonic():
            lost = len(left)  # a new worker would fail like this one, or be stopped by the clock at once
        for spec in left[:lost]:
            yield {"kind": "row", "spec": spec, "status": "error", "note": note}
        left = left[lost:]


def to_row(arm: str, message: dict) -> dict:
    """A worker's message as a row of the result file."""
    spec = message["spec"]
    rest = {k: v for k, v in message.items() if k not in ("kind", "spec")}
    return {"op": spec["op"], "shape": shapes.shape_name(spec), "arm": arm, **rest, "spec": spec}


def describe(row: dict) -> str:
    """One line about one row."""
    fields = ("fwd_ms", "bwd_ms", "full_ms", "floor_full_ms", "extra_mib", "host_us", "host_launch_us", "max_rel_err")
    numbers = " ".join(f"{f}={common.format_number(row[f])}" for f in fields if row.get(f) is not None)
    return f"{row['op']} {row['shape']} {row['arm']} {row['status']} {numbers} {row.get('note', '')}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
