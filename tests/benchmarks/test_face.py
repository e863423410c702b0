"""The picture of the README, and the tables that pages ask for."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:  # a checkout's folder, not installed
    patch.syspath_prepend(str(ROOT))
    from benchmarks import common, face, plot, tables


def test_the_first_suite_with_hf_and_ours_is_drawn(tmp_path):
    assert face.chosen(tmp_path) is None
    assert not face.draw(tmp_path, tmp_path / "none.png")
    [step] = common.RESULTS.glob("train-step_1b-*.json")
    shutil.copy(step, tmp_path)
    data, models = face.chosen(tmp_path)
    assert data["suite"]["name"] == "step_1b"
    assert [set(rows) for rows in models.values()] == [{"hf", "liger", "ours"}] * face.MODELS
    assert face.draw(tmp_path, tmp_path / "readme.png")
    assert (tmp_path / "readme.png").read_bytes().startswith(b"\x89PNG")
    # A suite before it counts as soon as it has both arms. HF may be out of memory there, ours not.
    data["suite"]["name"] = "padded_rows"
    for row in data["results"]:
        if row["arm"] == "hf":
            row["status"] = "oom"
    (tmp_path / "train-padded_rows-gpu.json").write_text(json.dumps(data))
    found, models = face.chosen(tmp_path)
    assert found["suite"]["name"] == "padded_rows"
    assert {rows["hf"]["status"] for rows in models.values()} == {"oom"}
    assert face.draw(tmp_path, tmp_path / "oom.png")


def test_pages_ask_for_tables_that_there_are():
    made = set()
    for kind, tables_of in (("kernels", plot.kernel_tables), ("train", plot.train_tables)):
        for file in common.RESULTS.glob(f"{kind}-*.json"):
            made |= {name for name, text in tables_of(file.stem, json.loads(file.read_text())).items() if text}
    for file in common.RESULTS.glob("models*.json"):
        made |= set(tables.survey_tables(file.stem, json.loads(file.read_text())["results"]))
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    asked = {match[2] for match in plot.MARKER.finditer(pages)}
    assert asked
    assert asked <= made
