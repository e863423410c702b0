"""What a rule is, and what its probe gives: a match, or a skip with the reason."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import LigerConfig
from .probe import settings_key


class Skip(Exception):
    """Raised when a candidate is left as it is. The message is the reason, as the report shows it."""


@contextmanager
def errors_skip() -> Iterator[None]:
    """Turn any error into a ``Skip``: code that we did not write may fail on a probe's inputs in any way."""
    try:
        yield
    except Skip:
        raise
    except Exception as error:
        raise Skip(f"its forward failed on a probe: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Match:
    """A candidate for which one of our ops computes the same, and what to change so that the op is used.

    Args:
        kind: One of ``config.KINDS``.
        variant: The form of the op that agreed, as the report shows it.
        methods: Functions to bind to the module, by the attribute that each replaces.
        names: Globals to replace in the module's ``forward``. Those of several matches become one new forward.
        attributes: ``(module, attribute, function)``: functions to bind to other modules.
        before: Forward pre-hook ``(module, args, kwargs)``.
        after: Forward hook ``(module, args, output)``, also called after an error.
    """

    kind: str
    variant: str
    methods: Mapping[str, Callable] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    attributes: tuple[tuple[nn.Module, str, Callable], ...] = ()
    before: Callable | None = None
    after: Callable | None = None


def _no_part(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class Rule:
    """How candidates of a kind are found and probed.

    Args:
        kinds: The kinds that its matches can have. A skip is reported under the first.
        matches: Whether a module is a candidate, judged by its structure.
        probe: Gives the match of a candidate for a config, or raises ``Skip``.
        key: What the result of ``probe`` depends on. Modules with equal keys are probed once.
        whole_model: The rule looks at the causal LM as a whole, not at each of its modules.
        per_batch: The match takes effect only for some batches, so ``strict`` does not apply to it.
        part: Name of the submodule that the report shows for a candidate; empty for the candidate itself.
    """

    kinds: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    probe: Callable[[nn.Module, LigerConfig], Match]
    key: Callable[[nn.Module], Hashable] = settings_key
    whole_model: bool = False
    per_batch: bool = False
    part: Callable[[nn.Module], str] = _no_part
