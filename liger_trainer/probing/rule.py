"""What a rule is, and what its probe gives: a match, or a skip with the reason."""

import threading
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..config import LigerConfig
from .probe import settings_key

# Files in which a model's own code is not: ours, torch's, and those beside transformers' models.
_PACKAGES = tuple(str(Path(file).parents[depth]) for file, depth in ((__file__, 1), (torch.__file__, 0)))
_BASES = Path(transformers.__file__).parent


class Skip(Exception):
    """Raised when a candidate is left as it is. The message is the reason, as the report shows it."""


@contextmanager
def errors_skip() -> Iterator[None]:
    """Turn any error into a ``Skip``: code that we did not write may fail on a probe's inputs in any way.

    The reason names the model's line, because the error itself may be about the stub that the line was given.
    """
    try:
        yield
    except Skip:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_of_model(f.filename)]
        if not frames:
            raise Skip(f"its forward cannot be run on random numbers: {type(error).__name__}") from error
        where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        line = f": `{frames[-1].line}`" if frames[-1].line else ""
        raise Skip(f"its forward does more than the known forms, in {where}{line}") from error


def _is_of_model(file: str) -> bool:
    return not file.startswith(_PACKAGES) and Path(file).parent not in (_BASES, _BASES / "utils")


def _ignore(reason: str) -> None:
    """What happens to a refusal or a restatement before a report has the match."""


class _Unnoted(threading.local):
    on = False


_UNNOTED = _Unnoted()


@contextmanager
def unnoted() -> Iterator[None]:
    """Note nothing in this thread: what runs is a check, not a step."""
    _UNNOTED.on = True
    try:
        yield
    finally:
        _UNNOTED.on = False


class Acted:
    """Whether a match has done its work: since the last reset (``on``), or in compiled code (``compiled``).

    Compiled code cannot note anything while it runs, for instance under activation checkpointing.
    """

    def __init__(self) -> None:
        self.on = self.compiled = False
        self.on_refusal: Callable[[str], None] = _ignore
        self.on_restatement: Callable[[str], None] = _ignore

    def refuse(self, reason: str) -> None:
        """Say that it will not do its work after all, which showed only at run time."""
        self.on_refusal(reason)

    def restate(self, variant: str) -> None:
        """Say what it does more exactly than could be told before the model ran."""
        self.on_restatement(variant)

    def note(self) -> None:
        """Note that it does its work now."""
        if torch.compiler.is_compiling():
            self._note_compiled()
        elif not _UNNOTED.on:
            self.on = True

    @torch.compiler.assume_constant_result  # so that it runs once, during tracing
    def _note_compiled(self) -> None:
        self.compiled = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Acted":
        """Itself: the functions that set it are not copied with a model either."""
        return self


@dataclass(frozen=True)
class Match:
    """A candidate for which one of our ops computes the same, and what to change so that the op is used.

    Args:
        kind: One of ``config.KINDS``.
        variant: The form of the op that agreed, as the report shows it.
        methods: Functions to bind to the module, by the attribute that each replaces.
        names: Globals to replace in the module's ``forward``. Those of several matches become one new forward.
        other_names: ``(module, names)``: the same for other modules.
        wraps: ``(module, wrapper)``: ``wrapper`` turns the forward that other matches leave into another one.
        attributes: ``(module, attribute, function)``: functions to bind to other modules.
        before: Forward pre-hook ``(module, args, kwargs)``.
        after: Forward hook ``(module, args, output)``, also called after an error.
        acted: Set by the functions above whenever they do something.
    """

    kind: str
    variant: str
    methods: Mapping[str, Callable] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    other_names: tuple[tuple[nn.Module, Mapping[str, Any]], ...] = ()
    wraps: tuple[tuple[nn.Module, Callable[[Callable], Callable]], ...] = ()
    attributes: tuple[tuple[nn.Module, str, Callable], ...] = ()
    before: Callable | None = None
    after: Callable | None = None
    acted: Acted = field(default_factory=Acted)


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
