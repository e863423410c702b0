"""A run that fails ends at once and with one message, however many processes it has.

Otherwise each process would print its own traceback, and processes that wait in a collective for one that is gone
would hang until a timeout. For users: docs/troubleshooting.md.
"""

import atexit
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..config import LigerConfig
from .checkpoints import find_checkpoints
from .recipe_arguments import RecipeError
from .throughput import GIB

# Exit statuses, also listed in docs/troubleshooting.md.
SUCCESS = 0
ERROR = 1
WRONG_RECIPE = 2
OUT_OF_MEMORY = 12  # ENOMEM
INTERRUPTED = 128 + signal.SIGINT  # as in a shell
STOPPED = 128 + signal.SIGTERM

# Seconds that a process whose collective failed waits for SIGTERM: mostly another process is the cause.
LAUNCHER_SECONDS = 10


class MainProcessError(Exception):
    """Raised in the processes that waited for the main process when that failed; it reports the cause itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the host ran out of memory: PyTorch has no single exception for this."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process of the run failed, or a collective did, which usually means the same."""
    if isinstance(error, torch.distributed.DistError | MainProcessError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def exit_status(error: BaseException) -> int:
    """The status with which a process ends after ``error``."""
    if isinstance(error, RecipeError):
        return WRONG_RECIPE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return OUT_OF_MEMORY if is_out_of_memory(error) else ERROR


class FailureGuard:
    """Context of a run: an exception inside it, or SIGTERM, ends the process with a message.

    The message is the ``RecipeError``'s own, or says what happened where and how to resume. In a run of several
    processes, the first process of a machine to fail prints it. That process exits without waiting for others and
    without tearing down the process group; the launcher then ends the rest. ``SystemExit`` passes through.

    torch's ``record`` decorator is not enough: it reports exceptions alone, from every process, and leaves the exit to
    Python, whose teardown may hang. Only its error file is used, through which the launcher shows the cause.
    """

    def __init__(self) -> None:
        self.launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.trainer: Trainer | None = None
        self.args: TrainingArguments | None = None
        self._ending = threading.Lock()
        self._handler: Any = None  # of SIGTERM, before this run

    def __enter__(self) -> "FailureGuard":
        return self

    def watch(self, args: TrainingArguments) -> None:
        """Report the checkpoints of ``args`` from now on, and answer SIGTERM with a message."""
        self.args = args
        if args.enable_jit_checkpoint:  # saves on SIGTERM by itself
            return
        if self.launched:
            _on_sigterm(lambda: self._end(STOPPED))
        elif threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            handler = signal.signal(signal.SIGTERM, lambda number, frame: self._end(STOPPED))
            self._handler = handler or signal.SIG_DFL
            os.register_at_fork(after_in_child=self._restore_sigterm)  # data loader workers end without a message

    def _restore_sigterm(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore_sigterm()
        if error is None or isinstance(error, SystemExit):
            return
        if self.launched and is_lost_peer(error) and not is_out_of_memory(error):
            time.sleep(LAUNCHER_SECONDS)  # SIGTERM usually arrives first, and its message is better
        self._end(exit_status(error), error)

    def end_success(self) -> None:
        """End a process of several whose run has succeeded, at status 0 whatever the teardown of its libraries does.

        A thread of the process group may still hold a tensor of the last collective, also after
        ``destroy_process_group``. If it frees the tensor while the interpreter shuts down, it waits for the GIL, Python
        ends the thread, and the C++ runtime aborts the process: "terminate called without an active exception"
        (pytorch issue 190489). So the interpreter never shuts down. What it would do first for other code is done here:
        threads that are no daemons finish, and exit handlers run, in which trackers send their last data.
        """
        if not self.launched:
            return
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):  # a closed pipe
            sys.stdout.flush()
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(SUCCESS)

    def _end(self, status: int, error: BaseException | None = None) -> None:
        """Print the message, unless another process of this machine has printed one, and exit."""
        if not self.launched:
            print(self._report(status, error)[1], file=sys.stderr)
            sys.exit(status)
        # The main thread and the SIGTERM thread may both get here. The first to arrive ends the process.
        self._ending.acquire()
        try:
            if not _claim():
                return
            headline, message = self._report(status, error)
            with suppress(OSError, ValueError):  # a closed pipe
                sys.stdout.flush()
            try:
                print(message, file=sys.stderr, flush=True)
            finally:
                if status != STOPPED:  # after SIGTERM the launcher already knows the cause
                    _tell_launcher(headline)
        except Exception:
            with suppress(Exception):  # stderr may be what failed
                traceback.print_exc()
        finally:
            # Not sys.exit: the teardown of Python and NCCL may wait for processes that are gone.
            os._exit(status)

    def _report(self, status: int, error: BaseException | None) -> tuple[str, str]:
        """The first line of the message, and all of it: what happened, where, what helps and how to resume."""
        trace, lines = "", []
        if status == WRONG_RECIPE:
            headline = f"liger-trainer: error: {error}"
        elif status == OUT_OF_MEMORY and error is not None:
            headline, lines = self._headline("out of memory"), out_of_memory_lines(error, self.args)
        elif status == STOPPED:
            headline = self._headline("stopped")
            lines = ["SIGTERM ended this process"]
            if self.launched:
                lines = [
                    "the launcher ended this process (SIGTERM): another process of the run was killed or has failed, "
                    "or the job was cancelled; the launcher names the process that ended first"
                ]
        elif status == INTERRUPTED:
            headline = self._headline("interrupted")
        else:
            headline = self._headline(f"stopped by {type(error).__name__}")
            trace = "".join(traceback.format_exception(error))
        if status != WRONG_RECIPE:
            lines += self._checkpoint_lines()
        return headline, trace + "\n  ".join([headline, *lines])

    def _headline(self, what: str) -> str:
        text = f"liger-trainer: {what}"
        if self.launched and self.args is not None:
            text += f" in rank {os.environ['RANK']} ({socket.gethostname()}, {self.args.device})"
        if self.trainer is not None and self.trainer.state.max_steps > 0:
            text += f", step {self.trainer.state.global_step} of {self.trainer.state.max_steps}"
        return text

    def _checkpoint_lines(self) -> list[str]:
        if self.args is None:
            return []
        try:
            found = find_checkpoints(self.args.output_dir)
        except OSError as error:
            return [f"the checkpoints cannot be read: {error}"]
        if found.last is None:
            note = f" (not complete: {', '.join(path.name for path in found.incomplete)})" if found.incomplete else ""
            return [f"no complete checkpoint in {self.args.output_dir}{note}: the next run starts from scratch"]
        return [
            f"last complete checkpoint: {found.last}",
            f"to resume from it, add: --resume_from_checkpoint {shlex.quote(str(found.last))}",
        ]


def out_of_memory_lines(error: BaseException, args: TrainingArguments | None) -> list[str]:
    """Where memory ran out, how much was in use, and which settings not yet in use would need less."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = [str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__]
    lines.append(f"in {frame.name}, {frame.filename}:{frame.lineno}")
    lines += getattr(error, "__notes__", [])[:1]  # why the micro-batch could not run again
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda
        sizes = {
            "allocated": cuda.memory_allocated(),
            "reserved": cuda.memory_reserved(),
            "allocated at peak": cuda.max_memory_allocated(),
            "in all": cuda.get_device_properties(cuda.current_device()).total_memory,
        }
        lines.append("memory: " + ", ".join(f"{size / GIB:.2f} GiB {name}" for name, size in sizes.items()))
    if args is None:
        return lines
    advice = []
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch > 1:
        parts = next(n for n in range(2, batch + 1) if batch % n == 0)  # a divisor: a step keeps its rows
        advice.append(
            f"--per_device_train_batch_size {batch // parts} --gradient_accumulation_steps {parts * accumulation} "
            f"(now {batch} and {accumulation})"
        )
    if not (args.activation_checkpointing or args.gradient_checkpointing):
        advice.append("--activation_checkpointing true")
    if not getattr(args, "use_liger", False):
        advice.append("--use_liger true")
    elif not (config := LigerConfig.parse(getattr(args, "liger_config", None))).low_memory and config.fused_loss:
        # The override replaces the recipe's liger_config as a whole, so it repeats the options set there.
        defaults = LigerConfig().to_dict()
        options = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
        advice.append(f"--liger_config {shlex.quote(json.dumps({**options, 'low_memory': True}))}")
    advice.append("a smaller max_length, or sharding over more GPUs (configs/fsdp2.yaml, zero3.yaml)")
    return [*lines, "to need less: " + "; ".join(advice)]


def _claim() -> bool:
    """Whether this process is the first of its machine, in this start of the run, to print a message.

    torch's launcher, which accelerate uses too, gives the processes of one start neighbouring folders. Under another
    launcher every process prints its message.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if error_file:
            (Path(error_file).parents[1] / "liger_trainer_failure").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no such folder: better two messages than none
        pass
    return True


def _tell_launcher(headline: str) -> None:
    """Have torch's launcher show ``headline`` as the cause in its summary."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        extra = {"py_callstack": headline, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": headline, "extraInfo": extra}})
        Path(error_file).write_text(content, encoding="utf-8")


def _on_sigterm(act: Callable[[], object]) -> None:
    """Call ``act`` in a thread of its own as soon as SIGTERM arrives.

    A Python handler runs only once the main thread has returned from C++, which it may never do while it waits in a
    collective or for the GPU. The interpreter's own handler writes the signal's number to a pipe at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def tell(number: int, frame: object) -> None:  # without a Python handler the interpreter writes nothing
        with suppress(BlockingIOError):  # the pipe is full, so the thread has something to read
            os.write(writer, bytes([number]))  # asyncio, for example, may have replaced the wakeup fd

    signal.signal(signal.SIGTERM, tell)

    def wait() -> None:
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        act()

    def forget() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    # Data loader workers are ended by SIGTERM. A forked one must not report that as the end of this process.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}),
        after_in_child=forget,
    )
    threading.Thread(target=wait, name="liger_trainer-sigterm", daemon=True).start()
