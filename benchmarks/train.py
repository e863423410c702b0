"""Measure whole training runs: every arm of every round is a fresh ``accelerate launch`` of the recipe's Trainer.

    liger-trainer bench train benchmarks/suites/step_1b.yaml --arms hf,ours --rounds 1
    liger-trainer bench train step_1b --points llama --profile ours
    liger-trainer bench train paper_two_gpus --smoke

A suite (benchmarks/suites; benchmarks/suite.py describes the format) names recipes, what varies, arms and launches.
Rounds are interleaved; a row of the result file OUT/train-SUITE-DEVICE.json holds the medians of its rounds and the
rounds themselves. A second start resumes: rounds in the file are not repeated if they were measured with the same
settings, commit, device and packages.

Exit statuses: 1 if our own arm failed; 3 if something was left out, because the device budget was spent or a
launch has more processes than there are devices.
"""

import argparse
import importlib.util
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script; see kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from benchmarks import common, rows, suite, tables, workers
from benchmarks.peers import PEERS, TRAIN_ARMS

WORKER = "benchmarks.train_worker"
PROFILED_STEPS = 3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line; ``chosen`` is the part of the suite that it asks for."""
    parser = argparse.ArgumentParser(
        prog="liger-trainer bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", type=Path, help="YAML file, or the name of one in benchmarks/suites")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, one round")
    parser.add_argument("--arms", type=common.names(TRAIN_ARMS), help="these arms instead of the suite's")
    parser.add_argument("--points", metavar="A,B", help="only points with these names, or these words in their names")
    parser.add_argument("--launches", metavar="A,B", help="only launches with these names, or these words in them")
    parser.add_argument("--rounds", type=int, metavar="N", help="number of rounds, instead of the suite's")
    parser.add_argument("--device-budget", type=float, metavar="SECONDS", help="start no run that may exceed this")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="limit of one run")
    parser.add_argument("--profile", choices=TRAIN_ARMS, metavar="ARM", help=f"profile {PROFILED_STEPS} steps")
    parser.add_argument("--again", action="store_true", help="repeat rounds that are already in the result file")
    common.add_output_options(parser)
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}; must be at least 1")
    try:
        whole = suite.load(args.suite, args.smoke)
        changes: dict[str, Any] = {
            "points": matching(whole.points, "point", args.points),
            "launches": matching(whole.launches, "launch", args.launches),
            "arms": tuple(args.arms or whole.arms),
            "rounds": args.rounds or whole.rounds,
        }
    except ValueError as error:
        parser.error(str(error))
    if args.profile:
        once = {"warmup": PROFILED_STEPS, "steps": PROFILED_STEPS, "window": PROFILED_STEPS}
        changes |= {"arms": (args.profile,), "rounds": 1, "points": tuple(p | once for p in changes["points"])}
    args.chosen, args.device = replace(whole, **changes), "cpu" if args.smoke else whole.about["device"]
    return args


def matching(entries: tuple[dict, ...], kind: str, words: str | None) -> tuple[dict, ...]:
    """The entries named by the comma-separated ``words``; a word that names none selects every name it is part of."""
    if words is None:
        return entries
    names, found = [entry[kind].lower() for entry in entries], set()
    for word in (word.strip().lower() for word in words.split(",")):
        hits = {name for name in names if name == word} or {name for name in names if word and word in name}
        if not hits:
            raise ValueError(f"--{kind}s: got {word!r}; must be part of one of {', '.join(names)}")
        found |= hits
    return tuple(entry for entry in entries if entry[kind].lower() in found)


def hello(device: str) -> dict:
    """Facts about the device, from a process that sees it.

    Raises:
        RuntimeError: the device cannot be reached; the message has the process's output.
    """
    first, *rest = workers.run([sys.executable, "-m", WORKER, "--hello", device], timeout=120)
    if not rest:
        raise RuntimeError(f"the {device} device does not answer (--smoke runs without one): {first['log']}")
    return first


def environment(job: dict) -> dict[str, str]:
    """The launcher's variables: as many visible devices as ranks, or a single rank's Trainer would use all devices."""
    fixed = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if job["overrides"].get("offline"):
        fixed["HF_HUB_OFFLINE"] = "1"
    if job["device"] == "cpu":
        fixed |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(job["processes"])))
        fixed["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: job["processes"]])
    return fixed | job["environment"]


def launch(jobs: list[dict], timeout: float, module: str = WORKER) -> list[dict]:
    """Train ``jobs``, which share arm and launch, and return their rounds, with ``seconds`` of all.

    A failed round says how it failed; if several ranks fail, it is the first one's. Jobs after it fail with it.
    """
    job = jobs[0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", job["config_file"],
               "--num_processes", str(job["processes"]), "--main_process_port", port, "-m", module,
               json.dumps(jobs)]  # fmt: skip
    start = time.monotonic()
    *sent, end = workers.run(command, timeout, environment(job))
    failed = [message for message in sent if message["status"] != "ok"]
    if not failed and (len(sent) < len(jobs) or end["code"] != 0):
        ending = f"was still running after {timeout:.0f} s" if end["code"] is None else f"ended with {end['code']}"
        failed = [{"status": "error", "note": f"{ending}: {end['log'][-400:]}"}]
    if failed:  # Jobs that ended before the failure keep their rows. The last job has failed, even if it sent one.
        if failed[0]["status"] == "error":
            print(end["log"], file=sys.stderr)
        done = [message for message in sent if message["status"] == "ok"][: len(jobs) - 1]
        sent = done + failed[:1] * (len(jobs) - len(done))
    seconds = {"seconds": round(time.monotonic() - start, 1)}
    return [{key: value for key, value in row.items() if key != "kind"} | seconds for row in sent]


def missing_packages(job: dict) -> list[str]:
    """Packages that the job's arm or launch needs and that are not installed."""
    engine = yaml.safe_load((workers.ROOT / job["config_file"]).read_text())["distributed_type"]
    lacks_deepspeed = engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None
    return [*PEERS[job["arm"]].missing(), *(["deepspeed"] if lacks_deepspeed else [])]


class Run:
    """One run of a suite against its result file.

    Args:
        args: the result of ``parse_args``.
        about_device: a worker's facts about its device, how many there are, and its packages.
    """

    def __init__(self, args: argparse.Namespace, about_device: dict):
        self.args, self.suite, about, devices = args, args.chosen, args.chosen.about, about_device["devices"]
        ranks = max(processes for _, _, processes in about["places"])  # of the whole suite
        name = f"{about['name']}-{common.slug(about_device['device'])}" + (f"-x{ranks}" if ranks > 1 else "")
        path = common.output_folder(args) / f"{'profile' if args.profile else 'train'}-{name}.json"
        run, extra = common.provenance(about_device, args.commit), {"device": args.device}
        self.results = common.ResultFile(path, rows.KEYS, run, {"suite": about})
        jobs = [job | extra | {"profile": bool(args.profile)} for job in self.suite.jobs()]
        self.jobs = [job for job in jobs if devices is None or job["processes"] <= devices]
        over = dict.fromkeys(f"{job['launch']} x {job['processes']}" for job in jobs if job not in self.jobs)
        if over:
            print(f"left out, more processes than the {devices} devices here: {', '.join(over)}")
        self.complete = not over
        anew = args.again or args.smoke or args.profile
        known = {} if anew else {rows.key_of(row): row for row in self.results.rows}
        self.rounds = {
            key: rows.kept_rounds(job, known.get(key), run)
            for key, job in ((rows.key_of(job), job) for job in self.jobs)
        }
        self.seconds: dict[tuple, float] = {}  # duration of the last run at each place
        self.end = time.monotonic() + (24 * 3600 if args.device_budget is None else args.device_budget)
        if done := sum(map(self.is_done, self.jobs)):
            print(f"{done} of {len(self.jobs)} rounds are in {path} (--again repeats them)")

    def is_done(self, job: dict) -> bool:
        """Whether ``job`` has its round, or another round would only repeat a failure."""
        rounds = self.rounds[rows.key_of(job)]
        return job["round"] < len(rounds) or rows.is_settled(rounds)

    def record(self, job: dict, round_: dict) -> None:
        """Add a round to its row and write the file."""
        self.rounds[rows.key_of(job)].append(round_)
        self.results.add(rows.combine(job, self.rounds[rows.key_of(job)]))

    def rows(self) -> list[dict]:
        """The rows that this run is about, compared with HF's."""
        return [row for row in rows.judge(self.results.rows) if rows.key_of(row) in self.rounds]

    def about(self) -> dict:
        """The part of ``suite.about`` that this run is about."""
        places = [list(place) for place in dict.fromkeys(rows.place_of(job) for job in self.jobs)]
        return self.suite.about | {"places": places, "arms": list(self.suite.arms)}

    def work(self) -> None:
        """Run the jobs, as far as the budget allows."""
        left = [job for job in self.jobs if not self.is_done(job)]
        if self.suite.about["curves"]:
            self.work_at_once(left)
            return
        progress = common.Progress(len(left))
        for job in left:
            ranks, place = f" x {job['processes']}" if job["processes"] > 1 else "", rows.place_of(job)
            title = f"{job['point']}, {job['launch']}{ranks}, {job['arm']}, round {job['round'] + 1}"
            expected = self.seconds.get(place, max(self.seconds.values(), default=0))
            if self.is_done(job):
                progress.step(f"{title}: skipped")
            elif time.monotonic() + expected > self.end:
                self.complete = False
                progress.step(f"{title}: device budget spent")
            else:
                missing = missing_packages(job)
                round_ = {"status": "absent", "note": f"{', '.join(missing)} not installed"}
                if not missing:
                    (round_,) = launch([job], self.args.timeout)
                    self.seconds[place] = round_["seconds"]
                self.record(job, round_)
                progress.step(f"{title}: {rows.describe(round_)}")

    def work_at_once(self, left: list[dict]) -> None:
        """Run the jobs of each arm in one process, and all arms at the same time: their times mean nothing."""
        arms = [[job for job in left if job["arm"] == arm] for arm in dict.fromkeys(job["arm"] for job in left)]
        progress = common.Progress(len(left))
        with ThreadPoolExecutor(max(1, len(arms))) as pool:
            for jobs, rounds in zip(arms, pool.map(lambda jobs: launch(jobs, self.args.timeout), arms), strict=True):
                for job, round_ in zip(jobs, rounds, strict=True):
                    self.record(job, round_)
                    progress.step(f"{job['point']}, {job['arm']}: {rows.describe(round_)}")


def main(argv: list[str] | None = None) -> int:
    """Run the suite."""
    args = parse_args(argv)
    workers.end_on_signals()
    try:
        run = Run(args, hello(args.device))
    except RuntimeError as error:
        print(f"liger-trainer bench train: error: {error}", file=sys.stderr)
        return 1
    run.work()
    measured = run.rows()
    if args.profile:
        print(tables.profile_text(measured))
    curves = args.chosen.about["curves"]
    print(tables.convergence_table(measured) if curves else tables.Training(measured, run.about()).full())
    print(f"written: {run.results.path}")
    if any(rows.has_failed(row) for row in measured):
        return 1
    return 0 if run.complete else 3


if __name__ == "__main__":
    sys.exit(main())
