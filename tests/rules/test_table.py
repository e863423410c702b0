"""The table of rules: it has every kind of LigerConfig, and every kind has its files."""

from pathlib import Path

import pytest

from liger_trainer import LigerConfig
from liger_trainer.config import KINDS
from liger_trainer.kernels.linear_loss.options import MEMORY_FIELDS
from liger_trainer.rules import PER_BATCH, RULES

TESTS = Path(__file__).parents[1]
FILES = {"rms_norm": "norms", "layer_norm": "norms"}  # both are one file


def test_the_kinds_of_the_config_are_those_of_the_table():
    assert {kind for rule in RULES for kind in rule.kinds} == set(KINDS)
    order = [KINDS.index(rule.kinds[0]) for rule in RULES]
    assert order == sorted(order)
    assert "padding_mask" in PER_BATCH
    off = {kind: "all" if kind == "recompute" else False for kind in KINDS}
    assert all(LigerConfig(**{kind: off[kind]}).wants(kind) is False for kind in KINDS)
    assert all(map(LigerConfig().wants, KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_probed_in_its_file_and_tested(kind):
    file = FILES.get(kind, kind)
    rules = [rule for rule in RULES if kind in rule.kinds]
    assert {rule.probe.__module__ for rule in rules} == {f"liger_trainer.rules.{file}"}
    assert list(TESTS.rglob(f"test_{file}.py"))


def test_every_option_is_a_kind_or_belongs_to_one_or_to_all():
    owned = [name for kind in KINDS for name in LigerConfig().options_of(kind)]
    assert sorted([*KINDS, *owned, "strict"]) == sorted(LigerConfig().to_dict())
    of_loss = LigerConfig(low_memory=True).options_of("fused_loss")
    assert of_loss == {**of_loss, "logits_budget_mib": "auto", "low_memory": True}
    assert tuple(of_loss) == MEMORY_FIELDS
    assert LigerConfig().options_of("glu") == {"recompute_glu": True}
    assert LigerConfig().options_of("recompute") == {"memory_margin": 0.08}
