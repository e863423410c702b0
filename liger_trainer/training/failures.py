"""A run that fails ends at once and with one message, however many processes it has.

Without this, each process would print its own traceback, and those that wait in a collective for one that is gone
would hang until a timeout. Users' side: docs/troubleshooting.md.
"""

import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from ..config import LigerConfig
from .checkpoints import find_checkpoints
from .errors import RecipeError

# Exit statuses, in docs/troubleshooting.md as well. A process that a signal ends has 128 + its number, as in a shell.
ERROR = 1
WRONG_RECIPE = 2
OUT_OF_MEMORY = 12  # ENOMEM
INTERRUPTED = 128 + signal.SIGINT
STOPPED = 128 + signal.SIGTERM

# How long a process whose collective failed waits to be told by the launcher that another process is the cause.
LAUNCHER_SECONDS = 10
GIB = 2**30


class MainProcessError(Exception):
    """The main process failed, and says why itself: raised in the others, which waited for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host: PyTorch has no single exception for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process of the run has failed, or a collective has, which mostly means the same."""
    if isinstance(error, torch.distributed.DistError | MainProcessError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


class FailureGuard:
    """Context of a run: an exception inside of it, or SIGTERM to a launched process, ends the process with a message.

    That is a ``RecipeError``'s own, or says what happened where and how to go on. In a run of several processes, one
    process of a machine prints: the first to fail. It exits without waiting for others or taking down the process
    group, the launcher then ends the rest. ``KeyboardInterrupt`` and ``SystemExit`` pass through in a run of one
    process.
    """

    def __init__(self):
        self.launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.trainer: Trainer | None = None
        self.args: TrainingArguments | None = None
        self._ending = threading.Lock()

    def __enter__(self) -> "FailureGuard":
        return self

    def watch(self, args: TrainingArguments):
        """Tell of ``args``' checkpoints from now on and, in a launched process, answer SIGTERM with a message."""
        self.args = args
        if self.launched and not args.enable_jit_checkpoint:  # which saves on SIGTERM by itself
            _on_sigterm(self._stopped)

    def __exit__(self, kind, error, trace):
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, KeyboardInterrupt) and not self.launched:
            return
        with self._certain_end(ERROR):
            self._fail(error)

    def _fail(self, error: BaseException):
        if isinstance(error, RecipeError):
            self._end(f"liger-trainer: error: {error}", [], WRONG_RECIPE)
        if isinstance(error, KeyboardInterrupt):
            self._end(self._headline("interrupted"), self._checkpoint_lines(), INTERRUPTED)
        if is_out_of_memory(error):
            lines = [*out_of_memory_lines(error, self.args), *self._checkpoint_lines()]
            self._end(self._headline("out of memory"), lines, OUT_OF_MEMORY)
        if self.launched and is_lost_peer(error):
            time.sleep(LAUNCHER_SECONDS)  # SIGTERM ends the process meanwhile, and its message is the better one
        print_first = "".join(traceback.format_exception(error))
        self._end(self._headline(f"stopped by {type(error).__name__}"), self._checkpoint_lines(), ERROR, print_first)

    @contextmanager
    def _certain_end(self, status: int):
        """In a launched process: exit inside of it, or with ``status`` and a traceback if the message fails itself."""
        try:
            yield
        except Exception:
            if not self.launched:
                raise
            with suppress(Exception):  # stderr may be what has failed
                traceback.print_exc()
        finally:
            if self.launched:
                os._exit(status)

    def _stopped(self):
        reason = (
            "the launcher ended this process (SIGTERM): another process of the run was killed or has failed, or the "
            "job was cancelled; the launcher names the process that ended first"
        )
        with self._certain_end(STOPPED):
            self._end(self._headline("stopped"), [reason, *self._checkpoint_lines()], STOPPED)

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
            return [f"no complete checkpoint in {self.args.output_dir}{note}: the next run starts anew"]
        return [
            f"last complete checkpoint: {found.last}",
            f"to go on from it, add: --resume_from_checkpoint {shlex.quote(str(found.last))}",
        ]

    def _end(self, headline: str, lines: list[str], status: int, print_first: str = ""):
        """Print the message, unless another process of this machine has printed one, and exit."""
        message = print_first + "\n  ".join([headline, *lines])
        if not self.launched:
            print(message, file=sys.stderr)
            sys.exit(status)
        # Of the main thread and the one that answers SIGTERM, the first ends the process: nobody gives the lock back.
        self._ending.acquire()
        # No sys.exit: the teardown of Python and NCCL may wait for processes that are gone.
        with self._certain_end(status):
            if not _claim():
                return
            with suppress(OSError, ValueError):  # a pipe that is closed
                sys.stdout.flush()
            try:
                print(message, file=sys.stderr, flush=True)
            finally:
                if status != STOPPED:  # then the launcher knows the cause better
                    _tell_launcher(headline)


def out_of_memory_lines(error: BaseException, args: TrainingArguments | None) -> list[str]:
    """Where memory ran out, how much was in use, and which settings that are not in use yet would need less."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = [str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__]
    lines.append(f"in {frame.name}, {frame.filename}:{frame.lineno}")
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
    elif not (config := LigerConfig.parse(args.liger_config)).low_memory and config.fused_loss:
        # The key replaces the recipe's as a whole, so what that says has to be said again.
        defaults = LigerConfig().to_dict()
        options = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
        advice.append(f"--liger_config {shlex.quote(json.dumps({**options, 'low_memory': True}))}")
    advice.append("a smaller max_length, or sharding over more GPUs (configs/fsdp2.yaml, zero3.yaml)")
    return [*lines, "to need less: " + "; ".join(advice)]


def _claim() -> bool:
    """Whether this process is the first of its machine, in this start of the run, to have something to say.

    torch's launcher, which is accelerate's as well, gives the processes of one start neighbouring folders. Another
    launcher does not, and every process prints its message.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        (Path(error_file).parents[1] / "liger_trainer_failure").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no such folder: better twice than not at all
        return True
    return True


def _tell_launcher(headline: str):
    """Let torch's launcher show ``headline`` as the cause in its summary."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        extra = {"py_callstack": headline, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": headline, "extraInfo": extra}})
        Path(error_file).write_text(content, encoding="utf-8")


def _on_sigterm(act):
    """Call ``act`` in a thread of its own as soon as SIGTERM comes.

    A handler in Python runs when the main thread is back from C++, and one that waits in a collective or for the GPU
    may never be. The interpreter's own handler writes the signal's number to a pipe at once, whatever that thread does.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def tell(number, frame):  # without a handler in Python, the interpreter would write nothing
        with suppress(BlockingIOError):  # the pipe is full, so the thread has something to read
            os.write(writer, bytes([number]))  # once more: the wakeup fd may have been replaced since (asyncio does so)

    signal.signal(signal.SIGTERM, tell)
    # The workers of a data loader are ended by SIGTERM: theirs must not be taken for this process's.
    os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_forget_sigterm)

    def wait():
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        act()

    threading.Thread(target=wait, name="liger_trainer-sigterm", daemon=True).start()


def _hold_sigterm():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget_sigterm():
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release_sigterm()
