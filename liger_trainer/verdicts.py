"""What a rule says of a module."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import nn

from .config import LigerConfig


class Replacement(NamedTuple):
    """One of our ops can stand in: ``method(config)`` becomes the instance's method ``attribute``.

    ``variant`` names the form of the op that agreed with the module's own. ``method`` gives the same function for the
    same config, so that all layers of a model share one.
    """

    kind: str
    variant: str
    attribute: str
    method: Callable[[LigerConfig], Callable]


class Refusal(NamedTuple):
    """A candidate that stays as it is, and why."""

    kind: str
    reason: str


Verdict = Replacement | Refusal


class Rule(NamedTuple):
    """A structural test, the probe for what passes it, and what the probe's verdict depends on.

    ``kind`` is reported where the probe fails to run. Modules with equal ``key`` share a verdict.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    probe: Callable[[nn.Module], Verdict]
    key: Callable[[nn.Module], Hashable]
