"""What the training benchmark runs, keeps and shows: suites, command line, rows, fingerprints, tables. No training."""

import json
import multiprocessing
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
    from benchmarks import (
        common,
        fingerprint,
        profile_step,
        relay,
        suite,
        train,
        train_arms,
        train_rows,
        train_tables,
    )


def first_job(name, arm):
    """The first job of a suite as the command line makes it."""
    chosen = replace(suite.load(Path(name)), arms=(arm,))
    return train_rows.plan(chosen)[0] | {"device": "cuda", "profile": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": ["hf"]}, r"unknown key 'arm' \(did you mean 'arms'\?\)"),
        ({"arms": ["hf", "our"]}, r"arms: 'our' is none \(did you mean 'ours'\?\)"),
        ({"x": {"key": "name"}}, "x: label is missing"),
        ({"x": {"key": "max_length", "label": "l"}}, "'max_length', which is no key of its overrides or vary"),
        ({"steps": 3, "window": 2}, "warmup and steps must be multiples of window"),
        ({"points": [{"name": "a", "recipe": "recipes/shapes/llama3.2_1b.yaml", "steps": 4}]}, "'a': warmup and steps"),
        ({"environment": ["A=1"]}, r"environment must be a mapping of names to values, got \['A=1'\]"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        (
            {"launch": [{"name": "a", "config_file": "configs/no.yaml", "num_processes": 1}]},
            "no such file: 'configs/no",
        ),
        ({"points": [{"name": "a", "recipe": "recipes/no.yaml"}]}, "point 'a': recipe: no such file"),
        ({"points": [{"name": "a", "recipe": "recipes/shapes/llama3.2_1b.yaml", "varry": {}}]}, "did you mean 'vary'"),
        ({"points": [{"name": "a, b", "recipe": "recipes/shapes/llama3.2_1b.yaml"}]}, "must have no comma"),
        ({"points": 2 * [{"name": "a", "recipe": "recipes/shapes/llama3.2_1b.yaml"}]}, "'a' is there twice"),
    ],
)
def test_a_bad_suite_is_refused(change, message, tmp_path):
    content = yaml.safe_load((ROOT / "benchmarks" / "suites" / "step_1b.yaml").read_text())
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content | change))
    with pytest.raises(ValueError, match=message):
        suite.load(path)


def test_a_suite_s_environment_is_that_of_its_runs(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    job = first_job("paper_models", "hf") | {"fingerprint": "now"}
    assert relay.environment(job)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in relay.environment(first_job("step_1b", "hf"))
    row = train_rows.combine(job, [GOOD | {"fingerprint": "now"}])
    for environment, kept in ((job["environment"], 1), ({}, 0)):
        rows = {train_rows.key_of(job): row | {"environment": environment}}
        assert len(train_rows.kept_rounds(job, rows, keep_old=True)) == kept


def test_a_point_may_have_times_of_its_own():
    whole = suite.load(Path("paper_lengths"))
    assert {p.x: (p.group, p.warmup, p.steps) for p in whole.points if p.x in (4096, 8192)} == {
        4096: ("Llama-3-8B", 1, 2),
        8192: ("Llama-3-8B", 1, 1),
    }
    assert {job["steps"] for job in train_rows.plan(whole) if job["x"] == 16384} == {1}
    assert [p.x for p in suite.load(Path("paper_lengths"), smoke=True).points] == [16, 32]


def test_what_the_command_line_selects(capsys):
    chosen = train.parse_args(["paper_llama3_batch", "--points", "48,96", "--arms", "compile", "--rounds", "2"]).chosen
    assert [point.x for point in chosen.points] == [48, 96]
    assert (chosen.arms, chosen.rounds) == (("compile",), 2)
    name = "llama-3-8b at batch size 32"
    (point,) = train.parse_args(["paper_llama3_batch", "--points", name]).chosen.points
    assert point.name.lower() == name
    names = "Llama-3-8B batch 64,Gemma-7B batch 48"
    assert ",".join(p.name for p in train.parse_args(["paper_models", "--points", names]).chosen.points) == names
    for anew in (["--smoke"], ["--profile", "ours"], ["--again"]):
        assert train.parse_args(["step_1b", *anew]).again
    assert not train.parse_args(["step_1b"]).again
    for bad, message in (
        (["paper"], "no such file: 'paper'"),
        (["step_1b", "--points", "gpt"], "--points: 'gpt' is in no name"),
        (["step_1b", "--arms", "us"], "allowed are hf, ours"),
        (["step_1b", "--points", ","], "--points: '' is in no name"),
        (["step_1b", "--rounds", "0"], "at least 1, got 0"),
        (["step_1b", "--smoke", "--keep-old"], "--keep-old cannot go with"),
    ):
        with pytest.raises(SystemExit):
            train.parse_args(bad)
        assert message in capsys.readouterr().err


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
    assert not train_rows.has_failed(row | {"arm": "ours"})
    for other, text in ((OOM, "1 ok, 1 OOM"), (ERROR, "1 ok, 1 error")):
        mixed = train_rows.combine(jobs[1], [GOOD, other])
        assert (mixed["tokens_per_s"], mixed["spread"]) == (100.0, None), "one round has no spread"
        assert train_rows.counts_text(mixed) == text
        assert train_rows.has_failed(mixed | {"arm": "ours"})
        assert train_rows.has_failed(mixed)
        assert not train_rows.has_failed(mixed | {"arm": "hf"}), "a peer's failure is a result"
    oom = train_rows.combine(jobs[1], [OOM])
    assert (oom["status"], train_rows.has_failed(oom)) == ("oom", False)


def test_what_a_result_file_knows_is_kept_and_what_it_does_not_is_run(tmp_path):
    job = first_job("step_1b", "hf") | {"fingerprint": "now"}
    key = train_rows.key_of(job)
    good, oom, old = GOOD | {"fingerprint": "now"}, OOM | {"fingerprint": "now"}, GOOD | {"fingerprint": "then"}

    def kept(rounds, keep_old=False, **change):
        return train_rows.kept_rounds(job, {key: train_rows.combine(job | change, rounds)}, keep_old)

    assert kept([good, oom]) == [good, oom]
    assert kept([good, ERROR | {"fingerprint": "now"}]) == [good], "what failed is tried again"
    assert kept([old, good, GOOD]) == [good], "measured of something else"
    assert kept([old, good, GOOD], keep_old=True) == [old, good, GOOD]
    assert kept([good], steps=99, keep_old=True) == [], "measured with other settings"
    assert train_rows.is_settled([OOM])
    assert not train_rows.is_settled([GOOD, OOM])
    assert not train_rows.is_settled([GOOD])
    for file in (ROOT / "benchmarks" / "results").glob("train-step_1b-*.json"):
        rows = {train_rows.key_of(row): row for row in json.loads(file.read_text())["results"]}
        before_suites = [row for row in rows.values() if "recipe" not in row]
        assert not any(train_rows.kept_rounds(job | row, rows, True) for row in before_suites)
    # Each round keeps the provenance it was measured under.
    path = tmp_path / "train.json"
    for commit, rounds in (("a", [GOOD]), ("b", [GOOD | {"run": {"commit": "a"}}, GOOD])):
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
    monkeypatch.setattr(relay.Relay, "start", lambda self, indexes: None)
    monkeypatch.setattr(relay.Relay, "run", lambda self, index, next_: started.append(self.jobs[index]["arm"]) or
                        (OOM if self.jobs[index]["arm"] == "hf" else GOOD) | {"seconds": 1.0})  # fmt: skip
    hello = {"device": "gpu", "driver": "1", "packages": {"torch": "2"}, "devices": 1}
    options = ["step_1b", "--points", "llama-3.2-1b 8x", "--rounds", "2", "--out", str(tmp_path)]
    run = train.Run(train.parse_args([*options, "--arms", "hf,ours,liger"]), hello)
    assert run.work()
    assert started == ["hf", "ours", "ours"]
    assert {row["arm"]: row["status"] for row in run.results.rows} == {"hf": "oom", "ours": "ok", "liger": "absent"}
    spent = train.parse_args([*options, "--arms", "compile", "--device-budget", "0"])
    assert not train.Run(spent, hello).work()
    # Started again, there is nothing to do; after a change, what it concerns is measured anew.
    wanted = train.parse_args([*options, "--arms", "hf,ours"])
    assert train.Run(wanted, hello).jobs == []
    monkeypatch.setattr(fingerprint, "our_sources", lambda: "edited")
    assert [job["arm"] for job in train.Run(wanted, hello).jobs] == ["ours", "ours"]
    assert train.Run(train.parse_args([*options, "--arms", "hf,ours", "--keep-old"]), hello).jobs == []
    assert started == ["hf", "ours", "ours"]


def test_the_rows_of_a_place_are_held_against_hf_whichever_comes_first(tmp_path, monkeypatch):
    hello = {"device": "gpu", "driver": "1", "packages": {}, "devices": 2}
    norms = {"ours": 2.2, "hf": 2.0, "liger": 2.05}
    monkeypatch.setattr(relay.Relay, "start", lambda self, indexes: None)
    monkeypatch.setattr(relay.Relay, "run", lambda self, index, next_: GOOD | {"seconds": 1.0} |
                        {"first_grad_norm": norms[self.jobs[index]["arm"]]})  # fmt: skip
    monkeypatch.setattr(train_rows, "missing_packages", lambda job: [])
    options = ["two_gpus", "--launches", "FSDP2", "--rounds", "1", "--out", str(tmp_path), "--arms", "ours,hf,liger"]
    run = train.Run(train.parse_args([*options, "--points", "32"]), hello)
    run.work()
    rows = {row["arm"]: row for row in run.rows()}
    assert {arm: row["status"] for arm, row in rows.items()} == {"ours": "inexact", "hf": "ok", "liger": "ok"}
    assert train_rows.has_failed(rows["ours"])
    text = train_tables.train_text(run.rows(), run.about())
    assert "100~" in text
    assert "first gradient norm more than 3% from HF's" in text
    assert "not measured" not in text
    text = train_tables.train_text(run.rows(), run.suite.about)
    assert "not measured: Llama-3-8B at batch size per device 32, ZeRO-3 x 2; " in text
    assert "liger_trainer" not in train_tables.average_text(run.rows(), run.about(), markdown=True)


def test_a_result_file_of_a_namesake_and_launches_without_devices_are_refused(tmp_path, capsys):
    hello = {"device": "gpu", "driver": "1", "packages": {}, "devices": 2}
    four = train.parse_args(["paper_four_gpus", "--out", str(tmp_path)])
    run = train.Run(four, hello)
    assert {launch.num_processes for launch in run.suite.launches} == {1, 2}
    assert run.left_out
    assert "more processes than the 2 devices here: FSDP2 x 4, ZeRO-3 x 4" in capsys.readouterr().out
    assert all(processes < 4 for _, _, processes in run.about()["places"])
    llama = {"recipe": "recipes/paper/llama3_8b.yaml", "point": "a", "launch": "b", "processes": 1, "arm": "hf"}
    llama["run"] = 0
    run.results.path.write_text(json.dumps({"suite": four.chosen.about, "runs": [{}], "results": [llama]}))
    train.Run(train.parse_args(["paper_four_gpus", "--points", "qwen2", "--out", str(tmp_path)]), hello)
    with pytest.raises(ValueError, match="paper_two_gpus: all launches have more processes than the 1 devices"):
        train.Run(train.parse_args(["paper_two_gpus"]), hello | {"devices": 1})
    for other in ({"suite": {"title": "x"}, "results": []},
                  {"suite": four.chosen.about, "results": [{"recipe": "other.yaml"}]}):  # fmt: skip
        run.results.path.write_text(json.dumps(other | {"runs": []}))
        with pytest.raises(ValueError, match="results of another suite of this name"):
            train.Run(four, hello)


def test_a_fingerprint_follows_what_is_measured(monkeypatch):
    packages = {"torch": "2", "liger-kernel": "1", "deepspeed": "1"}

    def of(arm, **change):
        return fingerprint.fingerprint(first_job("two_gpus", arm) | change, packages)

    before = {arm: of(arm) for arm in train_arms.ARMS}
    assert len(set(before.values())) == len(before)
    assert of("hf") == of("hf", x=1, point="renamed", round=7), "names are not measured"
    for change in ({"steps": 6}, {"processes": 3}, {"device": "cpu"}, {"config_file": "configs/ddp.yaml"},
                   {"recipe": "recipes/paper/qwen2_7b.yaml"}, {"overrides": {"max_length": 7}},
                   {"environment": {"A": "1"}}):  # fmt: skip
        assert of("hf", **change) != before["hf"], change
    zero = of("hf", config_file="configs/zero3.yaml")
    packages |= {"liger-kernel": "2", "deepspeed": "2"}
    assert {arm for arm in before if of(arm) != before[arm]} == {"liger", "liger_trl_head"}
    assert of("hf", config_file="configs/zero3.yaml") != zero
    packages |= {"liger-kernel": "1"}
    monkeypatch.setattr(fingerprint, "our_sources", lambda: "edited")
    assert {arm for arm in before if of(arm) != before[arm]} == {"ours", "ours_low_memory", "ours_compile"}
    same = ('"""Doc."""\ndef f(x):\n    return x', 'def f(x):  # why\n    "other"\n    return (x)')
    assert fingerprint._normal(same[0]) == fingerprint._normal(same[1]) != fingerprint._normal("def f(x): return -x")
    fields = [
        f'x: int = field(default={n}, metadata={{"help": "{text}"}})' for n, text in ((1, "a"), (1, "b"), (2, "a"))
    ]
    assert fingerprint._normal(fields[0]) == fingerprint._normal(fields[1]) != fingerprint._normal(fields[2])


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


def test_what_a_fingerprint_covers(monkeypatch):
    """Every module of ours that the Medusa model is made of, whatever arm trains it; none that no training runs."""
    inside = {path.stem for path in (ROOT / "liger_trainer").glob("medusa*.py")} | {"head_probe"}
    assert {Path(name).stem for name in fingerprint.MEDUSA} == inside
    ours = fingerprint.our_sources.__wrapped__
    before, beside = ours(), set()
    for path in (ROOT / "liger_trainer").glob("*.py"):
        monkeypatch.setattr(fingerprint, "_source", lambda p, own=path, real=fingerprint._source: p == own or real(p))
        beside |= {path.stem} if ours() == before else set()
        monkeypatch.undo()
    assert beside == {"batch_search", "cli", "fit", "fit_trial"}


def test_judging_a_row_keeps_where_it_was_measured(tmp_path):
    path = tmp_path / "x.json"
    common.ResultFile(path, ("a",), {"n": 0}).add({"a": 1})
    later = common.ResultFile(path, ("a",), {"n": 1})
    later.add({"a": 2}, lambda rows: [row | {"status": "inexact"} for row in rows])
    assert {row["a"]: (row["run"], row["status"]) for row in later.rows} == {
        1: ({"n": 0}, "inexact"), 2: ({"n": 1}, "inexact")
    }  # fmt: skip


def add_rows(path, name):
    results = common.ResultFile(path, ("a", "v"), {"name": name})
    for value in range(40):
        results.add({"a": name, "v": value})


def test_processes_share_a_result_file(tmp_path):
    path = tmp_path / "x.json"
    processes = [multiprocessing.Process(target=add_rows, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    data = json.loads(path.read_text())
    assert sorted((row["a"], row["v"]) for row in data["results"]) == [(a, v) for a in "abc" for v in range(40)]
    assert all(data["runs"][row["run"]] == {"name": row["a"]} for row in data["results"])
