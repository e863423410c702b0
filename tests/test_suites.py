"""The training benchmark on the CPU: every suite's recipes train, launches end to end, failures that are results."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

from liger_trainer.kernels import launch
from liger_trainer.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as patch:  # a checkout's folder, not installed
    patch.syspath_prepend(str(ROOT))
    from benchmarks import common, plot, profile_step, relay, suite, train, train_arms, train_rows, train_worker

SUITES = sorted(file.stem for file in (ROOT / "benchmarks" / "suites").glob("*.yaml"))
EXTRA = {"device": "cpu", "profile": False}


@pytest.fixture
def fresh_state(monkeypatch):
    """No accelerate state from other Trainers before or after, the environment as it was, and plain definitions."""
    monkeypatch.setattr(launch, "INTERPRET", False)
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


def first_job(name, arm, smoke=True):
    """The first job of a suite, as a rank gets it."""
    chosen = replace(suite.load(Path(name), smoke), arms=(arm,))
    return train_rows.plan(chosen)[0] | EXTRA


def bench(*args):
    """Run the command as a user does, from another folder; returns its output."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", SUITES)
def test_every_point_of_a_suite_parses_and_trains_when_shrunk(name, fresh_state, tmp_path):
    """Every recipe with the overrides it is measured with, and its own Trainer on a tiny model of its own type."""
    whole = replace(suite.load(Path(name)), rounds=1)
    for job in train_rows.plan(whole):
        overrides = train_worker.overrides_of(job | EXTRA, str(tmp_path)) | {"use_cpu": True}
        recipe = parse_recipe([job["recipe"], *train_worker.flags(overrides)])
        assert recipe.run.offline or recipe.run.dataset == "synthetic", "a measurement must not need the hub"
        assert recipe.training.max_steps == whole.warmup + whole.steps
        assert all(hasattr(recipe.training, argument) for argument in train_arms.ARMS[job["arm"]].arguments)
    fresh_state()
    small = replace(suite.load(Path(name), smoke=True), arms=("ours",), launches=whole.launches[:1])
    for job in train_rows.plan(small):
        fresh_state()
        row = train_worker.train(job | EXTRA)
        assert row["status"] == "ok", job["point"]
        assert len(row["windows_ms"]) == 2
        assert row["tokens_per_s"] > 0
        assert (row["tokens"] < row["padded_tokens"]) == (recipe.run.synthetic_lengths == "alpaca"), job["point"]


def test_tokens_are_those_of_the_timed_steps(fresh_state, monkeypatch):
    """The rows have 2, 3, ... tokens, so that which ones were counted shows in the sum."""
    from liger_trainer import synthetic

    def lengths(examples, max_length, generator):
        return torch.ones(examples, dtype=int).numpy(), torch.arange(2, 2 + examples).numpy()

    monkeypatch.setattr(synthetic, "alpaca_lengths", lengths)
    job = first_job("paper_models", "hf") | {"warmup": 1, "steps": 3, "window": 1}
    job["overrides"] = job["overrides"] | {"train_sampling_strategy": "sequential", "pad_to_multiple_of": 1}
    row = train_worker.train(job)
    assert row["tokens"] == 4 + 5 + 6 + 7 + 8 + 9  # two rows a step; the first step's 2 and 3 are warm-up
    assert row["padded_tokens"] == 2 * 5 + 2 * 7 + 2 * 9
    assert row["peak_allocated_gib"] is None


def test_the_head_of_trl_computes_the_same_loss(fresh_state):
    rows = []
    for arm in ("hf", "trl_head"):
        rows.append(train_worker.train(first_job("paper_models", arm)))
        fresh_state()
    for loss in ("first_loss", "last_loss"):
        assert rows[1][loss] == pytest.approx(rows[0][loss], rel=1e-4)


@pytest.mark.gpu
def test_memory_above_the_state_is_what_activations_take(fresh_state):
    job = first_job("step_1b", "hf")
    job["overrides"] = job["overrides"] | {"use_cpu": False}
    row = train_worker.train(job)
    parameters = sum(p.numel() for p in small_model(job).parameters())
    assert row["gradients_gib"] * 2**30 == 4 * parameters
    assert row["static_gib"] * 2**30 >= 3 * 4 * parameters  # weights and AdamW's two moments
    assert 0 < row["above_static_gib"] < row["peak_allocated_gib"]


def small_model(job):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**job["overrides"]["model_config"]))


def test_arms_launched_on_one_device_compute_the_same_and_are_not_measured_twice(tmp_path):
    args = ("step_1b", "--smoke", "--points", "llama-3.2-1b 8x", "--arms", "hf,ours", "--out", str(tmp_path))
    bench(*args, "--commit", "abc")
    data = json.loads((tmp_path / "train-step_1b-cpu.json").read_text())
    rows = {row["arm"]: row for row in data["results"]}
    assert {arm: row["status"] for arm, row in rows.items()} == {"hf": "ok", "ours": "ok"}
    for loss in ("first_loss", "last_loss"):
        assert rows["ours"][loss] == pytest.approx(rows["hf"][loss], rel=1e-4)
    (run,) = data["runs"]
    assert (run["commit"], run["device"]) == ("abc", "cpu")
    assert run["command"].startswith("python benchmarks/train.py step_1b --smoke")
    assert "2 of 2 rounds" in bench(*args, "--commit", "def")
    assert json.loads((tmp_path / "train-step_1b-cpu.json").read_text()) == data


def test_two_ranks_are_launched_and_their_tokens_added(tmp_path):
    bench("paper_two_gpus", "--smoke", "--launches", "fsdp2", "--arms", "ours", "--out", str(tmp_path))
    (row,) = json.loads((tmp_path / "train-paper_two_gpus-cpu-x2.json").read_text())["results"]
    assert (row["status"], row["processes"], row["config_file"]) == ("ok", 2, "configs/fsdp2.yaml")
    (round_,) = row["rounds"]
    assert 2 * 2 * 2 * 39 < round_["tokens"] < round_["padded_tokens"]  # ranks, steps, batch; the shortest prompt


def test_memory_short_on_one_rank_is_a_result_and_a_hang_ends(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    jobs = [first_job("paper_two_gpus", arm) for arm in ("ours", "hf")]
    jobs[1]["config_file"], jobs[1]["processes"] = "configs/single.yaml", 1
    start = time.monotonic()
    with relay.Relay(jobs, timeout=60, module="distributed.bench_rank") as running:
        oom = running.run(0, 1)
        running.timeout = 2
        hung = running.run(1, 2)
        assert not running.started
    assert (oom["status"], "Tried to allocate" in oom["note"]) == ("oom", True)
    assert hung["status"] == "error"
    assert "still running after 2 s" in hung["note"]
    assert time.monotonic() - start < 55, "somebody waited for a rank that had ended"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": ["hf"]}, r"unknown key 'arm' \(did you mean 'arms'\?\)"),
        ({"arms": ["hf", "our"]}, r"arms: 'our' is none \(did you mean 'ours'\?\)"),
        ({"x": {"key": "name"}}, "x: label is missing"),
        ({"x": {"key": "max_length", "label": "l"}}, "'max_length', which is no key of its overrides or vary"),
        ({"steps": 3, "window": 2}, "warmup and steps must be multiples of window"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        (
            {"launch": [{"name": "a", "config_file": "configs/no.yaml", "num_processes": 1}]},
            "no such file: 'configs/no",
        ),
        ({"points": [{"name": "a", "recipe": "recipes/no.yaml"}]}, "point 'a': recipe: no such file"),
        ({"points": [{"name": "a", "recipe": "recipes/shapes/llama3.2_1b.yaml", "varry": {}}]}, "did you mean 'vary'"),
        ({"points": 2 * [{"name": "a", "recipe": "recipes/shapes/llama3.2_1b.yaml"}]}, "'a' is there twice"),
    ],
)
def test_a_bad_suite_is_refused(change, message, tmp_path):
    content = yaml.safe_load((ROOT / "benchmarks" / "suites" / "step_1b.yaml").read_text())
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content | change))
    with pytest.raises(ValueError, match=message):
        suite.load(path)


def test_what_the_command_line_selects(capsys):
    chosen = train.parse_args(["paper_llama3_batch", "--points", "48,96", "--arms", "compile", "--rounds", "2"]).chosen
    assert [point.x for point in chosen.points] == [48, 96]
    assert (chosen.arms, chosen.rounds) == (("compile",), 2)
    for bad, message in (
        (["paper"], "no such file: 'paper'"),
        (["step_1b", "--points", "gpt"], "--points: 'gpt' is in no name"),
        (["step_1b", "--arms", "us"], "allowed are hf, ours"),
        (["step_1b", "--rounds", "0"], "at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            train.parse_args(bad)
        assert message in capsys.readouterr().err


GOOD = {
    "status": "ok", "tokens_per_s": 100.0, "padded_tokens_per_s": 120.0, "step_ms": 2.0, "peak_allocated_gib": 20.0,
    "peak_reserved_gib": 22.0, "static_gib": 8.0, "gradients_gib": 2.0, "above_static_gib": 10.0, "first_loss": 5.0,
    "last_loss": 4.0,
}  # fmt: skip
OOM = {"status": "oom", "note": "no"}


def test_rounds_are_interleaved_and_combined():
    two = replace(suite.load(Path("paper_two_gpus")), arms=("hf", "ours"), rounds=2)
    jobs = train_rows.plan(two)
    assert [(j["round"], j["x"], j["launch"], j["arm"]) for j in jobs[:5]] == [
        (0, 32, "FSDP2", "hf"),
        (0, 32, "FSDP2", "ours"),
        (0, 32, "ZeRO-3", "hf"),
        (0, 32, "ZeRO-3", "ours"),
        (0, 64, "FSDP2", "hf"),
    ]
    assert [j["round"] for j in jobs] == [0] * 8 + [1] * 8
    row = train_rows.combine(jobs[0], [GOOD, GOOD | {"tokens_per_s": 110.0}, GOOD | {"tokens_per_s": 102.0}])
    assert (row["status"], row["tokens_per_s"], len(row["rounds"])) == ("ok", 102.0, 3)
    assert row["spread"] == pytest.approx(10 / 102)
    assert train_rows.combine(jobs[0], [GOOD, OOM])["tokens_per_s"] == 100.0
    assert train_rows.combine(jobs[0], [OOM])["status"] == "oom"


def test_what_a_result_file_knows_is_kept_and_what_it_does_not_is_run(tmp_path):
    job = first_job("step_1b", "hf", smoke=False)
    key = train_rows.key_of(job)

    def kept(rounds, **change):
        return train_rows.kept_rounds(job, {key: train_rows.combine(job | change, rounds)})

    assert kept([GOOD, OOM]) == [GOOD, OOM]
    assert kept([GOOD, {"status": "error", "note": "x"}]) == [GOOD], "what failed is tried again"
    assert kept([GOOD], steps=99) == [], "measured with other settings"
    assert train_rows.is_settled([GOOD, OOM])
    assert not train_rows.is_settled([GOOD])
    # Each round keeps the provenance it was measured under.
    path = tmp_path / "train.json"
    for commit, rounds in (("a", [GOOD]), ("b", [GOOD | {"run": 0}, GOOD])):
        common.ResultFile(path, train_rows.KEYS, {"commit": commit}).add(train_rows.combine(job, rounds))
    data = json.loads(path.read_text())
    (row,) = data["results"]
    assert [data["runs"][r["run"]]["commit"] for r in row["rounds"]] == ["a", "b"]
    common.ResultFile(path, train_rows.KEYS, {"commit": "c"}).add(train_rows.combine(job, [GOOD]))
    assert json.loads(path.read_text())["runs"] == [{"commit": "c"}]


def test_a_spent_budget_an_absent_package_and_a_known_oom_start_no_worker(tmp_path, monkeypatch):
    arm = train_arms.Arm({}, ("a_package_nobody_has",))
    monkeypatch.setitem(train_arms.ARMS, "liger", arm)
    started = []
    monkeypatch.setattr(relay.Relay, "start", lambda self, index: None)
    monkeypatch.setattr(relay.Relay, "run", lambda self, index, next_: started.append(self.jobs[index]["arm"]) or
                        (OOM if self.jobs[index]["arm"] == "hf" else GOOD) | {"seconds": 1.0})  # fmt: skip
    hello = {"device": "gpu", "driver": "1", "packages": {"torch": "2"}}
    options = ["step_1b", "--points", "llama-3.2-1b 8x", "--rounds", "2", "--out", str(tmp_path)]
    run = train.Run(train.parse_args([*options, "--arms", "hf,ours,liger"]), hello)
    assert run.work()
    assert started == ["hf", "ours", "ours"]
    assert {row["arm"]: row["status"] for row in run.results.rows} == {"hf": "oom", "ours": "ok", "liger": "absent"}
    assert not train.Run(train.parse_args([*options, "--arms", "compile", "--device-budget", "-1"]), hello).work()
    assert started == ["hf", "ours", "ours"]


def train_data(name):
    """A result file with made-up numbers: HF out of memory at the last x, and nothing measured for one arm."""
    chosen = replace(suite.load(Path(name)), arms=("hf", "ours", "liger", "compile"))
    run = {
        "device": "NVIDIA Some GPU",
        "driver": "1",
        "packages": {"torch": "2"},
        "date": "2026-01-02T",
        "commit": "abc",
    }
    rows = []
    for job in train_rows.plan(replace(chosen, rounds=1)):
        factor = {"hf": 1.0, "ours": 1.3, "liger": 1.25, "compile": 0.0}[job["arm"]]
        speed = 100.0 * factor * job["processes"] ** 0.5
        good = GOOD | {"run": 0, "tokens_per_s": speed, "peak_allocated_gib": 20.0 / (factor or 1)}
        rounds = [good, good | {"tokens_per_s": speed * 1.1}, good | {"tokens_per_s": speed * 0.9}]
        if job["arm"] == "compile":
            rounds = [{"status": "absent", "note": "", "run": 0}]
        elif job["arm"] == "hf" and job["point"] == chosen.points[-1].name:
            rounds = [OOM | {"run": 0}]
        rows.append(train_rows.combine(job, rounds) | {"run": 0})
    return {"suite": chosen.about, "runs": [run], "results": rows}


@pytest.mark.parametrize("name", ["paper_models", "paper_lengths", "paper_four_gpus"])
def test_plots_and_tables(name, tmp_path):
    stem = f"train-{name}-gpu"
    (tmp_path / f"{stem}.json").write_text(json.dumps(train_data(name)))
    page = tmp_path / "page.md"
    page.write_text(f"a\n<!-- table:{stem} -->\nold\n<!-- /table -->\n<!-- table:{stem}-average -->\n<!-- /table -->\n")
    assert plot.main(["--results", str(tmp_path), "--update", str(page)]) == 0
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    for part in ("+30.0%", "-23.1%", "20.0%", "OOM", "absent: compile", "Some GPU", "with padding"):
        assert part in text, part
    average = text[text.index(f"table:{stem}-average") :].splitlines()
    assert any(line.startswith("| liger_trainer |     HF eager |   +30.0%") for line in average), average
    assert any(line.startswith("| liger_trainer | liger-kernel |    +4.0%") for line in average), average
    assert "old" not in text
    if name == "paper_four_gpus":
        assert "70.7%" in text, "scaling from one device to two by the square root"
    assert plot.main(["--results", str(tmp_path), "--update", str(page)]) == 0
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "GEMM"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<c10::BFloat16>>", "optimizer"),
        ("_rms_norm_bwd_kernel", "norm"),
        ("_rope_kernel", "rope"),
        ("_gated_fwd_kernel", "GLU"),
        ("_loss_grad_rows_kernel", "CE"),
        ("void at::native::cunn_SoftMaxForward<8, float>", "CE"),
        ("Memcpy DtoD (Device -> Device)", "copy and fill"),
        ("void at::native::reduce_kernel<512, 1>", "other"),
    ],
)
def test_kernels_are_grouped(name, group):
    assert profile_step.group_of(name) == group


def test_the_command_line_needs_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import benchmarks.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
