"""The survey of every causal LM: it finds no difference, and it would show one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

with pytest.MonkeyPatch.context() as patch:  # a checkout's folder, not installed
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    import survey

    from benchmarks import tables


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)], ids=["a third", "all"])
def test_causal_lms_compute_the_same_with_and_without(step, tmp_path):
    """All of transformers, or every third."""
    chosen = sorted(AutoModelForCausalLM._model_mapping._model_mapping)[::step]
    command = [sys.executable, survey.__file__, "--out", str(tmp_path), "--models", ",".join(chosen)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "models.json").read_text())["results"]
    status = [row["status"] for row in rows]
    assert [row["model_type"] for row in rows] == chosen
    assert len(rows) * step > 180
    assert status.count("same") > 0.87 * len(rows), [row for row in rows if row["status"] != "same"]
    assert sum("fused_loss" in row.get("applied", {}) for row in rows) > 0.74 * len(rows)
    assert f"| {chosen[0]} " in tables.survey_tables("models", rows)["models"]


def test_the_survey_would_show_a_difference():
    model = survey.tiny_model("llama")
    theirs = survey.train_once(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-1
    found = survey.differences(survey.train_once(model), theirs)
    assert min(found["gradient"], found["logits"]) > survey.TOLERANCE
    loss, gradients, logits = theirs
    last = list(gradients)[-1]
    for wrong in (
        (loss, gradients | {last: gradients[last] * float("nan")}, logits),
        (loss, gradients | {"more": logits}, logits),
        (loss, {n: g for n, g in gradients.items() if n != last}, logits),
        (loss, gradients, logits * float("nan")),
        (loss * float("inf"), gradients, logits),
    ):
        assert survey.differences(wrong, theirs)["largest"] >= survey.INFINITE
