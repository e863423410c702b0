"""Rotary position embedding against its definition: outputs, gradients, memory order and errors."""

import pytest
import torch
from numerics import as_dtype, assert_no_worse_than_torch

from liger_trainer.kernels import reference
from liger_trainer.kernels import rope as rope_module
from liger_trainer.kernels.rope import rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    batch=2, q_heads=4, k_heads=2, tokens=5, dim=16, width=16, unsqueeze_dim=1, table_batch=None, contiguous=False
):
    """q and k as attention modules hold them, [B, T, H, D] in memory, and tables with unequal halves."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, tokens, heads, dim, device=DEVICE) for heads in (q_heads, k_heads))
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    if contiguous:
        q, k = q.contiguous(), k.contiguous()
    cos, sin = (torch.randn(table_batch or batch, tokens, width, device=DEVICE) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), cos, sin


def run(function, q, k, cos, sin, grads=None, **options):
    out = function(q, k, cos, sin, **options)
    outs = out if isinstance(out, tuple) else (out,)
    if grads is None:
        torch.manual_seed(1)
        grads = [torch.randn(*o.shape[:-1], 2 * o.shape[-1], device=DEVICE)[..., ::2].double() for o in outs]
    leaves = [t for t in (q, k) if t is not None]
    return (
        list(outs),
        list(torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])),
        grads,
    )


def compare(q, k, cos, sin, dtype, table_dtype=None, **options):
    q, k = as_dtype((q, k), dtype)
    cos, sin = as_dtype((cos, sin), table_dtype or dtype)
    exact, exact_grads, grads = run(reference.rope, *as_dtype((q, k, cos, sin), torch.float64), **options)
    ours, our_grads, _ = run(rope, q, k, cos, sin, grads, **options)
    same, same_grads, _ = run(reference.rope, q, k, cos, sin, grads, **options)
    for i, row in enumerate(zip(ours + our_grads, same + same_grads, exact + exact_grads, strict=True)):
        assert_no_worse_than_torch(*row, name=f"tensor {i}")
    for x, y, dx in zip((q, k), ours, our_grads, strict=False):
        assert y.stride() == torch.empty_like(x).stride()
        assert dx.stride() == y.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dim", "width", "rotary_dim"), [(16, 16, None), (24, 24, None), (24, 10, None), (20, 10, 20), (16, 3, 6)]
)
@pytest.mark.parametrize("layout", [(), ("interleaved",), ("interleaved", "deinterleave")], ids=str)
def test_outputs_and_gradients(layout, dim, width, rotary_dim, dtype):
    if "deinterleave" in layout and rotary_dim is None:
        rotary_dim, width = width, width // 2
    compare(*make(dim=dim, width=width), dtype, rotary_dim=rotary_dim, **dict.fromkeys(layout, True))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize(("q_heads", "k_heads"), [(11, 1), (3, 9)])
def test_layouts_and_head_counts(unsqueeze_dim, contiguous, q_heads, k_heads):
    shape = {"q_heads": q_heads, "k_heads": k_heads, "tokens": 37, "unsqueeze_dim": unsqueeze_dim}
    compare(*make(**shape, contiguous=contiguous, table_batch=1), torch.float32, unsqueeze_dim=unsqueeze_dim)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_another_dtype(table_dtype):
    compare(*make(), torch.bfloat16, table_dtype, compute_in_fp32=True)


def test_views_are_read_in_place():
    """q and k cut from one packed projection; expanded and transposed tables; a q whose last dimension is strided."""
    torch.manual_seed(0)
    packed = torch.randn(2, 5, 6, 16, device=DEVICE)
    q, k = packed[:, :, :4].transpose(1, 2).requires_grad_(), packed[:, :, 4:].transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(1, 5, 16, device=DEVICE).expand(2, 5, 16), torch.randn(2, 16, 5, device=DEVICE).mT
    ours, our_grads, grads = run(rope, q, k, cos, sin)
    theirs, their_grads, _ = run(reference.rope, q, k, cos, sin, grads)
    for a, b in zip(ours + our_grads, theirs + their_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert ours[0].transpose(1, 2).is_contiguous()
    strided = torch.randn(2, 4, 16, 5, device=DEVICE).mT
    assert torch.allclose(rope(strided, None, cos, sin), reference.rope(strided, None, cos, sin), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [{"batch": 0, "table_batch": 1}, {"tokens": 0}])
def test_no_tokens(size):
    q, k, cos, sin = make(**size)
    (q_out, k_out), grads, _ = run(rope, q, k, cos, sin)
    assert (q_out.shape, k_out.shape) == (q.shape, k.shape)
    assert [g.shape for g in grads] == [q.shape, k.shape]


@pytest.mark.parametrize("trained", ["q", "k"])
def test_one_gradient_only(trained):
    """The other tensor is frozen, and then again: it is trained but its output is not used."""
    q, k, cos, sin = make()
    index = "qk".index(trained)
    for frozen in (True, False):
        (k, q)[index].requires_grad_(not frozen)
        ours, theirs = ((fn(q, k, cos, sin)[index] ** 2).sum() for fn in (rope, reference.rope))
        leaves = [t for t in (q, k) if t.requires_grad]
        pairs = zip(*(torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (ours, theirs)), strict=True)
        for a, b in pairs:
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_q_alone():
    q, _, cos, sin = make()
    compare(q, None, cos, sin, torch.float32)


def test_without_triton_and_in_fp64_it_is_the_definition(monkeypatch):
    wide = as_dtype(make(), torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(rope(*wide), reference.rope(*wide), strict=True))
    monkeypatch.setattr(rope_module, "use_triton", lambda *_: False)
    q, k, cos, sin = make(dim=20, width=8)
    ours, our_grads, grads = run(rope, q, k, cos, sin, interleaved=True)
    theirs, their_grads, _ = run(reference.rope, q, k, cos, sin, grads, interleaved=True)
    assert all(torch.equal(a, b) for a, b in zip(ours + our_grads, theirs + their_grads, strict=True))


def test_autocast_does_not_change_the_forward():
    arguments = make()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = rope(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(cast, rope(*arguments), strict=True))


BAD = [
    (TypeError, "q: got dtype", lambda q, k, cos, sin: rope(q.long(), k, cos, sin)),
    (ValueError, "q: got shape", lambda q, k, cos, sin: rope(q[0], k, cos, sin)),
    (ValueError, "k: got shape", lambda q, k, cos, sin: rope(q, k[:, :, :4], cos, sin)),
    (ValueError, "k: got device", lambda q, k, cos, sin: rope(q, k.to("meta"), cos, sin)),
    (ValueError, "cos: got shape", lambda q, k, cos, sin: rope(q, k, cos[:, :4], sin)),
    (ValueError, "sin: got shape", lambda q, k, cos, sin: rope(q, k, cos, sin[..., :8])),
    (ValueError, "cos: got a tensor that requires grad", lambda q, k, cos, sin: rope(q, k, cos.requires_grad_(), sin)),
    (ValueError, "sin: got a tensor that requires grad", lambda q, k, cos, sin: rope(q, k, cos, sin.requires_grad_())),
    (ValueError, "rotary_dim: got 12 with", lambda q, k, cos, sin: rope(q, k, cos, sin, rotary_dim=12)),
    (ValueError, "rotary_dim: got 32 with", lambda q, k, cos, sin: rope(q, k, cos, sin, rotary_dim=32)),
    (ValueError, "rotary_dim: got 7 with", lambda q, k, cos, sin: rope(q, k, cos[..., :7], sin[..., :7])),
    (ValueError, "deinterleave: got True with interleaved=False", lambda q, k, cos, sin: rope(
        q, k, cos[..., :8], sin[..., :8], rotary_dim=16, deinterleave=True)),
    (ValueError, "deinterleave: got True with interleaved=True, tables of width 16 and rotary_dim 16", lambda q, k, cos,
        sin: rope(q, k, cos, sin, interleaved=True, deinterleave=True)),
    (ValueError, "unsqueeze_dim: got 3", lambda q, k, cos, sin: rope(q, k, cos, sin, unsqueeze_dim=3)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[b[1] for b in BAD])
def test_bad_input_is_named(error, message, call):
    q, k, cos, sin = make()
    with pytest.raises(error, match="^" + message):
        call(q.detach(), k.detach(), cos, sin)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "dim", "width"), [((32, 8), 128, 128), ((28, 4), 80, 80), ((64, 64), 128, 64), ((8, 1), 256, 256)]
)
def test_realistic_widths_and_equal_runs(heads, dim, width, interleaved):
    arguments = make(q_heads=heads[0], k_heads=heads[1], tokens=777, dim=dim, width=width)
    compare(*arguments, torch.bfloat16, interleaved=interleaved)
    first, second = run(rope, *arguments), run(rope, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("contiguous", [False, True])
def test_more_than_2_to_31_elements(contiguous):
    tokens = 2**19 + 5
    q = torch.randn(1, tokens, 33, 128, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    q = (q.contiguous() if contiguous else q).requires_grad_()
    cos, sin = torch.randn(2, 1, tokens, 128, dtype=torch.bfloat16, device=DEVICE).unbind()
    out = rope(q, None, cos, sin)
    out[:, -1, -3:].float().sum().backward()
    tail = q.detach()[:, -1:, -3:].clone().requires_grad_()
    expected = reference.rope(tail, None, cos[:, -3:], sin[:, -3:], compute_in_fp32=True)
    (expected_dq,) = torch.autograd.grad(expected.float().sum(), tail)
    assert torch.allclose(out[:, -1:, -3:].float(), expected.float(), rtol=2e-2, atol=2e-2)
    assert torch.allclose(q.grad[:, -1:, -3:].float(), expected_dq.float(), rtol=2e-2, atol=2e-2)
