"""What the training benchmark runs, keeps and shows: suites, command line, rows, tables. No training."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rounds import ERROR, GOOD, OOM

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:  # a checkout's folder, not installed
    patch.syspath_prepend(str(ROOT))
    from benchmarks import common, peers, profile_step, rows, suite, tables, train

LLAMA = "recipes/shapes/llama3.2_1b.yaml"
HELLO = {"device": "gpu", "driver": "1", "packages": {"torch": "2"}, "devices": 2}


def first_job(name, arm):
    """The first job of a suite as the command line makes it."""
    chosen = replace(suite.load(Path(name)), arms=(arm,))
    return chosen.jobs()[0] | {"device": "cuda", "profile": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": ["hf"]}, r"got 'arm'; .*\(did you mean 'arms'\?\)"),
        ({"arms": ["hf", "our"]}, r"arms: got 'our'; .*\(did you mean 'ours'\?\)"),
        ({"x": {"key": "name"}}, "x: label: got None; must be given"),
        ({"x": {"key": "max_length", "label": "l"}}, "'max_length'; must be one of its overrides or vary"),
        ({"steps": 3, "window": 2}, "warmup and steps are multiples of window"),
        ({"points": [{"name": "a", "recipe": LLAMA, "steps": 4}]}, "'a': got .* warmup and steps are"),
        ({"launch": [{"name": "a", "config_file": "configs/no.yaml", "num_processes": 1}]}, "got 'configs/no.yaml'"),
        ({"points": [{"name": "a", "recipe": "recipes/no.yaml"}]}, "'a': recipe: got 'recipes/no.yaml'"),
        ({"points": [{"name": "a", "recipe": LLAMA, "varry": {}}]}, "did you mean 'vary'"),
        ({"points": 2 * [{"name": "a", "recipe": LLAMA}]}, "'a', .* must be unique"),
    ],
)
def test_a_bad_suite_is_rejected(change, message, tmp_path):
    content = yaml.safe_load((ROOT / "benchmarks" / "suites" / "step_1b.yaml").read_text())
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content | change))
    with pytest.raises(ValueError, match=message):
        suite.load(path)


def test_a_suite_s_environment_is_that_of_its_runs(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    job = first_job("paper_models", "hf")
    assert train.environment(job)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert train.environment(job | {"processes": 2})["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_a_point_may_have_times_of_its_own():
    whole = suite.load(Path("paper_lengths"))
    assert {p["x"]: (p["group"], p["warmup"], p["steps"]) for p in whole.points if p["x"] in (4096, 8192)} == {
        4096: ("Llama-3-8B", 1, 2),
        8192: ("Llama-3-8B", 1, 1),
    }
    assert {job["steps"] for job in whole.jobs() if job["x"] == 16384} == {1}
    assert [p["x"] for p in suite.load(Path("paper_lengths"), smoke=True).points] == [16, 32]


def test_what_the_command_line_selects(capsys):
    chosen = train.parse_args(["paper_llama3_batch", "--points", "48,96", "--arms", "compile", "--rounds", "2"]).chosen
    assert [point["x"] for point in chosen.points] == [48, 96]
    assert (chosen.arms, chosen.rounds) == (("compile",), 2)
    name = "llama-3-8b at batch size 32"
    (point,) = train.parse_args(["paper_llama3_batch", "--points", name]).chosen.points
    assert point["point"].lower() == name
    names = "Llama-3-8B batch 64,Gemma-7B batch 48"
    assert ",".join(p["point"] for p in train.parse_args(["paper_models", "--points", names]).chosen.points) == names
    for bad, message in (
        (["paper"], "got 'paper'"),
        (["step_1b", "--points", "gpt"], "--points: got 'gpt'"),
        (["step_1b", "--arms", "us"], "must be one or more of hf, ours"),
        (["step_1b", "--points", ","], "--points: got ''"),
        (["step_1b", "--rounds", "0"], "got 0; must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            train.parse_args(bad)
        assert message in capsys.readouterr().err


def test_rounds_are_interleaved_and_combined():
    jobs = replace(suite.load(Path("paper_two_gpus")), arms=("hf", "ours"), rounds=2).jobs()
    assert [(j["round"], j["x"], j["launch"], j["arm"]) for j in jobs[:5]] == [
        (0, 32, "FSDP2", "hf"),
        (0, 32, "FSDP2", "ours"),
        (0, 32, "ZeRO-3", "hf"),
        (0, 32, "ZeRO-3", "ours"),
        (0, 64, "FSDP2", "hf"),
    ]
    assert [j["round"] for j in jobs] == [0] * 8 + [1] * 8
    row = rows.combine(jobs[0], [GOOD, GOOD | {"tokens_per_s": 110.0}, GOOD | {"tokens_per_s": 102.0}])
    assert (row["status"], row["tokens_per_s"], len(row["rounds"])) == ("ok", 102.0, 3)
    assert row["spread"] == pytest.approx(10 / 102)
    assert not rows.has_failed(row | {"arm": "ours"})
    for other, text in ((OOM, "1 ok, 1 OOM"), (ERROR, "1 ok, 1 error")):
        mixed = rows.combine(jobs[1], [GOOD, other])
        assert (mixed["tokens_per_s"], mixed["spread"]) == (100.0, None), "one round has no spread"
        assert rows.counts_text(mixed) == text
        assert rows.has_failed(mixed)
        assert not rows.has_failed(mixed | {"arm": "hf"}), "a peer's failure is a result"
    oom = rows.combine(jobs[1], [OOM])
    assert (oom["status"], rows.has_failed(oom)) == ("oom", False)


def test_what_a_result_file_knows_is_kept_and_what_it_does_not_is_run(tmp_path):
    job, now = first_job("step_1b", "hf"), {"commit": "a", "device": "g", "packages": {"torch": "2"}}
    good, oom = GOOD | {"run": now | {"date": "1"}}, OOM | {"run": now | {"date": "2"}}
    old = [GOOD | {"run": now | change} for change in ({"commit": "b"}, {"packages": {"torch": "1"}})]

    def kept(rounds, run=now, **change):
        return rows.kept_rounds(job, rows.combine(job | change, rounds), run)

    assert kept([good, oom]) == [good, oom]
    assert kept([good, ERROR | {"run": now}]) == [good], "what failed is tried again"
    assert kept([*old, good]) == [good], "measured of something else"
    assert kept([good], steps=99) == [], "measured with other settings"
    changed = now | {"commit": "a+uncommitted"}
    assert kept([GOOD | {"run": changed}], run=changed) == [], "what the changes were is not known"
    assert rows.is_settled([OOM])
    assert not rows.is_settled([GOOD, OOM])
    assert not rows.is_settled([GOOD])
    for file in (ROOT / "benchmarks" / "results").glob("train-step_1b-*.json"):
        before_suites = [row for row in json.loads(file.read_text())["results"] if "recipe" not in row]
        assert not any(rows.kept_rounds(job | row, row, now) for row in before_suites)
    # Each round keeps the provenance it was measured under.
    path = tmp_path / "train.json"
    for commit, rounds in (("a", [GOOD]), ("b", [GOOD | {"run": {"commit": "a"}}, GOOD])):
        common.ResultFile(path, rows.KEYS, {"commit": commit}).add(rows.combine(job, rounds))
    data = json.loads(path.read_text())
    (row,) = data["results"]
    assert [data["runs"][r["run"]]["commit"] for r in row["rounds"]] == ["a", "b"]
    common.ResultFile(path, rows.KEYS, {"commit": "c"}).add(rows.combine(job, [GOOD]))
    assert json.loads(path.read_text())["runs"] == [{"commit": "c"}]


def test_a_spent_budget_an_absent_package_and_a_known_oom_start_no_worker(tmp_path, monkeypatch):
    absent = replace(peers.PEERS["liger"], packages=("a_package_nobody_has",))
    monkeypatch.setitem(peers.PEERS, "liger", absent)
    started = []
    monkeypatch.setattr(train, "launch", lambda jobs, timeout: started.append(jobs[0]["arm"]) or
                        [(OOM if jobs[0]["arm"] == "hf" else GOOD) | {"seconds": 1.0}])  # fmt: skip
    options = ["step_1b", "--points", "llama-3.2-1b 8x", "--rounds", "2", "--out", str(tmp_path), "--commit", "a"]
    run = train.Run(train.parse_args([*options, "--arms", "hf,ours,liger"]), HELLO)
    run.work()
    assert run.complete
    assert started == ["hf", "ours", "ours"]
    assert {row["arm"]: row["status"] for row in run.results.rows} == {"hf": "oom", "ours": "ok", "liger": "absent"}
    spent = train.Run(train.parse_args([*options, "--arms", "compile", "--device-budget", "0"]), HELLO)
    spent.work()
    assert not spent.complete
    # Started again, there is nothing to do, unless the commit or the command line asks for it.
    wanted = [*options, "--arms", "hf,ours"]
    for more, count in ([], 0), (["--commit", "b"], 3), (["--again"], 3):
        started.clear()
        train.Run(train.parse_args([*wanted, *more]), HELLO).work()
        assert len(started) == count, more


def test_the_rows_of_a_place_are_held_against_hf_whichever_comes_first(tmp_path, monkeypatch):
    norms = {"ours": 2.2, "hf": 2.0, "liger": 2.05}
    monkeypatch.setattr(
        train, "launch", lambda jobs, timeout: [GOOD | {"seconds": 1.0, "first_grad_norm": norms[jobs[0]["arm"]]}]
    )
    monkeypatch.setattr(train, "missing_packages", lambda job: [])
    options = ["two_gpus", "--launches", "FSDP2", "--rounds", "1", "--out", str(tmp_path), "--arms", "ours,hf,liger"]
    run = train.Run(train.parse_args([*options, "--points", "32"]), HELLO)
    run.work()
    made = {row["arm"]: row for row in run.rows()}
    assert {arm: row["status"] for arm, row in made.items()} == {"ours": "inexact", "hf": "ok", "liger": "ok"}
    assert rows.has_failed(made["ours"])
    text = tables.Training(run.rows(), run.about()).full()
    assert "100~" in text
    assert "first gradient norm more than 3% from HF's" in text
    assert "not measured" not in text
    text = tables.Training(run.rows(), run.suite.about).full()
    assert "not measured: Llama-3-8B at batch size per device 32, ZeRO-3 x 2; " in text
    assert "liger_trainer" not in tables.Training(run.rows(), run.about()).average()


def test_launches_without_devices_are_left_out(tmp_path, capsys):
    run = train.Run(train.parse_args(["paper_four_gpus", "--out", str(tmp_path)]), HELLO)
    assert {job["processes"] for job in run.jobs} == {1, 2}
    assert not run.complete
    assert "more processes than the 2 devices here: FSDP2 x 4, ZeRO-3 x 4" in capsys.readouterr().out
    assert all(processes < 4 for _, _, processes in run.about()["places"])
    assert not train.Run(train.parse_args(["paper_two_gpus", "--out", str(tmp_path)]), HELLO | {"devices": 1}).jobs


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "GEMM"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<c10::BFloat16>>", "optimizer"),
        ("_norm_bwd_kernel", "norm"),
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
