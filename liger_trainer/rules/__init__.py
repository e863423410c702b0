"""The rules: one file per kind, each finding candidates by structure and probing them by number.

A rule never looks at a model's name. A rule for modules runs the module's own forward on random numbers and compares it
with each variant of our op; the variant that agrees is applied. If none agrees, the candidate is skipped, with the
reason. Modules that are alike in everything the probe depends on share one probe.

``RULES`` is the table of all rules. It is read from the files of this folder, each of which has its own ``RULES``.
"""

import importlib
import pkgutil

from ..config import KINDS
from ..probing.rule import Rule


def _load() -> tuple[Rule, ...]:
    files = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    rules = [rule for file in files for rule in file.RULES]
    return tuple(sorted(rules, key=lambda rule: KINDS.index(rule.kinds[0])))


RULES = _load()
PER_BATCH = frozenset(kind for rule in RULES if rule.per_batch for kind in rule.kinds)
