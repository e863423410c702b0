"""The layer rules: each looks at a module's shape, probes its numbers and gives a verdict.

A rule goes by structure (a module's parameters, its children, the names its forward uses), never by a model's name.
The probe runs the module's own forward on random numbers against each variant of our op; the variant that agrees is
the one applied, and where none agrees the candidate is skipped with that as the reason. Verdicts are shared by modules
that are alike in all they depend on, so a model costs one probe for each class and shape.
"""

from collections.abc import Iterator

from torch import nn

from ..probing.probe import settings_key
from ..probing.rule import Refusal, Rule, Verdict
from . import attention, norms
from . import glu as gated
from . import rope as rotary

LAYER_RULES = (
    Rule("rms_norm", norms.matches, norms.probe, settings_key),
    Rule("glu", gated.matches_mlp, gated.probe_mlp, settings_key),
    Rule("glu", gated.matches_experts, gated.probe_experts, settings_key),
    Rule("rope", rotary.matches, rotary.probe, lambda module: type(module).forward),
    Rule("attention", attention.matches, attention.probe, lambda module: type(module).forward),
)


def verdicts(module: nn.Module, known: dict[tuple, Verdict]) -> Iterator[Verdict]:
    """Each layer rule's verdict on ``module``; most modules are no rule's candidate and give none.

    ``known`` holds the verdicts of one walk over a model: code may be patched by others between two walks.
    """
    for rule in LAYER_RULES:
        if not rule.matches(module):
            continue
        key = (rule, rule.key(module))
        if key not in known:
            known[key] = _probe(rule, module)
        yield known[key]


def _probe(rule: Rule, module: nn.Module) -> Verdict:
    try:
        return rule.probe(module)
    except Exception as error:  # a stranger's forward may fail on a probe's inputs in any way: that is the reason
        return Refusal(rule.kind, f"its forward failed on a probe: {type(error).__name__}: {error}")
