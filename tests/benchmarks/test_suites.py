"""The training benchmark on the CPU: every suite's recipes train, launches end to end, failures that are results."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from launching import PYTHONPATH

from liger_trainer.training.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:  # a checkout's folder, not installed
    patch.syspath_prepend(str(ROOT))
    from benchmarks import peers, plot, rows, suite, tables, train, train_worker

SUITES = sorted(file.stem for file in (ROOT / "benchmarks" / "suites").glob("*.yaml"))
EXTRA = {"device": "cpu", "profile": False}


@pytest.fixture
def fresh_state(monkeypatch):
    """No accelerate state from other Trainers before or after, the environment as it was, and plain definitions."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield reset
    reset()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def first_job(name, arm):
    """The first job of a suite, as a rank gets it."""
    chosen = replace(suite.load(Path(name), smoke=True), arms=(arm,))
    return chosen.jobs()[0] | EXTRA


def bench(*args):
    """Run the command as a user does, from another folder; returns its output."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# Of the suites that take longest, others of the same kind are here.
LONG = ("attention_options", "paper_four_gpus", "convergence_cpu")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in SUITES]
)
def test_every_point_of_a_suite_parses_and_trains_when_shrunk(name, fresh_state, tmp_path):
    """Every recipe with the overrides it is measured with, and its own Trainer on a tiny model of its own type."""
    whole = replace(suite.load(Path(name)), rounds=1)
    for job in whole.jobs():
        overrides = train_worker.overrides_of(job | EXTRA, str(tmp_path)) | {"use_cpu": True}
        recipe = parse_recipe([job["recipe"], *train_worker.flags(overrides)])
        assert recipe.run.offline or recipe.run.dataset == "synthetic", "a measurement must not need the hub"
        assert recipe.training.max_steps == job["warmup"] + job["steps"]
        assert all(hasattr(recipe.training, argument) for argument in peers.PEERS[job["arm"]].arguments)
    fresh_state()
    small = replace(suite.load(Path(name), smoke=True), arms=("ours",), launches=whole.launches[:1])
    for job in small.jobs():
        fresh_state()
        row = train_worker.train(job | EXTRA)
        assert row["status"] == "ok", job["point"]
        assert len(row["windows_ms"]) == 2
        assert row["tokens_per_s"] > 0
        assert row["evidence"]["replaced"], job["point"]
        assert row["first_grad_norm"] > 0
        overrides = train_worker.overrides_of(job | EXTRA, str(tmp_path))
        lengths = parse_recipe([job["recipe"], *train_worker.flags(overrides)]).run.synthetic_lengths
        assert (row["tokens"] < row["padded_tokens"]) == (lengths == "alpaca"), job["point"]


def test_tokens_are_those_of_the_timed_steps(fresh_state, monkeypatch):
    """The rows have 2, 3, ... tokens, so that which ones were counted shows in the sum."""
    from liger_trainer.training import synthetic

    def lengths(examples, max_length, generator):
        return torch.ones(examples, dtype=int).numpy(), torch.arange(2, 2 + examples).numpy()

    monkeypatch.setattr(synthetic, "alpaca_lengths", lengths)
    job = first_job("paper_models", "hf") | {"warmup": 1, "steps": 3, "window": 1}
    job["overrides"] = job["overrides"] | {"train_sampling_strategy": "sequential", "pad_to_multiple_of": 1}
    row = train_worker.train(job)
    assert row["tokens"] == 4 + 5 + 6 + 7 + 8 + 9  # two rows a step; the first step's 2 and 3 are warm-up
    assert row["padded_tokens"] == 2 * 5 + 2 * 7 + 2 * 9
    assert row["peak_allocated_gib"] is None


def test_curves_of_all_arms_lie_on_each_other(fresh_state):
    """The convergence suite in short: the losses of five steps."""
    made = {}
    small = suite.load(Path("convergence"), smoke=True)
    small = replace(small, points=small.points[2:], arms=("hf", "ours_padded", "ours"))  # Gemma, Llama with LoRA
    for job in small.jobs():
        fresh_state()
        changed = {"steps": 4, "overrides": job["overrides"] | {"learning_rate": 1e-2, "warmup_steps": 0}}
        made[job["point"], job["arm"]] = train_worker.train(job | EXTRA | changed)["losses"]
    assert len(made) == 2 * 3
    for (point, arm), losses in made.items():
        assert losses == pytest.approx(made[point, "hf"], abs=2e-5), (point, arm)
        assert len(losses) == 5


def test_all_points_of_an_arm_run_in_one_process(monkeypatch, tmp_path):
    """And a failure is the failure of the points after it."""
    started = []

    def launch(jobs, timeout):
        started.append([job["point"] for job in jobs])
        good = {"status": "ok", "losses": [3.0, 2.0, 1.0 + len(jobs[0]["arm"]) / 10], "step_ms": 1.0, "seconds": 1.0}
        good |= dict.fromkeys(rows.MEDIANS, 1.0)
        return [good] * 3 + [{"status": "error", "note": "no"}]

    monkeypatch.setattr(train, "launch", launch)
    args = train.parse_args(["convergence", "--smoke", "--arms", "hf,hf_seed_1,ours", "--out", str(tmp_path)])
    device = {"device": "cpu", "devices": None, "packages": {}, "driver": None, "python": "3"}
    run = train.Run(args, device)
    run.work()
    assert started == [[point["point"] for point in args.chosen.points]] * 3
    table = tables.convergence_table(run.rows())
    assert table.splitlines()[2].replace(" ", "") == "|Llamaatbf16False|1.2000|1.4000|1.9000|0.7|0.2|"
    assert len(table.splitlines()) == 2 + 3
    assert plot.main(["--results", str(tmp_path)]) == 0
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}


def broken_backward(trainer):
    """The embedding's gradient is twice what it should be; the forward pass is right."""
    trainer.model.get_input_embeddings().weight.register_hook(lambda gradient: 2 * gradient)
    return dict


def test_gradient_norms_tell_a_wrong_backward_and_losses_do_not(fresh_state, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "liger", replace(peers.PEERS["hf"], prepare=(broken_backward,)))
    made = {}
    for arm in ("hf", "trl_head", "liger"):
        job = first_job("paper_models", arm)
        made[arm] = rows.combine(job, [train_worker.train(job)])
        fresh_state()
        for loss in ("first_loss", "last_loss"):
            assert made[arm][loss] == pytest.approx(made["hf"][loss], rel=1e-3)
    assert made["trl_head"]["rounds"][0]["evidence"] == {"trl_head_calls": 3}
    *_, broken = judged = rows.judge(list(made.values()))
    assert [row["status"] for row in judged] == ["ok", "ok", "inexact"]
    assert "HF's" in broken["note"]
    assert rows.judge([made["liger"]])[0]["status"] == "ok", "without HF there is nothing to compare with"
    *_, nan = rows.judge([made["hf"], made["trl_head"] | {"first_grad_norm": float("nan")}])
    assert nan["status"] == "inexact"


def test_an_arm_that_was_not_active_is_an_error(fresh_state, monkeypatch):
    """What it measured would be another arm's."""
    monkeypatch.setitem(peers.PEERS, "ours", replace(peers.PEERS["ours"], overrides={"use_liger": False}))
    with pytest.raises(RuntimeError, match=r"arm ours was not active in this run: \{'replaced': \{\}\}"):
        train_worker.train(first_job("step_1b", "ours"))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert peers.modules_of_liger_kernel(model) == {}

    def forward(self, x):
        return x

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    model[1].forward = forward.__get__(model[1])
    assert peers.modules_of_liger_kernel(model) == {"Linear": 1}
    trainer = SimpleNamespace(model=model, model_wrapped=model)
    assert not peers.graphs(trainer)()["compiled_model"]
    trainer.model_wrapped = torch.compile(model)
    assert peers.graphs(trainer)()["compiled_model"]


def test_bytes_of_gradients_follow_the_engine():
    """ZeRO-3 keeps its buffers, ZeRO-1 and 2 free a shard."""
    model = torch.nn.Linear(3, 4, bias=False)
    trainer = SimpleNamespace(model_wrapped=model, is_deepspeed_enabled=False, args=SimpleNamespace(world_size=2))
    assert train_worker.gradient_bytes(trainer) == 48
    trainer.is_deepspeed_enabled = True
    for stage, expected in ((0, 48), (1, 24), (2, 24), (3, 0)):
        model.zero_optimization_stage = lambda stage=stage: stage
        assert train_worker.gradient_bytes(trainer) == expected
    model.weight.requires_grad = False
    model.zero_optimization_stage = lambda: 2
    assert train_worker.gradient_bytes(trainer) == 0


@pytest.mark.gpu
def test_memory_is_told_apart(fresh_state):
    """A model large enough that the libraries' workspaces hardly count, a batch so small that gradients do.

    AdamW is fused, as in every recipe. Its foreach form holds square roots of all second moments beside the gradients.
    The head is not tied: autograd adds a tied weight's two gradients out of place, and so holds three of them.
    """
    job = first_job("step_1b", "hf")
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "tie_word_embeddings": False}
    changed = {"use_cpu": False, "optim": "adamw_torch_fused", "model_config": job["overrides"]["model_config"] | sizes}
    job["overrides"] |= changed
    row = train_worker.train(job)
    parameters = 4 * sum(p.numel() for p in small_model(job).parameters())
    gradients, static, peak = (row[f"{name}_gib"] * 2**30 for name in ("gradients", "static", "peak_allocated"))
    assert gradients == parameters
    assert 3 * parameters <= static <= 3 * parameters + (128 << 20)  # weights and AdamW's two moments
    assert row["above_static_gib"] * 2**30 == pytest.approx(peak - static - gradients)
    assert gradients <= peak - static < 2 * gradients, "after backward all gradients are alive"
    assert row["peak_allocated_gib"] <= row["peak_reserved_gib"]


def small_model(job):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**job["overrides"]["model_config"]))


def test_arms_launched_on_one_device_compute_the_same(tmp_path):
    args = ("step_1b", "--smoke", "--points", "llama-3.2-1b 8x1024", "--arms", "hf,ours", "--out", str(tmp_path))
    printed = bench(*args, "--commit", "abc")
    assert "not measured" not in printed, "what the command line leaves out"
    data = json.loads((tmp_path / "train-step_1b-cpu.json").read_text())
    made = {row["arm"]: row for row in data["results"]}
    assert {arm: row["status"] for arm, row in made.items()} == {"hf": "ok", "ours": "ok"}
    for same in rows.SAME:
        assert made["ours"][same] == pytest.approx(made["hf"][same], rel=1e-4)
    (run,) = data["runs"]
    assert (run["commit"], run["device"]) == ("abc", "cpu")
    assert run["command"] == (
        "python benchmarks/train.py step_1b --smoke --points 'llama-3.2-1b 8x1024' --arms hf,ours "
        "--out OUT --commit abc"
    )
    assert data["suite"]["arms"] == list(suite.load(Path("step_1b")).arms)
    hf, ours = made["hf"]["rounds"][0], made["ours"]["rounds"][0]
    assert hf["evidence"] == {}
    assert ours["evidence"]["replaced"]["rms_norm"] == 5
    assert ours["evidence"]["fused_loss_calls"] == 3


def test_two_ranks_are_launched_and_their_tokens_added(tmp_path):
    printed = bench("paper_two_gpus", "--smoke", "--launches", "fsdp2", "--arms", "ours", "--out", str(tmp_path))
    assert f"written: {tmp_path}" in printed
    (row,) = json.loads((tmp_path / "train-paper_two_gpus-cpu-x2.json").read_text())["results"]
    assert (row["status"], row["processes"], row["config_file"]) == ("ok", 2, "configs/fsdp2.yaml")
    (round_,) = row["rounds"]
    assert 2 * 2 * 2 * 39 < round_["tokens"] < round_["padded_tokens"]  # ranks, steps, batch; the shortest prompt


def is_running(pid):
    """Whether a process is there, and not only its entry."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_failures_of_ranks(monkeypatch, tmp_path):
    """Memory short on one of them is a result, another failure is an error whatever the others say, a hang ends."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), PYTHONPATH]))
    monkeypatch.setenv("LOADERS", str(tmp_path))
    jobs = {arm: first_job("paper_two_gpus", arm) for arm in ("ours", "hf", "trl_head")}
    jobs["hf"] |= {"config_file": "configs/single.yaml", "processes": 1}
    limits = {"ours": 90, "hf": 10, "trl_head": 90}
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        oom, hung, failed = pool.map(lambda arm: train.launch([jobs[arm]], limits[arm], "ranks.bench_rank")[0], limits)
    loaders = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(loaders) == 2
    assert not any(is_running(pid) for pid in loaders)
    assert failed["status"] == "error"
    assert "arm ours was not active" in failed["note"]
    assert (oom["status"], "Tried to allocate" in oom["note"]) == ("oom", True)
    assert hung["status"] == "error"
    assert "still running after 10 s" in hung["note"]
    assert time.monotonic() - start < 100, "somebody waited for a rank that had ended"
