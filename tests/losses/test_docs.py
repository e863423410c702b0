"""The code in docs/losses.md runs."""

import re
from pathlib import Path

from liger_trainer.kernels.runtime import launch

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_the_examples_run(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    losses, last = names["losses"], names["loss"]
    assert losses[-1] < losses[0]
    assert last.item() > 0
