"""Does a stack give the same un-padded? A few short rows run both ways, and rows must not see each other."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..probing.probe import difference
from ..probing.rule import Skip, errors_skip, unnoted
from .attention import windows_told
from .layout import Layout, RowLengths, is_per_token, layout_of, take
from .mixers import Mixers
from .run import Positions, run_unpadded

# Rows of the check: first column and number of tokens, of COLUMNS. Two are padded on the right and one on the left.
COLUMNS = 12
ROWS = ((0, 9), (0, 5), (5, 7), (0, 12))
LEFT = 2  # the row that is padded on the left
CHANGED = 1  # the row whose tokens change while the others must stay
# Largest error of the un-padded hidden states relative to the largest value, by the size in bytes of the dtype that is
# computed with.
TOLERANCE = {8: 1e-6, 4: 1e-4, 2: 5e-2}
# How far other rows may move if one row's tokens change: kernels that group tokens by expert may round differently.
LEAK = {8: 1e-12, 4: 1e-6, 2: 1e-2}
# Settings of windows other than sliding ones.
_WINDOWS = ("attention_chunk_size", "window_size", "local_attention", "attention_window")


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Args:
        reason: Why the stack has to see padded batches; ``None``: it need not.
        positions: The positions that agreed.
        left: Whether left-padded rows agree. Some models let padding before a row into their state.
        ahead: Whether the hidden states before a left-padded row agree, which predict its first token.
        longest: Longest row for which the check holds: windows of which attention was not told begin there.
    """

    reason: str | None = None
    positions: Positions = Positions.COLUMN
    left: bool = True
    ahead: bool = True
    longest: float = math.inf


UNCHECKED = Verdict()


def check(original: Callable, stack: nn.Module, given: dict[str, Any], mixers: Mixers) -> Verdict:
    """Run a few rows of a batch both ways.

    Args:
        original: The class's forward of ``stack``.
        stack: The decoder stack.
        given: The arguments of a batch, by name. The rows are made of its tokens.
        mixers: Gets the kind of mask that agrees.
    """
    lengths = RowLengths([(i, first, n) for i, (first, n) in enumerate(ROWS)], (len(ROWS), COLUMNS))
    try:
        with errors_skip(), torch.no_grad(), unnoted(), _undisturbed(stack):
            rows = _short_rows(given)
            layout = layout_of(lengths, rows["attention_mask"].device)
            output = original(stack, **rows)
            padded = _states(output)
            form = _agreeing_form(original, stack, rows, layout, padded, mixers)
            if _shapes(form.output) != _shapes(output):
                raise Skip("it returns more than a state of each token, such as one of each row")
            changed = _states(run_unpadded(original, stack, _with_another_row(rows), layout, form.positions))
            others = [i for i in range(len(ROWS)) if i != CHANGED]
            if difference(changed[others], form.states[others]) > LEAK[_precision(padded)]:
                raise Skip("its rows see each other if they are joined: not only attention mixes its tokens")
    except Skip as skip:
        return Verdict(str(skip))
    ahead = _agree(form.states, padded, layout.index[layout.real :])
    return Verdict(positions=form.positions, left=form.left, ahead=ahead, longest=_longest(stack, form.windows))


@dataclass(frozen=True)
class _Form:
    """A way to run that agrees: its positions, output, and the windows that attention was told."""

    positions: Positions
    output: Any
    windows: list[int | None]
    left: bool

    @property
    def states(self) -> Tensor:
        return _states(self.output)


def _agreeing_form(
    original: Callable, stack: nn.Module, rows: dict[str, Any], layout: Layout, padded: Tensor, mixers: Mixers
) -> _Form:
    """The first form whose hidden states are the ``padded`` ones, in left-padded rows too if there is one.

    Raises:
        Skip: There is none.
    """
    reason = Skip("its hidden states are other ones if its rows are joined")
    real = layout.index[: layout.real]
    in_left_row = real // COLUMNS == LEFT
    right_only = None
    for repad, causal, positions in itertools.product((False, True), (False, True), Positions):
        mixers.repad_attention, mixers.causal_mask = repad, causal
        try:
            with errors_skip(), windows_told() as windows:
                output = run_unpadded(original, stack, rows, layout, positions)
        except Skip as skip:
            reason = skip
            continue
        states = _states(output)
        if not _agree(states, padded, real[~in_left_row]):
            continue
        form = _Form(positions, output, windows, left=_agree(states, padded, real[in_left_row]))
        if form.left:
            return form
        right_only = right_only or (form, repad, causal)
    if right_only is None:
        raise reason
    form, mixers.repad_attention, mixers.causal_mask = right_only
    return form


def _agree(states: Tensor, padded: Tensor, places: Tensor) -> bool:
    flat = [tensor.flatten(0, 1).index_select(0, places) for tensor in (states, padded)]
    return difference(*flat) <= TOLERANCE[_precision(padded)]


def _precision(states: Tensor) -> int:
    """Size in bytes of the dtype that these hidden states were computed with. Under autocast they may be wider.

    Products of TF32 round as coarsely as those of half precision.
    """
    device, size = states.device.type, states.element_size()
    if torch.is_autocast_enabled(device):
        size = min(size, torch.get_autocast_dtype(device).itemsize)
    if device == "cuda" and size == 4 and torch.backends.cuda.matmul.allow_tf32:
        return 2
    return size


def _shapes(output: Any) -> list[torch.Size]:
    """Shapes of all tensors that a stack returns."""
    return [value.shape for value in tree_leaves(output) if torch.is_tensor(value)]


def _states(output: Any) -> Tensor:
    """The hidden states among what a stack returns."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _short_rows(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the rows of the check, made of the batch's real tokens."""
    mask = given["attention_mask"]
    batch, tokens = mask.shape
    real = (mask != 0).flatten().nonzero().squeeze(1)
    if not real.numel():  # a batch of padding; what the tokens are matters little
        real = torch.arange(batch * tokens, device=mask.device)
    count = len(ROWS) * COLUMNS
    places = real[torch.arange(count, device=mask.device) * 7 % real.numel()]
    columns = torch.arange(COLUMNS, device=mask.device)
    held = torch.stack([(columns >= first) & (columns < first + n) for first, n in ROWS])
    taken = {"attention_mask": held.to(mask.dtype), "use_cache": False}
    for name, value in given.items():
        if name == "position_ids" or _places_images(name, value):
            taken[name] = None
        elif name == "attention_mask" or not torch.is_tensor(value) or not value.dim():
            taken.setdefault(name, value)
        elif is_per_token(value, mask.shape):
            taken[name] = take(value, (batch, tokens), places, (len(ROWS), COLUMNS))
        else:
            raise Skip(f"its argument {name} has no place for each token")
    return taken


def _places_images(name: str, value: Any) -> bool:
    """Whether an argument has the features of images for some layers, or says at which tokens they go."""
    if isinstance(value, list | tuple):
        return any(map(torch.is_tensor, value))
    return torch.is_tensor(value) and value.dtype == torch.bool and name != "attention_mask"


def _with_another_row(rows: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with other tokens in one row."""

    def changed(value: Any) -> Any:
        if not torch.is_tensor(value) or tuple(value.shape[:2]) != (len(ROWS), COLUMNS):
            return value
        value = value.clone()
        value[CHANGED] = value[-1].flip(0)
        return value

    return {name: value if name == "attention_mask" else changed(value) for name, value in rows.items()}


@contextmanager
def _undisturbed(stack: nn.Module) -> Iterator[None]:
    """Without dropout, and with the random numbers and training modes as they were afterwards."""
    modes = [(module, module.training) for module in stack.modules()]
    devices = {p.device for p in stack.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices]):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def _longest(stack: Any, told: list[int | None]) -> float:
    """The longest row for which attention looks back no further than it should.

    Attention within rows uses the window that each layer passes to it. The masks of padded batches use the config's.
    Where the two differ, or the config has windows of another kind, rows must fit into the smallest window.
    """
    config = stack.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(told)
    expected = [window if kind == "sliding_attention" else None for kind in types if kind.endswith("_attention")]
    other = [value for name in _WINDOWS if isinstance(value := getattr(config, name, None), int)]
    if not other and (not window or _sorted(expected) == _sorted(told)):
        return math.inf
    return min([*other, *([window] if window else [])])


def _sorted(windows: list[int | None]) -> list[int]:
    return sorted(window or 0 for window in windows)
