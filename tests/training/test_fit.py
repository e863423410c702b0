"""`liger-trainer fit` and `auto_batch_size`: the search, what a trial's end means, and a run short of memory."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_recipes import write_recipe

from liger_trainer.cli import main
from liger_trainer.training import auto_batch_size, failures, fit, fit_trial, train, trials
from liger_trainer.training.fit_trial import STEPS, trial_recipe
from liger_trainer.training.recipe import peek
from liger_trainer.training.recipe_arguments import RecipeError

TESTS = Path(__file__).parents[1]
# A big vocabulary: most of the memory is logits.
TRAINING = {
    "vocab_size": 32000, "max_length": 64, "liger_config": {"rope": False}, "per_device_train_batch_size": 64,
    "sample_prompt": "Who?", "eval_examples": 2, "eval_strategy": "epoch",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, **TRAINING)


def test_a_short_machine_ends_the_search_with_the_largest_that_trained(recipe, tmp_path, monkeypatch, capsys):
    """Through the command, each trial a process of its own; 64 rows need more than it has, 32 less."""
    command = [sys.executable, str(TESTS / "helpers" / "limited_memory.py"), "1000"]
    monkeypatch.setattr(trials, "trial_command", lambda launch, job: [*command, job])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    results = tmp_path / "fit.json"
    options = ["--use_liger", "false", "--max_batch", "64", "--resolution", "1", "--json", str(results)]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", recipe, *options, "--seed", "3"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("use_liger false  batch    64  out of memory")
    assert said[1].startswith("use_liger false  batch    32  fits, peak rss ")
    assert said[-1].split()[:2] == ["false", "32"]
    found = json.loads(results.read_text())
    assert found["overrides"] == ["--seed", "3"]
    assert found["device"] == "cpu"
    assert found["environment"]["torch"]
    (arm,) = found["arms"]
    assert (arm["use_liger"], arm["batch"]) == (False, 32)
    assert arm["trials"]["32"]["peak_gib"]["rss"] > 0.3
    assert not arm["trials"]["64"]["fits"]


def test_a_trial_is_the_recipe_with_long_rows_and_nothing_around(recipe, tmp_path):
    job = {
        "argv": [recipe, "--seed", "5"], "use_liger": False, "batch": 3, "accumulation": 4, "measures": False,
        "folder": str(tmp_path),
    }  # fmt: skip
    trial = trial_recipe(job)
    run, args = trial.run, trial.training
    assert (run.dataset, run.synthetic_lengths, run.synthetic_examples) == ("synthetic", "ragged", 2 * 3 * STEPS)
    assert trial.max_length == 64
    for batch in train.build_trainer(trial).get_train_dataloader():
        lengths = batch["attention_mask"].sum(1)
        assert sorted({*lengths.tolist()}) == [63, 64], "with a mask, as data of different lengths have"
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps) == (3, 2, STEPS)
    own = trial_recipe({**job, "argv": [recipe, "--dataset", "synthetic", "--sample_prompt", "null"]}).run
    assert own.synthetic_lengths == "full", "as the recipe's own rows"
    assert (run.eval_examples, run.sample_prompt) == (0, None)
    assert (args.eval_strategy, args.save_strategy, args.seed) == ("no", "no", 5)
    assert (args.use_liger, args.liger_config) == (False, None)
    args = trial_recipe({**job, "use_liger": True, "accumulation": 1}).training
    assert args.use_liger
    assert args.liger_config["rope"] is False
    assert args.gradient_accumulation_steps == 1
    args = trial_recipe({**job, "use_liger": True, "measures": True}).training
    assert {**args.liger_config, "rope": False, "recompute": "all", "logits_budget_mib": 512} == args.liger_config


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([{"status": failures.SUCCESS, "free_gib": 7.0}, {"status": failures.SUCCESS, "free_gib": 5.0}], True),
        ([{"status": failures.STOPPED, "message": "gloo"}, {"status": failures.OUT_OF_MEMORY, "free_gib": 5.0}], False),
        ([{"status": failures.STOPPED, "message": "gloo"}, {"status": failures.ERROR, "message": "a bug"}], "a bug"),
        ([{"status": failures.WRONG_RECIPE, "message": "no such key"}], "no such key"),
        ([{"status": failures.SUCCESS}], "a trial with batch 4 ended with status 0, and not all .*\n.*noise"),
        ([], "not all of its processes said why"),
    ],
)
def test_what_the_processes_wrote_decides(results, expected, monkeypatch):
    """Memory that ran out in one process is the cause of what the others say; an error is never 'does not fit'."""
    facts = {"world_size": 2, "device": "cpu", "peak_gib": {"rss": 1.0}}
    code = (
        "import json, sys, pathlib\n"
        "folder = pathlib.Path(json.loads(sys.argv[1])['folder'])\n"
        f"for rank, result in enumerate({[{**facts, **result} for result in results]!r}):\n"
        "    (folder / f'rank-{rank}.json').write_text(json.dumps(result))\n"
        "print('noise')"
    )
    monkeypatch.setattr(trials, "trial_command", lambda launch, job: [sys.executable, "-c", code, job])
    trial = trials.Trial(["recipe.yaml"], True, 4, 1)
    if isinstance(expected, bool):
        outcome = trials.run_trial(trial, trials.Launch())
        assert (outcome.fits, outcome.free_gib) == (expected, 5.0)
    else:
        error = RecipeError if "key" in expected else trials.TrialError
        with pytest.raises(error, match=expected):
            trials.run_trial(trial, trials.Launch())


@pytest.mark.parametrize(
    ("free", "batches"), [(100.0, [64, 128, 440]), (None, [64, 128, 256, 512, 384, 448, 416, 432])]
)
def test_what_the_trials_took_cuts_the_search_short(free, batches, recipe, monkeypatch):
    """On a GPU memory says where to look; elsewhere the search doubles and bisects."""

    measured = []

    def run_trial(trial, launch):
        measured.append(trial.measures)
        peak = 10 + 0.2 * trial.batch
        if peak > 98.5:
            return trials.Outcome(False, {}, free)
        larger = free and free + (trial.batch == 64)  # the least that was free counts
        return trials.Outcome(True, {"allocated": peak, "reserved": 2 * peak}, larger, "a GPU", 1.0, 1234.5, 3.0)

    monkeypatch.setattr(trials, "run_trial", run_trial)
    found = fit.fit([recipe], True)
    assert list(found.trials) == batches
    assert found.batch <= 442 <= found.batch * 17 / 16
    assert measured == [number < 2 or not free for number in range(len(batches))], "the recipe as it is checks"
    assert "1,234 tokens/s, 3 layers recomputed" in fit.table([found], 1024)


def test_a_prediction_that_fails_is_searched_below(recipe, monkeypatch):
    def run_trial(trial, launch):
        return trials.Outcome(trial.batch <= 300, {"allocated": 10 + 0.2 * trial.batch}, 100.0)

    monkeypatch.setattr(trials, "run_trial", run_trial)
    found = fit.fit([recipe], False)
    assert list(found.trials)[:3] == [64, 128, 440]
    assert found.batch <= 300 <= found.batch * 17 / 16


@pytest.mark.parametrize("train", [lambda: None, lambda: torch.empty(1 << 60)], ids=["fits", "out of memory"])
def test_a_trial_on_a_gpu_says_what_was_free_before(train, tmp_path, monkeypatch):
    recipe = SimpleNamespace(training=SimpleNamespace(device=torch.device("cuda"), world_size=1))
    monkeypatch.setattr(fit_trial, "trial_recipe", lambda job: recipe)
    log = [{"loss": 1.0, "tokens_per_second": 7.0}, {"train_loss": 1.0}]
    built = SimpleNamespace(train=train, state=SimpleNamespace(log_history=log))
    monkeypatch.setattr(fit_trial, "build_trainer", lambda recipe: built)
    monkeypatch.setattr(fit_trial, "peak_memory", lambda device: {"allocated": 3.0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 8 * 2**30))
    code = "import sys, pathlib; pathlib.Path(sys.argv[1], 'rank-0.json').write_text(sys.argv[2])"
    written = json.dumps(fit_trial.outcome({}))
    monkeypatch.setattr(
        trials, "trial_command", lambda launch, job: [sys.executable, "-c", code, json.loads(job)["folder"], written]
    )
    outcome = trials.run_trial(trials.Trial(["recipe.yaml"], True, 4, 1), trials.Launch())
    assert (outcome.device, outcome.free_gib) == ("a GPU", 6.0)
    assert outcome.tokens_per_second == (7.0 if outcome.fits else None)


@pytest.mark.parametrize(("number", "deaf"), [(signal.SIGTERM, False), (signal.SIGHUP, True)])
def test_a_signal_ends_the_trial_too(number, deaf, tmp_path, monkeypatch, request):
    """Also a trial that ignores SIGTERM; nothing of it is left, on the device or on the disk."""
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    code = (
        "import json, os, pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN if {deaf} else signal.SIG_DFL)\n"
        "facts = f'{os.getpid()} ' + json.loads(sys.argv[1])['folder']\n"
        "pathlib.Path(sys.argv[2]).write_text(facts + '.')\n"
        "time.sleep(60)"
    )
    note = tmp_path / "note"
    monkeypatch.setattr(trials, "trial_command", lambda launch, job: [sys.executable, "-c", code, job, str(note)])
    monkeypatch.setattr(trials, "GRACE_SECONDS", 0.5)

    def send():
        while not (note.is_file() and note.read_text().endswith(".")):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(SystemExit, match=str(128 + number)):
        trials.run_trial(trials.Trial(["recipe.yaml"], True, 4, 1), trials.Launch())
    sender.join()
    pid, folder = note.read_text().removesuffix(".").split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert not Path(folder).exists()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_the_launch_is_accelerates(tmp_path):
    config = str(TESTS.parent / "configs" / "fsdp2.yaml")
    words = trials.trial_command(trials.Launch(config, 4), "job")
    assert words[1:7] == ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "4"]
    assert words[-3:] == ["-m", "liger_trainer.training.fit_trial", "job"]
    assert trials.trial_command(trials.Launch(), "job") == [sys.executable, *words[-3:]]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "recipe.yaml", "--config_file", str(TESTS.parent / "configs" / "multinode_fsdp2.yaml")])
    for launch, message in (
        (trials.Launch(None, 2), "num_processes 2 needs a config_file"),
        (trials.Launch(str(tmp_path / "none.yaml")), "config_file: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            trials.check_launch(launch)


def test_auto_batch_size_keeps_the_rows_of_a_step(recipe, monkeypatch, capsys):
    """12 rows a step: of the divisors 1, 2, 3, 4, 6 and 12, the largest of at most 5 is 4."""
    tried = []

    def run_trial(trial, launch):
        tried.append((trial.batch, trial.accumulation, trial.use_liger))
        return trials.Outcome(trial.batch <= 5)

    argv = [recipe, "--auto_batch_size", "true", "--per_device_train_batch_size", "2"]
    argv += ["--gradient_accumulation_steps=6"]
    monkeypatch.setattr(trials, "run_trial", run_trial)
    parsed = []
    monkeypatch.setattr(train, "parse_recipe", lambda argv: parsed.append(argv) or sys.exit(0))
    with pytest.raises(SystemExit, match="0"):
        train.main(argv)
    assert parsed == [[*argv, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "3"]]
    assert (peek(parsed[0], "per_device_train_batch_size"), peek(parsed[0], "use_liger")) == ("4", "true")
    assert tried == [(2, 6, True), (4, 3, True), (12, 1, True), (6, 2, True)]
    assert "4 x 3 rows per step instead of 2 x 6" in capsys.readouterr().out

    def failing(trial, launch):
        raise trials.TrialError("what the trial printed: out of memory")

    monkeypatch.setattr(trials, "run_trial", failing)
    with pytest.raises(SystemExit, match=r"^\nwhat the trial printed: out of memory\n.*the search ended"):
        train.main(argv)

    monkeypatch.setattr(trials, "run_trial", lambda trial, launch: trials.Outcome(False))
    with pytest.raises(SystemExit, match="2"):
        train.main(argv)
    assert "not even a batch of one row fits" in capsys.readouterr().err

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"auto_batch_size is for one process; .*liger-trainer fit"):
        auto_batch_size.with_largest_batch(argv)
    with pytest.raises(ValueError, match="gradient_accumulation_steps: got 'x'; must be a whole number of at least 1"):
        trials.recipe_batch([recipe, "--gradient_accumulation_steps", "x"])
