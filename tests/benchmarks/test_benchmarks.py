"""The benchmarks on the CPU: they run end to end, their floors are the published ones, and wrong kernels are caught."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:  # a checkout's folder, not installed
    patch.syspath_prepend(str(ROOT))
    from benchmarks import cases, common, kernels, op_worker, peers, plot, workers


def run_script(name, *args):
    """Run a script as a user does, from another folder; returns its output."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


SMOKE = cases.select(["smoke"])
OPS = set(cases.MEASURED)


def smoke_rows(arm):
    """The rows of one arm's worker over the smoke shapes; runs in this process."""
    job = {"arm": arm, "shapes": SMOKE, "host": False, "device": "cpu"}
    messages = list(op_worker.messages(job))
    assert [m["kind"] for m in messages] == ["hello"] + ["row"] * len(SMOKE)
    return messages[1:]


# Milliseconds at 2.99 TB/s, worked out by hand for the same shapes: 5, 5, 5, 8, 4, 4, 3 and 3 passes over the tensor.
FLOORS = [
    ("rms_norm", "16384x4096", 0.224),
    ("rms_norm", "4096x16384", 0.224),
    ("layer_norm", "16384x4096", 0.224),
    ("swiglu", "16384x14336", 1.255),
    ("rope", "B4 T2048 32q 8kv d128", 0.112),
    ("rope", "B4 T2048 64q 64kv d128", 0.359),
    ("cross_entropy", "8192x32000", 0.525),
    ("cross_entropy", "8192x128256", 2.11),
]


def test_floors_are_the_bytes_that_must_move():
    anchors = {(s["op"], s["shape"]): s for s in cases.select(["anchors"])}
    for op, shape, milliseconds in FLOORS:
        moved = cases.bytes_moved(cases.build(anchors[op, shape], "meta"))
        assert moved["full"] / 2.99e9 == pytest.approx(milliseconds, rel=0.02), (op, shape)


def test_shapes_are_selected_by_set_and_op():
    everything = cases.select(["all"])
    keys = [(s["op"], s["shape"]) for s in everything]
    assert len(set(keys)) == len(keys), "two shapes share a name: their rows would replace each other"
    assert {op for op, _ in keys} == OPS
    assert {s["op"] for s in cases.select(["small"], ["cross_entropy", "rope"])} == {"cross_entropy", "rope"}
    with pytest.raises(argparse.ArgumentTypeError, match=r"got 'norms'; must be one or more of rms_norm"):
        common.names(cases.MEASURED)("norms")


@pytest.mark.parametrize("arm", ["ours", "ours_low_memory", "hf", "torch", "trl"])
def test_every_arm_computes_the_op(arm):
    rows = smoke_rows(arm)
    answered = [r for r in rows if r["status"] != "unsupported"]
    assert [r for r in answered if r["status"] != "ok" or r["full_ms"] <= 0 or r["floor_full_ms"] <= 0] == []
    ops = {r["spec"]["op"] for r in answered}
    heads = {"linear_cross_entropy", "linear_logprobs"}
    required = {"ours": OPS, "ours_low_memory": {"linear_cross_entropy"}, "trl": heads}
    required |= {"torch": {"rms_norm", "layer_norm", "cross_entropy"}}
    gates = {"swiglu", "geglu", "clamped_swiglu"}
    required |= {"hf": heads | gates | {"rms_norm", "add_rms_norm", "rope", "cross_entropy"}}
    assert ops >= required[arm]


def test_an_absent_peer_is_a_result(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "liger", replace(peers.PEERS["liger"], packages=("a_package_nobody_has",)))
    rows = smoke_rows("liger")
    assert {r["status"] for r in rows} == {"absent"}
    assert "a_package_nobody_has" in rows[0]["note"]


def broken_calls():
    """Per op a call that forgets what a fast but wrong kernel would forget."""

    class DropSoftmax(torch.autograd.Function):  # right loss, only the labels' entries in the gradient
        @staticmethod
        def forward(ctx, logits, labels):
            ctx.save_for_backward(logits, labels)
            return torch.nn.functional.cross_entropy(logits.float(), labels)

        @staticmethod
        def backward(ctx, grad):
            logits, labels = ctx.saved_tensors
            p = logits.float().softmax(-1).gather(1, labels[:, None])
            return torch.zeros_like(logits).scatter(1, labels[:, None], ((p - 1) / len(labels)).to(logits.dtype)), None

    def linear(case):
        return lambda: (DropSoftmax.apply(case["hidden"] @ case["weight"].T, case["labels"]),)

    yield "cross_entropy", "12x33", lambda c: lambda: DropSoftmax.apply(c["logits"], c["labels"])
    yield "linear_cross_entropy", "BT64 H16 V257", linear
    yield "swiglu", "5x48", lambda c: lambda: torch.relu(c["gate"]) * c["up"]
    yield "rms_norm", "5x48", lambda c: lambda: c["x"] * c["weight"]
    yield "rms_norm", "5x48", lambda c: lambda: c["x"] * c["weight"] * float("nan")


def test_a_wrong_kernel_is_marked():
    for op, shape, make in broken_calls():
        case = cases.build(cases.parse(op, shape), "cpu")
        row = op_worker.check(case, make(case))
        assert row["status"] == "inexact", (op, row)


def test_kernels_script(tmp_path):
    (tmp_path / "kernels-cpu.json").write_text(
        json.dumps({"runs": [{"date": "old"}], "results": [{"op": "rope", "shape": "x", "arm": "ours", "run": 0}]})
    )
    args = ("--smoke", "--arms", "torch", "--ops", "rms_norm,cross_entropy", "--out", str(tmp_path), "--commit", "abc")
    out = run_script("kernels.py", *args)
    assert "| rms_norm 5x48" in out
    data = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert [(r["op"], r["arm"], r["run"]) for r in data["results"]] == [
        ("rope", "ours", 0),
        ("rms_norm", "torch", 1),
        ("cross_entropy", "torch", 1),
    ]
    run = data["runs"][1]
    assert run["commit"] == "abc"
    assert run["device"] == "cpu"
    assert run["command"].startswith("python benchmarks/kernels.py --smoke")
    assert run["packages"]["torch"] == torch.__version__


def test_a_spent_budget_drops_shapes_and_a_dead_worker_is_recorded():
    job = {"arm": "torch", "shapes": SMOKE[:2], "host": False, "device": "cpu"}
    assert [m for m in kernels.measure_arm(job, 0) if m["kind"] == "row"] == []
    rows = list(kernels.measure_arm(job | {"device": "no_such_device"}, 60))
    assert [r["status"] for r in rows if r["kind"] == "row"] == ["error", "error"]
    assert "no_such_device" in rows[-1]["note"]


def test_workers_are_killed_at_their_timeout_and_say_why_they_failed():
    start = "import sys, time; from benchmarks.workers import emit; emit({}); print('noise');"
    *messages, end = workers.run([sys.executable, "-c", start + "sys.exit('reason')"], timeout=60)
    assert messages == [{}]
    assert end["code"] == 1
    assert "reason" in end["log"]
    begun = time.monotonic()
    left = "import subprocess; child = subprocess.Popen(['sleep', '600'], start_new_session=True);"
    code = start + left + "emit({'pid': child.pid}); time.sleep(60)"
    _, message, end = workers.run([sys.executable, "-c", code], timeout=3)
    assert end["code"] is None
    assert time.monotonic() - begun < 10
    status = Path(f"/proc/{message['pid']}/status")
    assert not status.exists() or "State:\tZ" in status.read_text(), "what it started is stopped, too"


def test_a_result_file_replaces_rows_and_forgets_empty_runs(tmp_path):
    path = tmp_path / "x.json"
    common.ResultFile(path, ("a",), {"n": 0}).add({"a": 1, "v": 1})
    second = common.ResultFile(path, ("a",), {"n": 1})
    second.add({"a": 2, "v": 2})
    assert [r["run"] for r in json.loads(path.read_text())["results"]] == [0, 1]
    second.add({"a": 1, "v": 3})
    data = json.loads(path.read_text())
    assert data["runs"] == [{"n": 1}]
    assert sorted((r["a"], r["v"], r["run"]) for r in data["results"]) == [(1, 3, 0), (2, 2, 0)]


def plot_data():
    run = {"device": "Some GPU", "driver": "1", "packages": {"torch": "2"}, "date": "2026-01-02T", "commit": "abc"}
    row = {"op": "rms_norm", "shape": "16384x4096", "status": "ok", "full_ms": 0.25, "floor_full_ms": 0.2}
    row |= {"fwd_ms": 0.1, "floor_fwd_ms": 0.08, "bwd_ms": 0.15, "floor_bwd_ms": 0.12, "extra_mib": 128.0, "run": 0}
    slow = row | {"arm": "hf", "status": "inexact", "full_ms": 4.0}
    rows = [row | {"arm": "ours"}, slow, {**row, "arm": "liger", "status": "absent"}]
    rows.append({"op": "rms_norm", "shape": "64x2048 host", "arm": "ours", "status": "ok", "host_us": 12.5, "run": 0})
    return {"runs": [run], "results": rows}


def test_plots_and_tables(tmp_path):
    (tmp_path / "kernels-gpu.json").write_text(json.dumps(plot_data()))
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table:kernels-gpu-full-anchors -->\nold\n<!-- /table -->\nb\n")
    assert plot.main(["--results", str(tmp_path), "--update", str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text
    assert "0.25 (1.25x)" in text
    assert "4 (20.00x)~" in text
    assert "Some GPU" in text
    assert "liger-kernel" not in text
    assert (tmp_path / "kernels-gpu.md").read_text().count("| rms_norm 16384x4096") == 4
    assert "12.5" in (tmp_path / "kernels-gpu.md").read_text()
    assert plot.main(["--results", str(tmp_path), "--update", str(readme)]) == 0
    assert readme.read_text() == text
    for bad, message in (
        ("<!-- table:nothing -->\n<!-- /table -->", "nothing"),
        ("<!-- table:kernels-gpu-full-anchors -->\n", "closed"),
    ):
        readme.write_text(bad)
        with pytest.raises(ValueError, match=message):
            plot.main(["--results", str(tmp_path), "--update", str(readme)])
