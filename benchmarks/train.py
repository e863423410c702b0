"""Benchmark of whole training runs: every arm of every round is a fresh ``accelerate launch`` of the recipe's Trainer.

    liger-trainer bench train benchmarks/suites/step_1b.yaml --arms hf,ours --rounds 1
    liger-trainer bench train step_1b --points llama --profile ours
    liger-trainer bench train paper_two_gpus --smoke

A suite (``benchmarks/suites``, form in ``benchmarks/suite.py``) names recipes, what varies, arms and launches. Rounds
are interleaved; a row of the result file ``<out>/train-<suite>-<device>.json`` holds the medians of its rounds and the
rounds themselves. Started again, it goes on where it ended: rounds that are in the file are not repeated.
"""

import argparse
import signal
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, suite, train_rows, train_tables
from benchmarks.kernels import names
from benchmarks.relay import WORKER, Relay
from benchmarks.train_arms import ARMS

PROFILED_STEPS = 3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="liger-trainer bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", type=Path, help="YAML file, or the name of one in benchmarks/suites")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, one round")
    parser.add_argument("--arms", type=names(tuple(ARMS)), help="these of the suite's arms, or others")
    parser.add_argument("--points", metavar="A,B", help="only points with one of these words in their name")
    parser.add_argument("--launches", metavar="A,B", help="only launches with one of these words in their name")
    parser.add_argument("--rounds", type=int, metavar="N", help="in place of the suite's")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result file")
    parser.add_argument("--device-budget", type=float, metavar="SECONDS", help="start no worker that would end later")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for one worker, against a hang")
    parser.add_argument("--profile", choices=ARMS, metavar="ARM", help=f"profile {PROFILED_STEPS} steps of one arm")
    parser.add_argument("--again", action="store_true", help="measure anew what the result file has")
    parser.add_argument("--commit", help="what to record as the commit; default $LIGER_COMMIT, else git's")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    try:
        args.chosen = select(suite.load(args.suite, args.smoke), args)
    except ValueError as error:
        parser.error(str(error))
    return args


def select(whole: suite.Suite, args: argparse.Namespace) -> suite.Suite:
    """The part of the suite that the command line asks for.

    Raises:
        ValueError: words that match no name.
    """
    changes = {
        "points": matching(whole.points, args.points, "--points"),
        "launches": matching(whole.launches, args.launches, "--launches"),
        "arms": tuple(args.arms or whole.arms),
        "rounds": args.rounds or whole.rounds,
    }
    if args.profile:
        once = {"warmup": PROFILED_STEPS, "steps": PROFILED_STEPS, "window": PROFILED_STEPS}
        changes |= {"arms": (args.profile,), "rounds": 1, **once}
    return replace(whole, **changes)


def matching(named: tuple, words: str | None, option: str) -> tuple:
    """Those of ``named`` whose name has one of the comma-separated ``words`` in it."""
    if words is None:
        return named
    found = []
    for word in words.split(","):
        hits = [one for one in named if word.strip().lower() in one.name.lower()]
        if not hits:
            raise ValueError(f"{option}: {word!r} is in no name; there are {', '.join(one.name for one in named)}")
        found += hits
    return tuple(one for one in named if one in found)


def hello(device: str) -> dict:
    """What a process that sees the device says of it.

    Raises:
        RuntimeError: it cannot be reached, with what the process wrote.
    """
    *messages, end = common.run_worker([sys.executable, "-m", WORKER, "--hello", device], timeout=120)
    if not messages:
        raise RuntimeError(f"the {device} device does not answer (--smoke runs without one): {end['tail']}")
    return messages[0]


class Run:
    """One run of a suite against its result file."""

    def __init__(self, args: argparse.Namespace, about_device: dict):
        self.args, device = args, common.slug(about_device["device"])
        ranks = max(processes for _, _, processes in args.chosen.about["places"])  # of the whole suite
        subject = "profile" if args.profile else "train"
        path = args.out / f"{subject}-{args.chosen.name}-{device}{f'-x{ranks}' if ranks > 1 else ''}.json"
        about = {"suite": args.chosen.about}
        self.results = common.ResultFile(path, train_rows.KEYS, common.provenance(about_device, args.commit), about)
        extra = {"device": "cpu" if args.smoke else "cuda", "profile": bool(args.profile)}
        known = {} if args.again else {train_rows.key_of(row): row for row in self.results.rows}
        jobs = [job | extra for job in train_rows.plan(args.chosen)]
        self.rounds = {train_rows.key_of(job): train_rows.kept_rounds(job, known) for job in jobs}
        self.jobs = [job for job in jobs if not self.is_done(job)]
        self.seconds: dict[tuple, list[float]] = {}
        self.end = time.monotonic() + (args.device_budget or 24 * 3600)
        if len(self.jobs) < len(jobs):
            print(f"{len(jobs) - len(self.jobs)} of {len(jobs)} rounds are in {path} (--again measures them anew)")

    def is_done(self, job: dict) -> bool:
        """Whether the result file answers ``job``."""
        rounds = self.rounds[train_rows.key_of(job)]
        return job["round"] < len(rounds) or train_rows.is_settled(rounds)

    def record(self, job: dict, round_: dict) -> None:
        """Add a round to its row and write the file."""
        key = train_rows.key_of(job)
        self.rounds[key].append(round_)
        self.results.add(train_rows.combine(job, self.rounds[key]))

    def expected_seconds(self, job: dict) -> float:
        """How long ``job`` will take, by the jobs of its point and launch so far, or by all of them."""
        here = self.seconds.get((job["point"], job["launch"])) or [s for many in self.seconds.values() for s in many]
        return statistics.mean(here) if here else 0.0

    def work(self) -> bool:
        """Run what is to be run; False where the budget did not suffice."""
        progress = common.Progress(len(self.jobs))
        in_budget = True
        with Relay(self.jobs, self.args.timeout) as relay:
            for index, job in enumerate(self.jobs):
                ranks = f" x {job['processes']}" if job["processes"] > 1 else ""
                title = f"{job['point']}, {job['launch']}{ranks}, {job['arm']}, round {job['round'] + 1}"
                if not in_budget or self.is_done(job):  # absent or out of memory: the next round would be the same
                    relay.skip(index)
                    progress.step(f"{title}: {'skipped' if in_budget else 'device budget spent'}")
                    continue
                missing = train_rows.missing_packages(job)
                in_budget = time.monotonic() + self.expected_seconds(job) <= self.end
                if missing:
                    round_ = {"status": "absent", "note": f"{', '.join(missing)} not installed"}
                elif in_budget:
                    round_ = relay.run(index, self.following(index))
                    self.seconds.setdefault((job["point"], job["launch"]), []).append(round_["seconds"])
                else:
                    relay.skip(index)
                    progress.step(f"{title}: device budget spent")
                    continue
                self.record(job, round_)
                progress.step(f"{title}: {train_rows.describe(round_)}")
        progress.close()
        return in_budget

    def following(self, index: int) -> int:
        """The next job that will need a worker, as far as is known now."""
        for later in range(index + 1, len(self.jobs)):
            if not self.is_done(self.jobs[later]) and not train_rows.missing_packages(self.jobs[later]):
                return later
        return len(self.jobs)


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 1 where our own arm failed, 3 where the budget was spent before the end."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an ordinary end, in which the workers are ended, too
    try:
        run = Run(args, hello("cpu" if args.smoke else "cuda"))
    except RuntimeError as error:
        print(f"liger-trainer bench train: error: {error}", file=sys.stderr)
        return 1
    complete = run.work()
    rows = [row for row in run.results.rows if train_rows.key_of(row) in run.rounds]
    if args.profile:
        print(train_tables.profile_text(rows))
    print(train_tables.train_text(rows, run.args.chosen.about))
    print(f"written: {run.results.path}")
    if any(row["arm"].startswith("ours") and row["status"] == "error" for row in rows):
        return 1
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
