"""How the training benchmark's rows are compared, and the tables and plots that are made of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rounds import GOOD, OOM

with pytest.MonkeyPatch.context() as patch:  # a checkout's folder, not installed
    patch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import plot, rows, suite, tables


def test_arms_are_compared_in_the_rounds_that_they_share():
    """Of two machines, the second 20 % faster, ours is 30 %, 32 % and 31 % ahead; the medians would say 45 %."""
    job = suite.load(Path("step_1b")).jobs()[0]
    speeds = {"hf": [(0, 100.0), (0, 100.0), (1, 120.0)], "ours": [(0, 130.0), (1, 158.4), (1, 999.0), (0, 131.0)]}
    hf, ours = (
        rows.combine(job, [GOOD | {"run": run, "tokens_per_s": speed} for run, speed in measured])
        for measured in speeds.values()
    )
    assert sorted(rows.changes_by_round(ours, hf, "tokens_per_s")) == pytest.approx([0.30, 0.31, 0.32])
    assert rows.change(ours, hf, "tokens_per_s") == pytest.approx(0.31)
    assert rows.percent_and_range(ours, hf, "tokens_per_s") == "+31.0% (+30.0 to +32.0)"
    alone = rows.combine(job, [GOOD | {"run": 7, "tokens_per_s": 50.0}])
    assert rows.percent_and_range(alone, hf, "tokens_per_s") == "-50.0%", "no round in common"
    failed = rows.combine(job, [OOM | {"run": 0}, GOOD | {"run": 0, "tokens_per_s": 150.0}])
    assert rows.percent_and_range(failed, hf, "tokens_per_s") == "+50.0%"
    assert rows.percent_and_range(hf, None, "tokens_per_s") is None


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
    made = []
    for job in replace(chosen, rounds=1).jobs():
        factor = {"hf": 1.0, "ours": 1.3, "liger": 1.25, "compile": 0.0}[job["arm"]]
        speed = 100.0 * factor * job["processes"] ** 0.5
        good = GOOD | {"run": 0, "tokens_per_s": speed, "peak_allocated_gib": 20.0 / (factor or 1)}
        rounds = [good, good | {"tokens_per_s": speed * 1.1}, good | {"tokens_per_s": speed * 0.9}]
        if job["arm"] == "compile":
            rounds = [{"status": "absent", "note": "", "run": 0}]
        elif job["arm"] == "hf" and job["point"] == chosen.points[-1]["point"]:
            rounds = [OOM | {"run": 0}]
        made.append(rows.combine(job, rounds) | {"run": 0})
    return {"suite": chosen.about, "runs": [run], "results": made}


@pytest.mark.parametrize("name", ["paper_models", "paper_lengths", "paper_four_gpus"])
def test_plots_and_tables(name, tmp_path):
    stem = f"train-{name}-gpu"
    (tmp_path / f"{stem}.json").write_text(json.dumps(train_data(name)))
    page = tmp_path / "page.md"
    marked = (f"<!-- table:{stem}{part} -->\nold\n<!-- /table -->\n" for part in ("", "-brief", "-gains", "-average"))
    page.write_text("a\n" + "".join(marked))
    assert plot.main(["--results", str(tmp_path), "--update", str(page)]) == 0
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    for part in ("+30.0%", "-23.1%", "20.0%", "OOM", "absent: compile", "Some GPU", "with padding"):
        assert part in text, part
    brief = [line for line in text[text.index(f"{stem}-brief") :].splitlines() if line.startswith("| ")]
    assert any("(20.0)" in line and "(15.4)" in line for line in brief), brief
    assert any(" OOM |" in line for line in brief)
    gains = text[text.index(f"table:{stem}-gains") : text.index(f"table:{stem}-average")]
    assert "over HF eager" in gains
    assert "+30.0% (+30.0 to +30.0)" in gains
    assert "+4.0% (+4.0 to +4.0)" in gains
    average = text[text.index(f"table:{stem}-average") :].splitlines()
    for against in ("    HF eager |   +30.0%", "liger-kernel |    +4.0%"):
        assert any(f"| liger_trainer | {against}" in line for line in average), average
    data = train_data(name)
    growth = bool(tables.Training(data["results"], data["suite"]).growth())
    assert growth == (name == "paper_lengths"), "of models or of numbers of processes there is none"
    if name == "paper_models":
        places = [line.split("|")[-2].strip() for line in average if line.startswith("| liger")]
        assert places == ["4"] * 3, (
            "of five, without the one where HF has no result, also for ours against liger-kernel"
        )
    assert "old" not in text
    if name == "paper_four_gpus":
        assert "70.7%" in text, "scaling from one device to two by the square root"
    assert plot.main(["--results", str(tmp_path), "--update", str(page)]) == 0
    assert page.read_text() == text


def test_growth_is_from_the_smallest_to_the_largest_x_of_an_arm():
    chosen = replace(suite.load(Path("paper_two_gpus")), arms=("hf", "ours"))
    made = []
    for job in replace(chosen, rounds=1).jobs():
        good = GOOD | {"run": 0, "tokens_per_s": 10.0 * job["x"], "above_static_gib": 2.0}
        if job["arm"] == "hf":
            good["above_static_gib"] = job["x"] / 16
        lost = job["arm"] == "hf" and job["launch"] == "ZeRO-3" and job["x"] == 64
        made.append(rows.combine(job, [OOM | {"run": 0} if lost else good]))
    lines = tables.Training(made[::-1], chosen.about).growth().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    ours, hf = "liger_trainer", "HF eager"
    assert [line[1:3] for line in cells] == [["FSDP2", hf], ["FSDP2", ours], ["ZeRO-3", ours]]
    assert cells[0][3:5] == ["32 to 64", "320 to 640 (+100.0%)"]
    assert [line[-1] for line in cells[:2]] == ["2 to 4 (+100.0%)", "2 to 2 (+0.0%)"]


def test_the_source_of_a_table_names_what_differs_between_runs():
    runs = [
        {"device": "G", "driver": "1", "packages": {"torch": "2", "peft": None}, "date": "2026-01-02T", "commit": "a"}
    ]
    runs.append(runs[0] | {"driver": "2", "packages": {"torch": "3", "peft": None, "deepspeed": "4"}})
    line = plot.provenance_line({"runs": runs, "results": []})
    assert line == "G, driver 1 and 2, torch 2 and 3, deepspeed 4; 2026-01-02; commit a"
