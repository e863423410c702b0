"""The rope rule on many rotary functions: which match, which are skipped, which calls go to the original."""

import copy

import pytest
import torch
from tiny_models import batch, tiny_model

from liger_trainer import apply_liger
from liger_trainer.probing.rule import Acted, Skip
from liger_trainer.rules import rope as rotary


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def plain(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def optional_k(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotated = q * cos + rotate_half(q) * sin
    return rotated if k is None else (rotated, k * cos + rotate_half(k) * sin)


def to_halves(q, k, cos, sin):
    cos, sin = (table[:, None, :, : table.shape[-1] // 2] for table in (cos, sin))
    return tuple(
        torch.cat((x[..., ::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., ::2] * sin), dim=-1)
        for x in (q, k)
    )


def asserting(q, k, cos, sin):
    assert cos.shape[-1] == q.shape[-1]
    return plain(q, k, cos, sin)


def ignores_positions(q, k, cos, sin, position_ids=None):
    return plain(q, k, cos, sin)


def reads_positions(q, k, cos, sin, position_ids=None):
    if position_ids is not None:
        cos, sin = cos[0][position_ids], sin[0][position_ids]
    return plain(q, k, cos, sin)


def either_layout(q, k, cos, sin):
    return plain(q, k, cos, sin, 1 if q.shape[2] == cos.shape[1] else 2)


def uneven_dtypes(q, k, cos, sin):
    q_out, k_out = plain(q, k, cos, sin)
    return q_out, k_out.to(k.dtype)


@pytest.mark.parametrize(
    "function", [plain, optional_k, to_halves, asserting, ignores_positions], ids=lambda f: f.__name__
)
def test_matched(function):
    form = rotary._probe_function(function)
    assert isinstance(form, rotary.Form)
    q, k, cos, sin = rotary._inputs(1, rotary.HEAD_DIM, torch.float32, torch.float32)
    for ours, theirs in zip(
        rotary._adapter(function, form, Acted())(q, k, cos, sin), function(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (reads_positions, "its position_ids change the result"),
        (either_layout, "it takes both layouts"),
        (uneven_dtypes, "it is not a rotation"),
        (lambda q, k, cos, sin: (q + cos[:, None], k), "it is not a rotation"),
        (lambda q, cos, sin, mask: q, "mask"),
    ],
    ids=["positions", "layouts", "dtypes", "sum", "arguments"],
)
def test_skipped(function, reason):
    with pytest.raises(Skip, match=reason):
        rotary._probe_function(function)


def test_what_rope_does_not_take_goes_to_the_original():
    q, k, cos, sin = rotary._inputs(1, rotary.HEAD_DIM, torch.float32, torch.float32)
    for function, arguments in {
        "learned tables": (plain, (q, k, cos.clone().requires_grad_(), sin)),
        "one token's tables": (plain, (q, k, cos[:, :1], sin[:, :1])),
        "fewer batches": (plain, (q[:1], k[:1], cos, sin)),
        "no batch": (plain, (q[0], k[0], cos[0], sin[0], 0)),
        "one entry for all pairs": (plain, (q, k, cos[..., :1], sin[..., :1])),
        "one for all neighbours": (to_halves, (q, k, cos[..., :2], sin[..., :2])),
        "no k": (optional_k, (q,)),
    }.values():
        tables = {"cos": cos, "sin": sin} if len(arguments) == 1 else {}
        ours = rotary._adapter(function, rotary._probe_function(function), Acted())(*arguments, **tables)
        theirs = function(*arguments, **tables)
        for a, b in zip((ours,) if tables else ours, (theirs,) if tables else theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("model_type", "overrides", "ropes"),
    [
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, 2),  # an entry for each pair
        ("deepseek_v4", {}, 0),  # rotates the end of a head, while the op rotates its beginning
    ],
)
def test_rotary_functions_match_by_what_they_compute(model_type, overrides, ropes):
    plain = tiny_model(model_type, **overrides)
    model = copy.deepcopy(plain)
    report = apply_liger(model)
    assert report.counts.get("rope", 0) == ropes
    assert ("rope" in {skipped.kind for skipped in report.skipped}) == (ropes == 0)
    inputs = batch()
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss, rtol=1e-5, atol=1e-7)
