"""The examples run, and do what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_scripts(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    ran = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ran["losses"][-1] < 0.8 * ran["losses"][0]
    assert "loss" in capsys.readouterr().out


def test_notebook(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), names)
    steps, ours, plain = zip(*names["losses"], strict=True)
    assert ours == pytest.approx(plain, rel=1e-4)
    assert ours[-1] < ours[0]
    assert names["same"] is True
    assert ">fused_loss</td>" in names["report"]._repr_html_()
    # The outputs that are committed come from such a run; GitHub and editors show them.
    shown = [output for cell in code for output in cell["outputs"]]
    tables = ["".join(output["data"]["text/html"]) for output in shown if "text/html" in output.get("data", {})]
    assert len(tables) == 1
    assert ">fused_loss</td>" in tables[0]
    printed = "".join("".join(output["text"]) for output in shown if output["output_type"] == "stream")
    assert f"step {steps[0]:>3}   with the kernels" in printed
