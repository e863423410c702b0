"""Rule for rotary embeddings: an attention forward that calls a module-level function of ``cos`` and ``sin``.

The probe runs that function. The match rebinds the module's forward on the instance, with our adapter in place of the
function.
"""

import enum
import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import LigerConfig
from ..kernels import reference
from ..kernels.rope import rope
from ..probing.probe import TOLERANCE, difference, generator
from ..probing.rebinding import cached_weakly, forward_function, rebind
from ..probing.rule import Acted, Match, Rule, Skip

BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 5, 4, 2, 16


class Tables(enum.Enum):
    """What ``cos`` and ``sin`` contain."""

    ELEMENTS = enum.auto()  # an entry for each element of the rotary part
    PAIRS = enum.auto()  # an entry for each pair of elements
    PAIRS_TWICE = enum.auto()  # an entry for each pair in the first half; the second half is not used


class Form(NamedTuple):
    """What a rotary function does.

    Args:
        interleaved: It rotates pairs of neighbours, not pairs from the two halves of a head.
        deinterleave: It writes neighbours as elements of two halves.
        tables: What ``cos`` and ``sin`` contain.
        backwards: It rotates by the negative angle.
        compute_in_fp32: It computes in fp32 and rounds once.
        partial: The tables may be narrower than a head.
        promotes: bf16 states with fp32 tables give fp32.
        unsqueeze_dim: Default of its argument of that name.
    """

    interleaved: bool
    deinterleave: bool
    tables: Tables
    backwards: bool
    compute_in_fp32: bool
    partial: bool
    promotes: bool
    unsqueeze_dim: int

    def __str__(self) -> str:
        return f"rope, {'de' * self.deinterleave}interleaved" if self.interleaved else "rope"

    def __call__(self, op: Callable, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> Any:
        """Compute this form with ``op``, which is ``rope`` or its reference."""
        rotary_dim = self.rotary_dim(cos)
        if self.tables is Tables.PAIRS_TWICE:
            cos, sin = cos[..., : rotary_dim // 2], sin[..., : rotary_dim // 2]
        if self.backwards:
            sin = -sin
        options = {"interleaved": self.interleaved, "deinterleave": self.deinterleave, "rotary_dim": rotary_dim,
                   "unsqueeze_dim": unsqueeze_dim}  # fmt: skip
        if self.promotes and cos.dtype != q.dtype:
            wide = torch.promote_types(cos.dtype, q.dtype)
            q, k = q.to(wide), None if k is None else k.to(wide)
        return op(q, k, cos, sin, compute_in_fp32=self.compute_in_fp32, **options)

    def rotary_dim(self, cos: Tensor) -> int:
        """How many elements of a head these tables rotate."""
        return cos.shape[-1] * (2 if self.tables is Tables.PAIRS else 1)


@cached_weakly
def _rotary_names(forward: types.FunctionType) -> tuple[str, ...]:
    """Names in ``forward`` that are module-level functions with parameters ``cos`` and ``sin``."""
    names = []
    for name in forward.__code__.co_names:
        value = forward.__globals__.get(name)
        if isinstance(value, types.FunctionType) and {"cos", "sin"} <= set(inspect.signature(value).parameters):
            names.append(name)
    return tuple(names)


def matches(module: nn.Module) -> bool:
    """Whether the module's forward calls a function of ``cos`` and ``sin``."""
    function = forward_function(module)
    return function is not None and bool(_rotary_names(function))


def probe(module: nn.Module, config: LigerConfig) -> Match:
    """The adapters for the module's rotary functions, each of which must agree with a form of ``rope``."""
    function = forward_function(module)
    assert function is not None  # ``matches`` has seen it
    adapters, forms, acted = {}, [], Acted()
    for name in _rotary_names(function):
        original = function.__globals__[name]
        try:
            form = _probe_function(original)
        except Skip as skip:
            raise Skip(f"{name}: {skip}") from skip
        adapters[name] = _adapter(original, form, acted)
        forms.append(str(form))
    rebind(type(module).forward, {})  # raises Skip if it cannot be rebuilt
    return Match("rope", ", ".join(dict.fromkeys(forms)), names=adapters, acted=acted)


def _layout(original: Callable) -> tuple[list[str], int]:
    """The parameter names, and how many states come before the tables (1: x; 2: q, k).

    Raises:
        Skip: The signature is not a known one.
    """
    parameters = inspect.signature(original).parameters
    names = list(parameters)
    states = names[: min(names.index("cos"), names.index("sin"))]
    optional = [n for n in names if n not in (*states, "cos", "sin")]
    if len(states) not in (1, 2) or not set(optional) <= {"position_ids", "unsqueeze_dim"}:
        raise Skip(f"its parameters ({', '.join(names)}) are not (q, k, cos, sin) or (x, cos, sin)")
    if any(parameters[n].default is inspect.Parameter.empty for n in optional):
        raise Skip(f"it requires {optional[0]}")
    return names, len(states)


@cached_weakly
def _probe_function(original: Callable) -> Form:
    names, num_states = _layout(original)
    tries = []  # (q, k, cos, sin, unsqueeze_dim, theirs)
    for unsqueeze_dim in (1, 2):
        for width in (HEAD_DIM, HEAD_DIM // 2, HEAD_DIM // 4):  # narrow tables show which part of a head is rotated
            for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
                inputs = _inputs(unsqueeze_dim, width, *dtypes)
                out = _run(original, names, num_states, *inputs, unsqueeze_dim)
                if out is not None:
                    tries.append((*inputs, unsqueeze_dim, out))
    if not tries:
        raise Skip("it accepted no tables of head_dim, half or a quarter of it")
    first_dim, width = tries[0][4], tries[0][2].shape[-1]
    default = inspect.signature(original).parameters.get("unsqueeze_dim")
    if default is None and {unsqueeze_dim for *_, unsqueeze_dim, _ in tries} == {1, 2}:
        raise Skip("it takes both layouts without an argument that says which")
    if "position_ids" in names and not _ignores_positions(original, names, num_states, tries[0]):
        raise Skip("its position_ids change the result")
    mixed = _inputs(first_dim, width, torch.bfloat16, torch.float32)
    mixed_out = _run(original, names, num_states, *mixed, first_dim)
    promotes = mixed_out is not None and mixed_out[0].dtype == torch.float32
    if mixed_out is not None:
        tries.append((*mixed, first_dim, mixed_out))
    best = None
    widths = {cos.shape[-1] for _, _, cos, *_ in tries}
    tables = [t for t in Tables if t is not Tables.PAIRS or 2 * max(widths) <= HEAD_DIM]
    layouts = ((False, False), (True, False), (True, True))
    choices = itertools.product(layouts, tables, (False, True), (False, True))
    for (interleaved, deinterleave), table, backwards, in_fp32 in choices:
        if deinterleave and table is Tables.ELEMENTS:
            continue  # rope has no such form
        partial = min(widths) * (2 if table is Tables.PAIRS else 1) < HEAD_DIM
        default_dim = default.default if default else first_dim
        form = Form(interleaved, deinterleave, table, backwards, in_fp32, partial, promotes, default_dim)
        error = 0.0
        for q, k, cos, sin, unsqueeze_dim, theirs in tries:
            ours = form(reference.rope, q, k if num_states == 2 else None, cos, sin, unsqueeze_dim)
            pairs = zip(ours if num_states == 2 else (ours,), theirs, strict=True)
            error = max(error, *(difference(a, b) / TOLERANCE[q.dtype] for a, b in pairs))
        if error <= 1 and (best is None or error < best[0]):
            best = error, form
    if best is None:
        raise Skip("it is not a rotation of halves or of neighbouring pairs by cos and sin")
    return best[1]


def _inputs(
    unsqueeze_dim: int, width: int, dtype: torch.dtype, table_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random states in the layout of ``unsqueeze_dim``, and random tables, whose halves are not equal."""
    random = generator()
    shape = (BATCH, TOKENS) if unsqueeze_dim == 2 else (BATCH,)
    tail = (HEAD_DIM,) if unsqueeze_dim == 2 else (TOKENS, HEAD_DIM)
    q = torch.randn(*shape, HEADS, *tail, generator=random).to(dtype)
    k = torch.randn(*shape, KV_HEADS, *tail, generator=random).to(dtype)
    cos = torch.randn(BATCH, TOKENS, width, generator=random).to(table_dtype)
    sin = torch.randn(BATCH, TOKENS, width, generator=random).to(table_dtype)
    return q, k, cos, sin


def _ignores_positions(original: Callable, names: list[str], num_states: int, known: tuple) -> bool:
    """Whether ``position_ids`` in reverse order do not change the outputs of a try."""
    *inputs, theirs = known
    q, k, cos, sin, unsqueeze_dim = inputs
    backwards = torch.arange(TOKENS).flip(0).expand(BATCH, TOKENS)
    out = _run(original, names, num_states, q, k, cos, sin, unsqueeze_dim, position_ids=backwards)
    return out is not None and all(torch.equal(a, b) for a, b in zip(out, theirs, strict=True))


def _run(
    original: Callable,
    names: list[str],
    num_states: int,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int,
    **kwargs: Any,
) -> tuple[Tensor, ...] | None:
    """The function's outputs as a tuple, or ``None`` if it does not accept these shapes."""
    kwargs |= dict(zip(names, (q, k)[:num_states], strict=False)) | {"cos": cos, "sin": sin}
    if "unsqueeze_dim" in names:
        kwargs["unsqueeze_dim"] = unsqueeze_dim
    try:
        out = original(**kwargs)
    except Exception:  # not only torch's shape errors: some functions assert, or raise errors of their own
        return None
    out = (out,) if torch.is_tensor(out) else tuple(out)
    return out if len(out) == num_states and out[0].shape == q.shape else None


def _adapter(original: Callable, form: Form, acted: Acted) -> Callable:
    """A function with ``original``'s parameters that computes with ``rope``.

    It calls ``original`` for inputs that the probe did not cover or that ``rope`` does not take.
    """
    names, num_states = _layout(original)

    @functools.wraps(original)
    def rotary(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k = given[names[0]], given.get(names[1]) if num_states == 2 else None
        unsqueeze_dim = given.get("unsqueeze_dim", form.unsqueeze_dim)
        if (num_states == 2 and k is None) or not _fits(form, q, k, given["cos"], given["sin"], unsqueeze_dim):
            return original(*args, **kwargs)
        acted.note()
        return form(rope, q, k, given["cos"], given["sin"], unsqueeze_dim)

    return rotary


def _fits(form: Form, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
    """Whether q and k are 4-D and of one batch and sequence, and the tables cover all of it and need no gradient.

    The original may broadcast tables that are too narrow for ``form``, or raise an error.
    """
    if q.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or unsqueeze_dim not in (1, 2):
        return False
    batch, tokens, head_dim = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    if k is not None and (
        k.ndim != 4 or (k.shape[0], k.shape[3 - unsqueeze_dim], k.shape[3]) != (batch, tokens, head_dim)
    ):
        return False
    rotary_dim = form.rotary_dim(cos)
    if rotary_dim > head_dim or (rotary_dim < head_dim and not form.partial):
        return False
    return cos.shape[0] in (1, batch) and cos.shape[1] == tokens and not (cos.requires_grad or sin.requires_grad)


RULES = (Rule(("rope",), matches, probe, key=lambda module: type(module).forward),)
