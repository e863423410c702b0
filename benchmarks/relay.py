"""Starts the workers of the training benchmark, each a fresh ``accelerate launch``, and lets them run one by one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import ROOT, write_whole

WORKER = "benchmarks.train_worker"
GRACE_S = 10  # for a launcher to end its ranks
STRAGGLERS_S = 1  # for what is killed to be gone; where nobody reaps the dead, they stay
POLL_S = 0.02
LARGEST_WAVE = 32  # ranks, of some 1 GB of memory each while they wait


def free_port(taken: set[int]) -> int:
    """A port that nobody listens on and that is not in ``taken``, to which it is added."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in taken:
            taken.add(port)
            return port


def environment(job: dict) -> dict[str, str]:
    """The launcher's: as many visible devices as ranks, or the Trainer of a single rank would spread over all."""
    fixed = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if job["overrides"].get("offline"):
        fixed |= {"HF_HUB_OFFLINE": "1"}
    if job["device"] == "cpu":
        fixed |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(job["processes"])))
        fixed |= {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[: job["processes"]])}
    return os.environ | fixed | job["environment"]


class Worker:
    """One launched job; its ranks do their imports and wait at the gate, a file that tells them to go or to stop."""

    def __init__(self, job: dict, folder: Path, module: str, port: int):
        ranks = range(job["processes"])
        self.gate = folder / "gate"
        self.ready, self.rows = ([folder / f"{what}{rank}" for rank in ranks] for what in ("ready", "row"))
        self.log = (folder / "log").open("w+", errors="replace")
        job = job | {"gate": str(self.gate), "owner": os.getpid()}
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / job["config_file"]),
                   "--num_processes", str(job["processes"]), "--main_process_port", str(port),
                   "-m", module, json.dumps(job)]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(job), stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def is_ready(self) -> bool:
        """Whether all its ranks wait at the gate; also where it has ended, so that nobody waits for it."""
        return self.process.poll() is not None or all(file.exists() for file in self.ready)

    def finish(self, timeout: float) -> dict:
        """Let it go and wait for its end: its row, with ``seconds``, or one that says how it failed.

        Where ranks fail, the row is that of the first to do so, whatever the others say.
        """
        start = time.monotonic()
        self._open("go")
        try:
            ending = f"ended with status {self.process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            ending = f"was still running after {timeout:.0f} s"
            self.stop()
        self._end_stragglers()
        with self.log:
            self.log.seek(0)
            text = self.log.read()
        written = sorted((file for file in self.rows if file.exists()), key=lambda file: file.stat().st_mtime_ns)
        rows = [json.loads(file.read_text()) for file in written]
        failed = [row for row in rows if row["status"] != "ok"]
        if not failed and (not rows or self.process.returncode):
            failed = [{"status": "error", "note": f"{ending}: {text[-400:]}"}]
        row = (failed or rows)[0]
        trace = row.pop("traceback", text[-4000:])
        if row["status"] == "error":
            print(trace, file=sys.stderr)
        return row | {"seconds": round(time.monotonic() - start, 1)}

    def stop(self) -> None:
        """End it and its ranks."""
        if self.process.poll() is None:
            self._open("stop")
            self.process.terminate()  # torch's launcher ends its ranks; those of accelerate's are in its process group
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        self._end_stragglers()
        self.process.wait()

    def _end_stragglers(self) -> None:
        """End what a rank has started and left, such as a data loader that still holds the device's files open.

        Ranks of torch's launcher lead process groups of their own; accelerate's are in its group.
        """
        groups = {self.process.pid} | {int(file.read_text() or 0) for file in self.ready if file.exists()} - {0}
        end = time.monotonic() + STRAGGLERS_S
        while groups and time.monotonic() < end:
            self.process.poll()  # or it would stay in its group, dead
            for group in list(groups):
                try:
                    os.killpg(group, signal.SIGKILL)
                except ProcessLookupError:
                    groups.remove(group)
            time.sleep(POLL_S)

    def _open(self, word: str) -> None:
        write_whole(self.gate, word)


class Relay:
    """Runs jobs in order, each in a worker of its own that has done its imports before the first of them trains.

    Imports take a worker up to 20 s and do not touch the device. Beside a job that is measured they would slow its host
    down, by several percent of a step of 0.1 s (benchmarks/NOTES.md); one by one, the device would idle all that time.
    So workers are started in waves, all of one at once, and the first trains when the last is ready.

    Args:
        jobs: all jobs that may run, in their order.
        timeout: seconds a job may take, and a wave to get ready, as the last resort against a hang.
        module: what the ranks run.
        wave: ranks of a wave, at least those of one job; by default one for each processor, at most 32.
    """

    def __init__(self, jobs: list[dict], timeout: float, module: str = WORKER, wave: int | None = None):
        self.jobs, self.timeout, self.module, self.started, self.ports = jobs, timeout, module, {}, set()
        self.wave = wave or min(len(os.sched_getaffinity(0)), LARGEST_WAVE)
        self.wave_seconds = 0.0  # how long the last wave took to get ready

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *error):
        for index in list(self.started):
            self.skip(index)
        self.folder.cleanup()

    def start(self, indexes: Iterable[int]) -> None:
        """Start the workers of a wave, the first ``jobs[i] for i in indexes``, and wait until they are ready."""
        ranks, begin = 0, time.monotonic()
        for index in indexes:
            ranks += self.jobs[index]["processes"]
            if self.started and ranks > self.wave:
                break
            folder = Path(self.folder.name) / str(index)
            folder.mkdir()
            self.started[index] = Worker(self.jobs[index], folder, self.module, free_port(self.ports))
        while time.monotonic() < begin + self.timeout and not all(w.is_ready() for w in self.started.values()):
            time.sleep(POLL_S)
        self.wave_seconds = time.monotonic() - begin

    def run(self, index: int, later: Iterable[int]) -> dict:
        """The row of ``jobs[index]``; where a new wave begins with it, jobs of ``later`` may be of that wave."""
        if index not in self.started:
            self.start([index, *later])
        row = self.started[index].finish(self.timeout)  # until then it is one of those that __exit__ ends
        del self.started[index]
        return row

    def skip(self, index: int) -> None:
        """Do without ``jobs[index]``."""
        if index in self.started:
            worker = self.started.pop(index)
            worker.stop()
            worker.log.close()
