"""Benchmark of whole training runs: every arm of every round is a fresh ``accelerate launch`` of the recipe's Trainer.

    liger-trainer bench train benchmarks/suites/step_1b.yaml --arms hf,ours --rounds 1
    liger-trainer bench train step_1b --points llama --profile ours
    liger-trainer bench train paper_two_gpus --smoke

A suite (``benchmarks/suites``, form in ``benchmarks/suite.py``) names recipes, what varies, arms and launches. Rounds
are interleaved; a row of the result file ``<out>/train-<suite>-<device>.json`` holds the medians of its rounds and the
rounds themselves. Started again, it goes on where it ended: rounds that are in the file are not repeated, unless what
they measured has changed since (``fingerprint.py``).

Exit statuses: 1 where our own arm failed, 3 where something was left out: the device budget was spent before the end,
or a launch has more processes than there are devices.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, suite, train_rows, train_tables
from benchmarks.fingerprint import fingerprint
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
    parser.add_argument("--points", metavar="A,B", help="only points of these names or words")
    parser.add_argument("--launches", metavar="A,B", help="only launches of these names or words")
    parser.add_argument("--rounds", type=int, metavar="N", help="in place of the suite's")
    parser.add_argument(
        "--out", type=Path, help="folder of the result file; default benchmarks/results, with --smoke a temporary one"
    )
    parser.add_argument("--device-budget", type=float, metavar="SECONDS", help="start no worker that would end later")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for one worker, against a hang")
    parser.add_argument("--profile", choices=ARMS, metavar="ARM", help=f"profile {PROFILED_STEPS} steps of one arm")
    parser.add_argument(
        "--again", action="store_true", help="measure anew what the file has; --smoke and --profile always do"
    )
    parser.add_argument("--keep-old", action="store_true", help="keep rounds of other code and packages, too")
    parser.add_argument("--commit", help="what to record as the commit; default $LIGER_COMMIT, else git's")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.again = args.again or args.smoke or args.profile is not None
    if args.again and args.keep_old:
        parser.error("--keep-old cannot go with --again, --smoke or --profile, which measure everything anew")
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
        points = tuple(replace(point, **once) for point in changes["points"])
        changes |= {"arms": (args.profile,), "rounds": 1, "points": points}
    return replace(whole, **changes)


def matching(named: tuple, words: str | None, option: str) -> tuple:
    """Those of ``named`` whose name is, or else has in it, one of the comma-separated ``words``."""
    if words is None:
        return named
    found = []
    for word in words.split(","):
        wanted = word.strip().lower()
        hits = [one for one in named if one.name.lower() == wanted] or [
            one for one in named if wanted and wanted in one.name.lower()
        ]
        if not hits:
            raise ValueError(f"{option}: {word!r} is in no name; there are {', '.join(one.name for one in named)}")
        found += hits
    return tuple(one for one in named if one in found)


def hello(device: str) -> dict:
    """What a process that sees the device says of it.

    Raises:
        RuntimeError: it cannot be reached, with what the process wrote.
    """
    command = [sys.executable, "-m", WORKER, "--hello", device]
    *messages, end = common.run_worker(command, timeout=120, all_devices=True)
    if not messages:
        raise RuntimeError(f"the {device} device does not answer (--smoke runs without one): {end['tail']}")
    return messages[0]


def launchable(chosen: suite.Suite, devices: int | None) -> suite.Suite:
    """The suite without the launches that need more than ``devices`` (None: any number), which it prints.

    Raises:
        ValueError: none is left.
    """
    left = tuple(launch for launch in chosen.launches if devices is None or launch.num_processes <= devices)
    over = [f"{one.name} x {one.num_processes}" for one in chosen.launches if one not in left]
    if over:
        problem = f"more processes than the {devices} devices here: {', '.join(over)}"
        if not left:
            raise ValueError(f"{chosen.name}: all launches have {problem}")
        print(f"left out, {problem}")
    return replace(chosen, launches=left)


class Run:
    """One run of a suite against its result file.

    Args:
        args: as ``parse_args`` makes them.
        about_device: what a worker said of its device, how many of them there are, and its packages.

    Raises:
        ValueError: the result file is of another suite of the same name; no launch has few enough processes.
    """

    def __init__(self, args: argparse.Namespace, about_device: dict):
        self.args, device = args, common.slug(about_device["device"])
        self.suite = launchable(args.chosen, about_device["devices"])
        self.left_out = len(self.suite.launches) < len(args.chosen.launches)
        ranks = max(processes for _, _, processes in args.chosen.about["places"])  # of the whole suite
        subject = "profile" if args.profile else "train"
        out = args.out or (Path(tempfile.mkdtemp(prefix="liger-bench-")) if args.smoke else common.RESULTS)
        path = out / f"{subject}-{args.chosen.name}-{device}{f'-x{ranks}' if ranks > 1 else ''}.json"
        check_same_suite(path, args.chosen)
        about = {"suite": args.chosen.about}
        self.results = common.ResultFile(path, train_rows.KEYS, common.provenance(about_device, args.commit), about)
        extra = {"device": "cpu" if args.smoke else "cuda", "profile": bool(args.profile)}
        known = {} if args.again else {train_rows.key_of(row): row for row in self.results.rows}
        jobs = [job | extra for job in train_rows.plan(self.suite)]
        jobs = [job | {"fingerprint": fingerprint(job, about_device["packages"])} for job in jobs]
        self.rounds = {train_rows.key_of(job): train_rows.kept_rounds(job, known, args.keep_old) for job in jobs}
        self.jobs = [job for job in jobs if not self.is_done(job)]
        self.seconds: dict[tuple, list[float]] = {}
        self.end = time.monotonic() + (24 * 3600 if args.device_budget is None else args.device_budget)
        if len(self.jobs) < len(jobs):
            print(f"{len(jobs) - len(self.jobs)} of {len(jobs)} rounds are in {path} (--again measures them anew)")

    def is_done(self, job: dict) -> bool:
        """Whether the result file answers ``job``."""
        rounds = self.rounds[train_rows.key_of(job)]
        return job["round"] < len(rounds) or train_rows.is_settled(rounds)

    def record(self, job: dict, round_: dict) -> None:
        """Add a round to its row, hold the rows of its place against HF's, and write the file."""
        key, place = train_rows.key_of(job), train_rows.place_of(job)
        self.rounds[key].append(round_ | {"fingerprint": job["fingerprint"]})

        def judged(rows: list[dict]) -> list[dict]:
            hf = next((r for r in rows if train_rows.place_of(r) == place and r["arm"] == "hf"), None)
            return [train_rows.judge(r, hf) if train_rows.place_of(r) == place else r for r in rows]

        self.results.add(train_rows.combine(job, self.rounds[key]), judged)

    def rows(self) -> list[dict]:
        """The rows that this run is about."""
        return [row for row in self.results.rows if train_rows.key_of(row) in self.rounds]

    def about(self) -> dict:
        """The part of ``suite.about`` that this run is about."""
        places = [
            [p.name, launch.name, launch.num_processes] for p in self.suite.points for launch in self.suite.launches
        ]
        return self.suite.about | {"places": places, "arms": list(self.suite.arms)}

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
                waiting = 0.0 if index in relay.started else relay.wave_seconds
                in_budget = time.monotonic() + waiting + self.expected_seconds(job) <= self.end
                if missing:
                    round_ = {"status": "absent", "note": f"{', '.join(missing)} not installed"}
                elif in_budget:
                    round_ = relay.run(index, self.later(index))
                    self.seconds.setdefault((job["point"], job["launch"]), []).append(round_["seconds"])
                else:
                    relay.skip(index)
                    progress.step(f"{title}: device budget spent")
                    continue
                self.record(job, round_)
                progress.step(f"{title}: {train_rows.describe(round_)}")
        progress.close()
        return in_budget

    def later(self, index: int) -> list[int]:
        """The jobs after ``index`` that will need a worker, as far as is known now."""
        behind = range(index + 1, len(self.jobs))
        return [i for i in behind if not self.is_done(self.jobs[i]) and not train_rows.missing_packages(self.jobs[i])]


def check_same_suite(path: Path, chosen: suite.Suite) -> None:
    """Refuse a result file ``path`` of a namesake of ``chosen``: another title, or none of its recipes.

    Raises:
        ValueError: it is one.
    """
    if not path.exists():
        return
    data = json.loads(path.read_text())
    title, recipes = data.get("suite", {}).get("title"), {row["recipe"] for row in data["results"] if "recipe" in row}
    if title == chosen.about["title"] and (not recipes or recipes & set(chosen.about["recipes"])):
        return
    raise ValueError(
        f"{path} has the results of another suite of this name, {title!r} with the recipes "
        f"{', '.join(sorted(recipes))}; give --out another folder"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the suite; see above for the exit statuses."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an ordinary end, in which the workers are ended, too
    try:
        run = Run(args, hello("cpu" if args.smoke else "cuda"))
    except (RuntimeError, ValueError) as error:
        print(f"liger-trainer bench train: error: {error}", file=sys.stderr)
        return 1
    complete = run.work() and not run.left_out
    rows = run.rows()
    if args.profile:
        print(train_tables.profile_text(rows))
    print(train_tables.train_text(rows, run.about()))
    print(f"written: {run.results.path}")
    if any(train_rows.has_failed(row) for row in rows):
        return 1
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
