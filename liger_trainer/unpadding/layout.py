"""Where the tokens of a padded batch go in one row, and how the boundaries between rows reach the attention.

The packed row holds the real tokens of each row of the batch in turn, and then a trailing part that attends to nothing.
The trailing part has the padding just before each left-padded row, because its hidden state predicts the row's first
token, and filler up to a multiple of a given number of tokens.

The boundaries travel as a 4-D attention mask, which transformers hands to every attention layer as it is. The mask is
int32, ``[1, 2, longest row, rows + 1]``, and expanded along the third dimension, so it takes no memory.
``mask[0, 0, 0]`` has the cumulative lengths of the queries and ``mask[0, 1, 0]`` those of the keys. The trailing part
counts as rows that have no keys.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.reference import IGNORE_INDEX


def is_per_token(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``tensor`` is ``[batch, tokens, ...]`` or ``[..., batch, tokens]`` of this ``(batch, tokens)``."""
    return tuple(shape) in (tuple(tensor.shape[:2]), tuple(tensor.shape[-2:]))


def take(tensor: Tensor, shape: tuple[int, int], places: Tensor, into: tuple[int, int]) -> Tensor:
    """Tokens of a tensor for which ``is_per_token`` holds.

    Args:
        tensor: ``[batch, tokens, ...]`` or ``[..., batch, tokens]``.
        shape: ``(batch, tokens)``.
        places: ``[n]``, int64: places in the flattened batch.
        into: What takes the place of ``shape``; its product is n.
    """
    if tuple(tensor.shape[:2]) == shape:
        return tensor.flatten(0, 1).index_select(0, places).unflatten(0, into)
    return tensor.flatten(-2).index_select(-1, places).unflatten(-1, into)


@dataclass(frozen=True)
class Layout:
    """One padded batch ``[batch, tokens]`` as a row.

    Args:
        shape: ``(batch, tokens)``.
        row: ``[total]``, int64: places in the flattened batch that the row takes its inputs from.
        bounds: The 4-D mask.
        real: Number of real tokens, which come first.
        kept: Number of places whose hidden states are returned; the others are filler.
    """

    shape: tuple[int, int]
    row: Tensor
    bounds: Tensor
    real: int
    kept: int

    @property
    def index(self) -> Tensor:
        """``[kept]``, int64: places in the flattened batch whose hidden states are returned."""
        return self.row[: self.kept]

    @property
    def slots(self) -> Tensor:
        """``[1, total]``, int64: the column of each token."""
        return (self.row % self.shape[1])[None]

    @property
    def counted(self) -> Tensor:
        """``[1, total]``, int64: the number of real tokens before each token in its row; 0 in the trailing part."""
        starts, ends = self.bounds[0, 1, 0, :-1].long(), self.bounds[0, 1, 0, 1:].long()
        tokens = torch.arange(self.total, device=self.row.device)
        of_row = torch.searchsorted(ends, tokens, right=True).clamp_(max=ends.shape[0] - 1)
        return torch.where(tokens < self.real, tokens - starts[of_row], 0)[None]

    @property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return self.bounds.shape[2]

    @property
    def total(self) -> int:
        """Number of tokens that the layers see."""
        return self.row.shape[0]

    def gather(self, tensor: Tensor) -> Tensor:
        """``[..., batch, tokens]``, ``[batch, tokens, ...]`` or ``[1, tokens]`` as one row."""
        if tuple(tensor.shape) == (1, self.shape[1]):
            tensor = tensor.expand(self.shape)
        return take(tensor, self.shape, self.row, (1, self.total))

    def takes(self, tensor: Tensor) -> bool:
        """Whether ``gather`` can be used for this tensor."""
        if tuple(tensor.shape) == (1, self.shape[1]):
            return True
        return is_per_token(tensor, self.shape)

    def scatter(self, tensor: Tensor) -> Tensor:
        """Put an output of the layers back into the shape of the batch; zero at positions that are not in ``index``.

        Args:
            tensor: ``[1, total, ...]``, or ``[total, ...]`` where the layers have flattened the batch.

        Returns:
            ``[batch, tokens, ...]``, or ``[batch * tokens, ...]``; tensors of another shape as they are.
        """
        batched = tensor.dim() > 1 and tuple(tensor.shape[:2]) == (1, self.total)
        if not batched and (tensor.dim() < 2 or tensor.shape[0] != self.total):
            return tensor
        tokens = tensor[0] if batched else tensor
        padded = tokens.new_zeros((self.shape[0] * self.shape[1], *tokens.shape[1:]))
        padded = padded.index_copy(0, self.index, tokens[: self.kept])
        return padded.unflatten(0, self.shape) if batched else padded


@dataclass(frozen=True)
class RowLengths:
    """What the host knows of a mask.

    Args:
        rows: Of each row with tokens: its number, first column and count.
        shape: ``(batch, tokens)``.
        predicts_first: Whether the first token of a left-padded row has a label.
    """

    rows: Sequence[tuple[int, int, int]]
    shape: tuple[int, int]
    predicts_first: bool = False

    @property
    def real(self) -> int:
        """Number of real tokens."""
        return sum(count for _, _, count in self.rows)

    @property
    def places(self) -> int:
        """Number of places in the batch, padding included."""
        return self.shape[0] * self.shape[1]

    def are_padded_right(self) -> bool:
        """Whether every row with tokens begins in the first column."""
        return all(first == 0 for _, first, _ in self.rows)


def read_mask(mask: Tensor, labels: Tensor | None) -> RowLengths | None:
    """Read a 2-D mask, for which the host waits once.

    Args:
        mask: ``[batch, tokens]``; not 0 at real tokens.
        labels: ``[batch, tokens]`` or ``None``.

    Returns:
        ``None`` if a row has a gap or padding has labels, whose loss would need the padding's hidden states.
    """
    held = mask != 0
    tokens = mask.shape[1]
    columns = torch.arange(tokens, device=mask.device)
    count = held.sum(1)
    first = torch.where(held, columns, tokens).amin(1)
    last = torch.where(held, columns, -1).amax(1)
    flags = count.new_zeros(2)
    if labels is not None:
        labelled = labels.to(mask.device) != IGNORE_INDEX
        of_first = labelled & (columns == first[:, None]) & (columns > 0)
        flags = torch.stack([(labelled & ~held).any(), of_first.any()]).to(count.dtype)
    *numbers, at_padding, predicts_first = torch.cat([count, first, last, flags]).tolist()
    batch = mask.shape[0]
    counts, firsts, lasts = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch :]
    if at_padding or any(n and end - start + 1 != n for n, start, end in zip(counts, firsts, lasts, strict=True)):
        return None
    rows = [(b, first, n) for b, (n, first) in enumerate(zip(counts, firsts, strict=True)) if n]
    return RowLengths(rows, (batch, tokens), bool(predicts_first))


def layout_of(lengths: RowLengths, device: torch.device, multiple: int = 1, lookahead: int = 1) -> Layout:
    """Lay the rows of a batch out one after another.

    Args:
        lengths: The rows. At least one of them has padding.
        device: Where the result's tensors are.
        multiple: The number of tokens is rounded up to a multiple of this.
        lookahead: How many tokens ahead a hidden state predicts. So many places before a left-padded row are kept.
    """
    batch, tokens = lengths.shape
    places = [torch.arange(b * tokens + first, b * tokens + first + n) for b, first, n in lengths.rows]
    ahead = [
        torch.arange(b * tokens + max(0, first - lookahead), b * tokens + first)
        for b, first, _ in lengths.rows
        if first
    ]
    counts = [n for _, _, n in lengths.rows]
    kept = sum(len(part) for part in (*places, *ahead))
    total = -(-kept // multiple) * multiple
    row = torch.cat([*places, *ahead, torch.full((total - kept,), _padding(lengths))])
    longest, real = max(counts), lengths.real
    ends = list(itertools.accumulate(counts, initial=0))
    trailing = [*range(real + longest, total, longest), *([total] if total > real else [])]
    bounds = torch.tensor([[*ends, *trailing], [*ends, *(real for _ in trailing)]], dtype=torch.int32).to(device)
    bounds = bounds[None, :, None].expand(1, 2, longest, -1)
    _ROWS[bounds] = Rows(bounds, total, real)
    return Layout((batch, tokens), row.to(device), bounds, real, kept)


def _padding(lengths: RowLengths) -> int:
    """A place in the flattened batch that is padding."""
    batch, tokens = lengths.shape
    held = {b: (first, n) for b, first, n in lengths.rows}
    for b in range(batch):
        first, n = held.get(b, (tokens, 0))
        if n < tokens:
            return b * tokens + (first - 1 if first else n)
    raise AssertionError("a full batch has no layout")


class Rows:
    """The boundaries that a 4-D mask carries, as attention needs them.

    Args:
        bounds: The mask of a ``Layout``.
        total: Number of tokens in the row.
        real: Number of real tokens. The host waits for the mask where it is not given.
    """

    def __init__(self, bounds: Tensor, total: int, real: int | None = None):
        self.longest: int = bounds.shape[2]
        self.total = total
        self.real: int = int(bounds[0, 1, 0, -1]) if real is None else real
        self.count: int = bounds.shape[3] - 1
        # [rows + 1]. Views would keep the mask, which is the key of this in ``_ROWS``, so nothing would be freed.
        self.queries, self.keys = bounds[0, 0, 0].clone(), bounds[0, 1, 0].clone()

    @functools.cached_property
    def _starts(self) -> Tensor:
        return self.queries[:-1].long()

    @functools.cached_property
    def _ends(self) -> Tensor:
        return self.queries[1:].long()

    @functools.cached_property
    def held(self) -> Tensor:
        """``[rows, longest]``, bool: where the padded rows have tokens."""
        return torch.arange(self.longest, device=self.keys.device) < (self._ends - self._starts)[:, None]

    @functools.cached_property
    def _padded(self) -> Tensor:
        """``[rows * longest]``: the token at each place of the padded rows."""
        columns = torch.arange(self.longest, device=self.keys.device)
        return (self._starts[:, None] + columns).clamp_(max=self.total - 1).flatten()

    @functools.cached_property
    def _place(self) -> tuple[Tensor, Tensor]:
        """``[total]``: the place of each token in the padded rows, and whether it is in the trailing part."""
        tokens = torch.arange(self.total, device=self.keys.device)
        of_row = torch.searchsorted(self._ends, tokens, right=True)
        return of_row * self.longest + tokens - self._starts[of_row], tokens >= self.keys[-1]

    def pad(self, tokens: Tensor) -> Tensor:
        """``[1, total, ...]`` as ``[rows, longest, ...]``, padded on the right with other tokens."""
        return tokens[0].index_select(0, self._padded).unflatten(0, (self.count, self.longest))

    def unpad(self, tokens: Tensor) -> Tensor:
        """``[rows, longest, ...]`` as ``[1, total, ...]``, zero in the trailing part."""
        place, trailing = self._place
        row = tokens.flatten(0, 1).index_select(0, place)
        return row.masked_fill(trailing.view(-1, *[1] * (row.dim() - 1)), 0)[None]


_ROWS = WeakTensorKeyDictionary()


def is_bounds(mask: object) -> bool:
    """Whether an attention mask is the one of a ``Layout``. No other implementation takes int32 in four dimensions."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int32


def rows_of(bounds: Tensor, total: int) -> Rows:
    """The ``Rows`` of a mask; the layers of a model share them. A copy of a layout's mask gets its own."""
    rows = _ROWS.get(bounds)
    if rows is None:
        rows = _ROWS[bounds] = Rows(bounds, total)
    return rows
