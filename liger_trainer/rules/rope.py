"""Rule for rotary embeddings: an attention forward that calls a module-level function of ``cos`` and ``sin``.

The function is probed; then the module's forward is rebound on the instance with our adapter under that one name.
"""

import enum
import functools
import inspect
import itertools
import types
from typing import NamedTuple

import torch
from torch import nn

from ..kernels import reference
from ..kernels.rope import rope
from ..probing.probe import TOLERANCE, difference, generator
from ..probing.rebinding import forward_function, rebinding
from ..probing.rule import Refusal, Verdict

BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 5, 4, 2, 16


class Tables(enum.Enum):
    """What is in ``cos`` and ``sin``."""

    ELEMENTS = enum.auto()  # an entry for each element of the rotary part
    PAIRS = enum.auto()  # an entry for each pair of elements
    PAIRS_TWICE = enum.auto()  # an entry for each pair in the first half, and a second half that is not used


class Form(NamedTuple):
    """What a rotary function does.

    ``deinterleave``: it writes neighbours as elements of two halves. ``backwards``: it turns by the negative angle.
    ``partial``: tables may be narrower than a head. ``promotes``: bf16 states with fp32 tables give fp32.
    ``unsqueeze_dim``: its default.
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

    def __call__(self, op, q, k, cos, sin, unsqueeze_dim):
        """Compute with ``op``, ``rope`` or its reference, in this form."""
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

    def rotary_dim(self, cos) -> int:
        """How much of a head such tables turn."""
        return cos.shape[-1] * (2 if self.tables is Tables.PAIRS else 1)


@functools.cache
def _rotary_names(forward) -> tuple[str, ...]:
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


def probe(module: nn.Module) -> Verdict:
    """The adapters for the module's rotary functions, all of which must agree with a form of ``rope``."""
    function = forward_function(module)
    adapters, forms = {}, []
    for name in _rotary_names(function):
        form_or_reason = _probe_function(function.__globals__[name])
        if isinstance(form_or_reason, str):
            return Refusal("rope", f"{name}: {form_or_reason}")
        adapters[name] = _adapter(function.__globals__[name], form_or_reason)
        forms.append(str(form_or_reason))
    return rebinding("rope", ", ".join(dict.fromkeys(forms)), module, adapters)


def _layout(original) -> tuple[list[str], int] | str:
    """The parameter names and how many lead the tables (1: x; 2: q, k), or why the signature is not known."""
    parameters = inspect.signature(original).parameters
    names = list(parameters)
    states = names[: min(names.index("cos"), names.index("sin"))]
    optional = [n for n in names if n not in (*states, "cos", "sin")]
    if len(states) not in (1, 2) or not set(optional) <= {"position_ids", "unsqueeze_dim"}:
        return f"its parameters ({', '.join(names)}) are not (q, k, cos, sin) or (x, cos, sin)"
    if any(parameters[n].default is inspect.Parameter.empty for n in optional):
        return f"it requires {optional[0]}"
    return names, len(states)


@functools.cache
def _probe_function(original) -> Form | str:
    layout = _layout(original)
    if isinstance(layout, str):
        return layout
    names, num_states = layout
    tries = []  # (q, k, cos, sin, unsqueeze_dim, theirs)
    for unsqueeze_dim in (1, 2):
        for width in (HEAD_DIM, HEAD_DIM // 2, HEAD_DIM // 4):  # narrow tables show which part of a head is turned
            for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
                inputs = _inputs(unsqueeze_dim, width, *dtypes)
                out = _run(original, names, num_states, *inputs, unsqueeze_dim)
                if out is not None:
                    tries.append((*inputs, unsqueeze_dim, out))
    if not tries:
        return "it accepted no tables of head_dim, half or a quarter of it"
    first_dim, width = tries[0][4], tries[0][2].shape[-1]
    default = inspect.signature(original).parameters.get("unsqueeze_dim")
    if default is None and {unsqueeze_dim for *_, unsqueeze_dim, _ in tries} == {1, 2}:
        return "it takes both layouts without an argument that says which"
    if "position_ids" in names and not _ignores_positions(original, names, num_states, tries[0]):
        return "its position_ids change the result"
    mixed = _inputs(first_dim, width, torch.bfloat16, torch.float32)
    mixed_out = _run(original, names, num_states, *mixed, first_dim)
    promotes = mixed_out is not None and mixed_out[0].dtype == torch.float32
    if mixed_out is not None:
        tries.append((*mixed, first_dim, mixed_out))
    best = None
    widths = {cos.shape[-1] for _, _, cos, *_ in tries}
    tables = [t for t in Tables if t is not Tables.PAIRS or 2 * max(widths) <= HEAD_DIM]
    layouts = ((False, False), (True, False), (True, True))
    for layout, *flags in itertools.product(layouts, tables, (False, True), (False, True)):
        if layout == (True, True) and flags[0] is Tables.ELEMENTS:
            continue  # rope has no such form
        turned = [2 * w if flags[0] is Tables.PAIRS else w for w in widths]
        form = Form(*layout, *flags, min(turned) < HEAD_DIM, promotes, default.default if default else first_dim)
        error = 0.0
        for q, k, cos, sin, unsqueeze_dim, theirs in tries:
            ours = form(reference.rope, q, k if num_states == 2 else None, cos, sin, unsqueeze_dim)
            pairs = zip(ours if num_states == 2 else (ours,), theirs, strict=True)
            error = max(error, *(difference(a, b) / TOLERANCE[q.dtype] for a, b in pairs))
        if error <= 1 and (best is None or error < best[0]):
            best = error, form
    return best[1] if best else "it is no rotation of halves or of neighbouring pairs by cos and sin"


def _inputs(unsqueeze_dim, width, dtype, table_dtype):
    """Random states in the layout of ``unsqueeze_dim`` and unstructured tables: equal halves are not assumed."""
    random = generator()
    shape = (BATCH, TOKENS) if unsqueeze_dim == 2 else (BATCH,)
    tail = (HEAD_DIM,) if unsqueeze_dim == 2 else (TOKENS, HEAD_DIM)
    q = torch.randn(*shape, HEADS, *tail, generator=random).to(dtype)
    k = torch.randn(*shape, KV_HEADS, *tail, generator=random).to(dtype)
    cos, sin = (torch.randn(BATCH, TOKENS, width, generator=random).to(table_dtype) for _ in range(2))
    return q, k, cos, sin


def _ignores_positions(original, names, num_states, known: tuple) -> bool:
    """Whether ``position_ids`` in reverse order leave the outputs of a try as they are."""
    *inputs, theirs = known
    backwards = torch.arange(TOKENS).flip(0).expand(BATCH, TOKENS)
    out = _run(original, names, num_states, *inputs, position_ids=backwards)
    return out is not None and all(torch.equal(a, b) for a, b in zip(out, theirs, strict=True))


def _run(original, names, num_states, q, k, cos, sin, unsqueeze_dim, **kwargs):
    """The function's outputs as a tuple, or ``None`` where it does not accept these shapes."""
    kwargs |= dict(zip(names, (q, k)[:num_states], strict=False)) | {"cos": cos, "sin": sin}
    if "unsqueeze_dim" in names:
        kwargs["unsqueeze_dim"] = unsqueeze_dim
    try:
        out = original(**kwargs)
    except Exception:  # not only shape errors of torch: some assert, or raise what they like
        return None
    out = (out,) if torch.is_tensor(out) else tuple(out)
    return out if len(out) == num_states and out[0].shape == q.shape else None


def _adapter(original, form: Form):
    """A function with ``original``'s parameters that computes with ``rope``.

    What the probe did not cover and ``rope`` does not take goes to ``original``.
    """
    names, num_states = _layout(original)

    @functools.wraps(original)
    def rotary(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k = given[names[0]], given.get(names[1]) if num_states == 2 else None
        unsqueeze_dim = given.get("unsqueeze_dim", form.unsqueeze_dim)
        if (num_states == 2 and k is None) or not _fits(form, q, k, given["cos"], given["sin"], unsqueeze_dim):
            return original(*args, **kwargs)
        return form(rope, q, k, given["cos"], given["sin"], unsqueeze_dim)

    return rotary


def _fits(form, q, k, cos, sin, unsqueeze_dim) -> bool:
    """Whether these are 4-D states of one batch and sequence, and tables for all of it that need no gradient.

    Tables that are too narrow for ``form`` may be broadcast by the original, or be an error there.
    """
    if q.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or unsqueeze_dim not in (1, 2):
        return False
    batch, tokens, head_dim = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    if k is not None and (
        k.ndim != 4 or (k.shape[0], k.shape[3 - unsqueeze_dim], k.shape[3]) != (batch, tokens, head_dim)
    ):
        return False
    turned = form.rotary_dim(cos)
    if turned > head_dim or (turned < head_dim and not form.partial):
        return False
    return cos.shape[0] in (1, batch) and cos.shape[1] == tokens and not (cos.requires_grad or sin.requires_grad)
