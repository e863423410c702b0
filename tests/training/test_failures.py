"""Runs that fail: they end at once, say why once, and their last complete checkpoint can be resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from launching import CPU_ENVIRONMENT, TESTS, TORCHRUN
from safetensors.torch import load_file
from tiny_recipes import write_recipe

from liger_trainer import LigerTrainingArguments
from liger_trainer.training import build, failures, train
from liger_trainer.training.checkpoints import find_checkpoints, resume_path
from liger_trainer.training.failures import (
    INTERRUPTED,
    OUT_OF_MEMORY,
    STOPPED,
    WRONG_RECIPE,
    FailureGuard,
    MainProcessError,
    is_lost_peer,
    is_out_of_memory,
    out_of_memory_lines,
)
from liger_trainer.training.recipe import _check, parse_recipe
from liger_trainer.training.recipe_arguments import RecipeError

ENVIRONMENT = {**CPU_ENVIRONMENT, "TRITON_INTERPRET": "0"}
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2",
    "--config_file", str(TESTS.parent / "configs" / "ddp.yaml"), "--main_process_port", "0", "-m",
]  # fmt: skip
TRAINING = {
    "dataset": "synthetic", "synthetic_examples": 64, "max_length": 16, "per_device_train_batch_size": 2,
    "max_steps": 5, "learning_rate": 0.01, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, **TRAINING)


def start(*command):
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    """The output of the launcher and its processes, and separately the launcher's own summary."""
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    said, _, summary = output.partition("ChildFailedError")
    return said, summary


def test_a_killed_rank_ends_the_run_and_the_last_checkpoint_resumes(recipe, tmp_path):
    killed = start(*ACCELERATE, "ranks.failing", "killed", recipe)
    whole = [recipe, "--output_dir", str(tmp_path / "whole"), "--save_strategy", "no"]
    train.main([*whole, "--per_device_train_batch_size", "4"])  # what two ranks with 2 see
    said, summary = finish(killed)
    assert killed.returncode == 1
    assert said.count("liger-trainer: ") == 1
    assert "liger-trainer: stopped in rank 0" in said
    assert "another process of the run was killed" in said
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert f"--resume_from_checkpoint {checkpoint}" in said
    assert "SIGKILL" in summary

    half_written = tmp_path / "out" / "checkpoint-4"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    resumed = start(*TORCHRUN, "ranks.failing", "never", recipe, "--resume_from_checkpoint", "true")
    said, _ = finish(resumed)
    assert resumed.returncode == 0, said
    assert said.count(f"liger-trainer: resuming from {checkpoint}") == 1
    assert said.count("a thread ended") == said.count("an exit handler ran") == 2, "what Python does before its end"
    actual, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("out", "whole"))
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert (actual[name] - weight).norm() < 1e-5 * weight.norm(), name


def test_out_of_memory_in_one_rank_ends_all(recipe):
    process = start(*TORCHRUN, "ranks.failing", "out_of_memory", recipe)
    said, summary = finish(process)
    assert process.returncode == 1
    assert said.count("liger-trainer: ") == 1
    assert "liger-trainer: out of memory in rank 1" in said
    assert "step 3 of 5\n  CUDA out of memory. Tried to allocate 3.00 GiB.\n  in on_step_end, " in said
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 2 (now 2 and 1)" in said
    assert "--use_liger true" not in said
    assert "out/checkpoint-2\n" in said
    assert "Traceback" not in said.partition("torch/distributed/elastic")[0]
    assert f"exitcode  : {OUT_OF_MEMORY}" in summary
    assert "traceback : liger-trainer: out of memory in rank 1" in summary


def test_a_wrong_recipe_is_named_once(recipe):
    process = start(*TORCHRUN, "liger_trainer.train", recipe, "--max_stepz", "3")
    said, summary = finish(process)
    assert process.returncode == 1
    assert said.count("liger-trainer: error: command line: unknown key 'max_stepz' (did you mean 'max_steps'?)") == 1
    assert f"exitcode  : {WRONG_RECIPE}" in summary


def test_more_processes_than_gpus_are_rejected(recipe, monkeypatch):
    parsed = parse_recipe([recipe])
    training = SimpleNamespace(world_size=3, device=torch.device("cuda:0"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match="launched 3 processes on a machine with 2 GPUs: launch with --num_processes 2"
    ):
        _check(parsed._replace(training=training))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    _check(parsed._replace(training=training))


def test_one_process_fails_with_a_message_and_a_status(recipe, tmp_path, monkeypatch, capsys):
    class Broken:
        state = type("State", (), {"global_step": 7, "max_steps": 9})

        def train(self, resume_from_checkpoint):
            raise self.error

        def is_world_process_zero(self):
            return True

    monkeypatch.setattr(train, "build_trainer", lambda recipe: Broken())
    Broken.error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    with pytest.raises(SystemExit, match=str(OUT_OF_MEMORY)):
        train.main([recipe])
    said = capsys.readouterr().err
    assert "liger-trainer: out of memory, step 7 of 9\n  [enforce fail]" in said
    assert f"no complete checkpoint in {tmp_path / 'out'}: the next run starts from scratch" in said

    Broken.error = ZeroDivisionError("why")
    with pytest.raises(SystemExit, match="1"):
        train.main([recipe])
    assert "ZeroDivisionError: why\nliger-trainer: stopped by ZeroDivisionError, step 7 of 9" in capsys.readouterr().err

    Broken.error = KeyboardInterrupt()
    with pytest.raises(SystemExit, match=str(INTERRUPTED)):
        train.main([recipe])
    assert "liger-trainer: interrupted, step 7 of 9\n  no complete checkpoint in" in capsys.readouterr().err

    with pytest.raises(SystemExit, match=str(WRONG_RECIPE)):
        train.main([recipe, "--resume_from_checkpoint", "true"])
    assert "no complete checkpoint in output_dir" in capsys.readouterr().err


def test_what_only_the_data_shows_is_a_wrong_recipe_too(recipe, tmp_path, monkeypatch, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Why?", "completion": "So."}\n')
    argv = [recipe, "--dataset", str(pairs)]
    for more, message in (
        (["--response_marker", "?"], "response_marker needs a text column; the dataset has prompt, completion"),
        (["--text_column", "story"], "dataset has no column 'story': its columns are ['prompt', 'completion']"),
        ([], "vocab_size: got 131; must be at least 261"),
    ):
        with pytest.raises(SystemExit, match=str(WRONG_RECIPE)):
            train.main([*argv, *more])
        said = capsys.readouterr().err
        assert f"liger-trainer: error: {message}\n" in said
        assert "Traceback" not in said

    def broken(argv):
        raise TypeError("a bug")

    monkeypatch.setattr(train, "with_largest_batch", broken)
    with pytest.raises(SystemExit, match="1"):
        train.main([recipe, "--auto_batch_size", "true"])
    assert "TypeError: a bug\nliger-trainer: stopped by TypeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [(RecipeError("no such key"), RecipeError), (KeyError("bug"), MainProcessError), (ValueError(), MainProcessError)],
)
def test_an_error_of_the_main_process_reaches_the_others(error, elsewhere, monkeypatch):
    sent = []

    def fail():
        raise error

    def as_rank(rank, broadcast):
        monkeypatch.setattr(build, "PartialState", lambda: SimpleNamespace(is_main_process=rank == 0))
        monkeypatch.setattr(build, "broadcast_object_list", broadcast)

    as_rank(0, lambda box: sent.extend(box) or box)
    with pytest.raises(type(error)) as own:
        build.from_main_process(fail)
    assert own.value is error
    as_rank(1, lambda box: sent)
    with pytest.raises(elsewhere, match=str(error) or "the main process failed: ValueError") as told:
        build.from_main_process(fail)
    assert is_lost_peer(told.value) is (elsewhere is MainProcessError)


def advice(args):
    try:
        raise torch.OutOfMemoryError("out of memory")
    except torch.OutOfMemoryError as error:
        return out_of_memory_lines(error, args)[-1]


def test_advice_keeps_the_rows_of_a_step_and_the_options(tmp_path):
    def arguments(batch, accumulation, **options):
        return LigerTrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **options
        )

    said = advice(arguments(3, 2, use_liger=True, liger_config={"rope": False}))
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 6 (now 3 and 2)" in said
    assert """--liger_config '{"rope": false, "low_memory": true}'""" in said
    assert "--per_device_train_batch_size 3 --gradient_accumulation_steps 3 (now 9 and 1)" in advice(arguments(9, 1))
    for options in ({"low_memory": True}, {"fused_loss": False}):
        said = advice(arguments(1, 4, use_liger=True, liger_config=options, activation_checkpointing=True))
        assert said.startswith("to need less: a smaller max_length, or sharding")


def test_which_errors_mean_what():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory"))
    assert not is_out_of_memory(KeyError("out of memory"))
    assert is_lost_peer(torch.distributed.DistBackendError("NCCL error"))
    assert is_lost_peer(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not is_lost_peer(RuntimeError("size mismatch"))


def test_sigterm_is_answered_while_the_main_thread_waits_in_cpp(tmp_path):
    """As in a collective whose peer is gone; and a forked worker still ends by SIGTERM, without a word."""
    code = f"""
import os, signal
from datetime import timedelta
from torch.distributed import TCPStore
from liger_trainer import LigerTrainingArguments
from liger_trainer.training.failures import FailureGuard
args = LigerTrainingArguments({str(tmp_path)!r}, use_cpu=True, report_to="none")
store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
os.environ.update(WORLD_SIZE="2", RANK="1")
with FailureGuard() as guard:
    guard.watch(args)
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    print("waiting", flush=True)
    store.wait(["never"], timedelta(seconds=60))
"""
    process = start(sys.executable, "-c", code)
    while "waiting" not in (line := process.stdout.readline()):
        assert line, "ended before it waited"
    time.sleep(0.5)  # let it get from print to the store
    sent = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert time.perf_counter() - sent < 10
    assert process.returncode == STOPPED
    assert output.startswith("liger-trainer: stopped in rank 1"), output


class Ended(BaseException):
    """Stands in for the process's end."""


@pytest.fixture
def launched(monkeypatch):
    """What a process of several says, and the status that it ends with."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    said = []

    def leave(status):
        if sys.exc_info()[0] is not Ended:  # a process ends once
            said.append(status)
        raise Ended

    monkeypatch.setattr("builtins.print", lambda message, **kwargs: said.append(message))
    monkeypatch.setattr(os, "_exit", leave)
    return said


def fail_by(error):
    with pytest.raises(Ended), FailureGuard():
        raise error


def test_a_process_ends_even_if_its_message_fails(launched, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise BrokenPipeError("nobody reads")

    guard = FailureGuard()
    guard.args = SimpleNamespace(output_dir=str(tmp_path), device="cpu")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(failures, "find_checkpoints", broken)
    with pytest.raises(Ended):
        guard._end(STOPPED)
    message, status = launched
    assert message.endswith("\n  the checkpoints cannot be read: nobody reads")
    assert status == STOPPED

    monkeypatch.setattr("builtins.print", broken)
    fail_by(RecipeError("no such key"))
    assert launched[2:] == [WRONG_RECIPE]
    monkeypatch.setattr("builtins.print", lambda message, **kwargs: launched.append(message))
    monkeypatch.setattr(FailureGuard, "_headline", broken)
    fail_by(ZeroDivisionError("why"))
    *said, status = launched[3:]
    assert status == failures.ERROR
    assert re.search("ZeroDivisionError: why(.|\n)*BrokenPipeError: nobody reads", "".join(said))


def test_sigterm_is_answered_where_another_took_the_wakeup_fd(monkeypatch):
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda *args, **kwargs: -1)
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)
    before, came = signal.getsignal(signal.SIGTERM), threading.Event()
    try:
        failures._on_sigterm(came.set)
        os.kill(os.getpid(), signal.SIGTERM)
        assert came.wait(5)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_process_of_a_start_prints(launched, tmp_path, monkeypatch):
    """The first to fail; each start (attempt) has a folder of its own, and the launcher gets the headline."""
    for attempt, rank in ((0, 1), (0, 0), (1, 0)):
        folder = tmp_path / f"attempt_{attempt}" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        fail_by(RecipeError("no such key"))
    message = "liger-trainer: error: no such key"
    assert launched == [message, WRONG_RECIPE, WRONG_RECIPE, message, WRONG_RECIPE]
    told = json.loads((tmp_path / "attempt_0" / "1" / "error.json").read_text())
    assert told["message"]["message"] == message
    assert not (tmp_path / "attempt_0" / "0" / "error.json").exists()
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")  # another launcher: everyone prints
    fail_by(RecipeError("no such key"))
    assert launched[-2:] == [message, WRONG_RECIPE]


def test_half_written_checkpoints_are_passed_over(tmp_path):
    run = str(tmp_path)
    assert find_checkpoints(f"{run}/none") == ([], [])
    for step, state, *optimizer in (
        (7, '{"global_step": 7}', "global_step7"),  # as DeepSpeed names the optimizer's state
        (8, '{"global_step": 8}', "optimizer_0"),  # FSDP, sharded
        (9, '{"global_step": 9}', "optimizer.bin"),  # FSDP, whole
        (10, '{"global_step": 10}', "optimizer.pt"),
        (11, '{"global_step": 11}'),  # save_only_model
        (20, '{"global_st', "optimizer.pt"),
        (21, "null", "optimizer.pt"),
        (30, None, "optimizer.pt"),
    ):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in optimizer:
            (folder / name).mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-old").mkdir()
    found = find_checkpoints(run)
    assert [path.name for path in found.complete] == [f"checkpoint-{step}" for step in (7, 8, 9, 10)]
    assert [path.name for path in found.incomplete] == [f"checkpoint-{step}" for step in (11, 20, 21, 30)]
    assert resume_path("True", run) == f"{run}/checkpoint-10"
    assert resume_path(f"{run}/checkpoint-9", run) == f"{run}/checkpoint-9"
    assert resume_path(None, run) is None
    assert resume_path("false", run) is None
    for step in (11, 30):
        message = (
            rf"got '.*checkpoint-{step}'; .* optimizer's state \(save_only_model .*; the last .* is '.*checkpoint-10'"
        )
        with pytest.raises(RecipeError, match=message):
            resume_path(f"{run}/checkpoint-{step}", run)
    for path in found.complete:
        (path / "trainer_state.json").unlink()
    with pytest.raises(RecipeError, match=r"no complete checkpoint in output_dir .* \(not complete: checkpoint-7, "):
        resume_path("true", run)
