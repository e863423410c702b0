"""Start a worker process, read its JSON messages, and stop it and all its child processes. Imports no torch."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = "LIGER_BENCH_MESSAGES"  # variable: path of the file to which a worker's processes append messages
POLL_S = 0.1  # seconds between two looks at the messages
KILL_S = 10  # seconds to wait for killed processes to disappear


def emit(message: dict) -> None:
    """Send one message from a worker: a whole line at once, since several ranks write to the same file."""
    with open(os.environ[MESSAGES], "ab", buffering=0) as file:
        file.write(json.dumps(message).encode() + b"\n")


def run(command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None) -> Iterator[dict]:
    """Run ``command`` in the checkout and yield its messages as they come.

    The last one is ``{"kind": "exit", "code": int | None, "log": str}``: the exit status, None for a worker that was
    still running after ``timeout`` seconds, and the end of what it printed. When this generator ends, for any
    reason, no process that the worker started is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        messages, log = Path(folder) / "messages", Path(folder) / "log"
        messages.touch()
        fixed = {MESSAGES: str(messages), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(environment or {}), **fixed}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        end, code, over = time.monotonic() + timeout, None, False
        try:
            with messages.open() as lines:
                while not over:
                    code = process.poll()
                    over = code is not None or time.monotonic() > end
                    yield from map(json.loads, lines)
                    time.sleep(0 if over else POLL_S)
        finally:
            _stop(process, f"{MESSAGES}={messages}".encode())
        yield {"kind": "exit", "code": code, "log": log.read_text(errors="replace")[-4000:].strip()}


def _stop(process: subprocess.Popen, mark: bytes) -> None:
    """Kill the worker and every process with its environment: ranks, and data loaders, which keep the device open."""
    process.kill()
    process.wait()
    end = time.monotonic() + KILL_S
    while (left := list(_processes_with(mark))) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _processes_with(mark: bytes) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in entry.read_bytes():
                yield int(entry.parent.name)


def end_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into ordinary exits, so that running workers are stopped as well."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
