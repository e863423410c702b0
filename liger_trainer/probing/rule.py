"""What a rule says of a module."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import nn

from ..config import LigerConfig


class Replacement(NamedTuple):
    """One of our ops can stand in: ``method(config)`` becomes the instance's method ``attribute``.

    ``variant`` names the form of the op that agreed with the module's own. ``method`` gives the same function for the
    same config, so that all layers of a model share one.
    """

    kind: str
    variant: str
    attribute: str
    method: Callable[[LigerConfig], Callable]


class Rebinding(NamedTuple):
    """The module's ``forward`` can be bound again with ours in place of globals that it looks up, by their ``names``.

    Those of several rules for one module become one forward.
    """

    kind: str
    variant: str
    names: dict[str, Any]

    @property
    def attribute(self) -> str:
        """What is set on the instance."""
        return "forward"


class Refusal(NamedTuple):
    """A candidate that stays as it is, and why."""

    kind: str
    reason: str


Verdict = Replacement | Rebinding | Refusal


class Rule(NamedTuple):
    """A structural test, the probe for what passes it, and what the probe's verdict depends on.

    ``kind`` is reported where the probe fails to run. Modules with equal ``key`` share a verdict.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    probe: Callable[[nn.Module], Verdict]
    key: Callable[[nn.Module], Hashable]
