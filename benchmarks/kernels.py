"""Measure single ops: every arm in a process of its own, against the floor measured in the same process.

    liger-trainer bench kernels --shapes anchors --device-budget 300
    liger-trainer bench kernels --ops rms_norm,rope --arms ours,liger --shapes small
    liger-trainer bench kernels --host

Results go to OUT/kernels-DEVICE.json; rows measured again replace the old ones, all others stay. Exit status 1 where
one of our own arms failed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script; benchmarks/ itself must not be on the path: this file would be `import kernels`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import cases, common, tables, workers
from benchmarks.peers import OP_ARMS

KEYS = ("op", "shape", "arm")
HANG_S = 1800  # limit for one worker


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="liger-trainer bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", type=common.names(cases.MEASURED), default=list(cases.MEASURED))
    parser.add_argument("--arms", type=common.names(OP_ARMS), default=list(OP_ARMS))
    parser.add_argument("--shapes", type=common.names(("all", *cases.SETS)), default=["anchors"])
    parser.add_argument("--device-budget", type=float, metavar="SECONDS", help="leave out shapes to end in time")
    parser.add_argument("--host", action="store_true", help="host microseconds per call instead of device time")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    common.add_output_options(parser)
    args = parser.parse_args(argv)
    sets = ["smoke"] if args.smoke else ["host"] if args.host else args.shapes
    args.specs = cases.select(sets, args.ops)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = parse_args(argv)
    workers.end_on_signals()
    end = time.monotonic() + (args.device_budget or 24 * 3600)
    results, failed, rows = None, False, []
    progress = common.Progress(len(args.specs) * len(args.arms))
    for index, arm in enumerate(args.arms):
        seconds = (end - time.monotonic()) / (len(args.arms) - index)
        job = {"arm": arm, "shapes": args.specs, "host": args.host, "device": "cpu" if args.smoke else "cuda"}
        for message in measure_arm(job, seconds):
            if message["kind"] == "hello":
                if results is None:
                    path = common.output_folder(args) / f"kernels-{common.slug(message['device'])}.json"
                    results = common.ResultFile(path, KEYS, common.provenance(message, args.commit))
                continue
            spec, rest = message["spec"], {key: value for key, value in message.items() if key not in ("kind", "spec")}
            shape = spec["shape"] + (" host" if args.host else "")  # beside the op's device times, not in their place
            row = {"op": spec["op"], "shape": shape, "arm": arm, **rest, "spec": spec}
            failed |= arm.startswith("ours") and row["status"] in ("error", "oom", "inexact")
            progress.step(describe(row))
            if results is not None and row["status"] != "unsupported":
                results.add(row)
                rows.append(row)
    if results is None:
        print("no worker started: see the errors above", file=sys.stderr)
        return 1
    for name, table in tables.kernel_tables(rows).items():
        print(f"{name}\n\n{table}\n")
    print(f"written: {results.path}")
    return int(failed)


def measure_arm(job: dict, seconds: float) -> Iterator[dict]:
    """The messages of one arm's worker, and a failed row for each shape that is left where it dies.

    Shapes for which the time does not suffice have no row.
    """
    end, left, last = time.monotonic() + seconds, list(job["shapes"]), {}
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.op_worker", json.dumps(job)]
    for last in workers.run(command, min(seconds, HANG_S), visible):
        if last["kind"] == "row":
            left.remove(last["spec"])
        if last["kind"] != "exit":
            yield last
    if last["code"] == 0 or time.monotonic() > end:
        return
    print(last["log"], file=sys.stderr)
    note = f"worker ended with status {last['code']}: {last['log'][-300:]}"
    yield from ({"kind": "row", "spec": spec, "status": "error", "note": note} for spec in left)


def describe(row: dict) -> str:
    """One line about one row."""
    fields = ("fwd_ms", "bwd_ms", "full_ms", "floor_full_ms", "extra_mib", "host_us", "max_rel_err")
    numbers = " ".join(f"{f}={common.format_number(row[f])}" for f in fields if row.get(f) is not None)
    return f"{row['op']} {row['shape']} {row['arm']} {row['status']} {numbers} {row.get('note', '')}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
