"""Where tokens go in the row, and what attention within rows computes."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from liger_trainer.unpadding import mixers
from liger_trainer.unpadding.attention import attend_rows
from liger_trainer.unpadding.layout import is_bounds, layout_of, read_mask, rows_of

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "both": [[0, 1, 1, 1, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0]],
    "an empty row": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]],
}


def laid_out(mask, **options):
    mask = torch.tensor(mask)
    lengths = read_mask(mask, None)
    assert lengths is not None
    return mask, layout_of(lengths, mask.device, **options)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("multiple", [1, 8])
def test_real_tokens_come_first_and_return_to_their_places(mask, multiple):
    mask, layout = laid_out(mask, multiple=multiple)
    ids = torch.arange(mask.numel()).view(mask.shape)
    row = layout.gather(ids)
    assert row.shape == (1, layout.total)
    assert layout.total % multiple == 0
    assert row[0, : layout.real].tolist() == ids[mask != 0].tolist()
    assert not (mask.flatten()[row[0, layout.real :]]).any(), "the trailing part is padding"
    assert layout.slots[0].tolist() == (row[0] % mask.shape[1]).tolist()
    states = torch.randn(1, layout.total, 3, requires_grad=True)
    padded = layout.scatter(states)
    assert padded.shape == (*mask.shape, 3)
    torch.testing.assert_close(padded[mask != 0], states[0, : layout.real])
    before_a_row = F.pad((mask[:, 1:] != 0) & (mask[:, :-1] == 0), (0, 1))
    assert (padded.abs().sum(-1) != 0).equal((mask != 0) | before_a_row)
    upstream = torch.randn_like(padded)
    padded.backward(upstream)
    torch.testing.assert_close(states.grad[0, : layout.real], upstream[mask != 0])


def test_further_inputs_are_gathered_by_their_shape():
    mask, layout = laid_out(MASKS["both"])
    table = torch.randn(*mask.shape, 7)
    torch.testing.assert_close(layout.gather(table)[0, : layout.real], table[mask != 0])
    sections = torch.randn(3, *mask.shape)
    torch.testing.assert_close(layout.gather(sections)[:, 0, : layout.real], sections[:, mask != 0])
    positions = torch.arange(mask.shape[1])[None]
    assert layout.gather(positions)[0, : layout.real].tolist() == positions.expand(mask.shape)[mask != 0].tolist()
    assert not layout.takes(torch.zeros(4, 9))
    other = torch.zeros(5)
    assert layout.scatter(other) is other


def test_gaps_and_labelled_padding_need_the_ordinary_path():
    assert read_mask(torch.tensor([[1, 0, 1, 0]]), None) is None
    mask = torch.tensor([[0, 1, 1, 0]])
    assert read_mask(mask, torch.tensor([[-100, 4, 4, 5]])) is None
    assert read_mask(mask, torch.tensor([[3, -100, 4, -100]])) is None
    assert read_mask(mask, torch.tensor([[-100, -100, 4, -100]])).predicts_first is False
    assert read_mask(mask, torch.tensor([[-100, 4, 4, -100]])).predicts_first is True


@pytest.mark.parametrize("lookahead", [1, 3])
def test_the_padding_that_predicts_a_row_is_kept(lookahead):
    mask, layout = laid_out(MASKS["left"], lookahead=lookahead)
    kept = layout.index[layout.real :].tolist()
    columns = mask.shape[1]
    assert kept == [
        p
        for p in range(mask.numel())
        if not mask.flatten()[p] and mask[p // columns].argmax() - p % columns <= lookahead
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_within_rows(causal, window, implementation, heads):
    """Against each row's attention by itself, in fp64: outputs and gradients of queries, keys and values."""
    _, layout = laid_out(MASKS["both"], multiple=16)
    rows = rows_of(layout.bounds, layout.total)
    groups = heads[0] // heads[1]
    shapes = [(1, h, layout.total, 8) for h in (heads[0], heads[1], heads[1])]
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    module = SimpleNamespace(
        is_causal=causal, num_key_value_groups=groups, config=SimpleNamespace(_attn_implementation=implementation)
    )
    assert is_bounds(layout.bounds)
    attend = sdpa_attention_forward if implementation == "sdpa" else eager
    kwargs = {} if window is None else {"sliding_window": window}
    ours, weights = attend_rows(attend, module, *states, layout.bounds, scaling=0.3, **kwargs)
    assert weights is None
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, states, upstream)
    expected = torch.zeros_like(ours)
    for start, end in zip(layout.bounds[0, 1, 0, :-1].tolist(), layout.bounds[0, 1, 0, 1:].tolist(), strict=True):
        if end > start:
            query, key, value = (state[:, :, start:end] for state in states)
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
            if window is not None:
                seen = seen & (distance < window) & (distance > -window)
            out = F.scaled_dot_product_attention(
                query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), seen, scale=0.3
            )
            expected = torch.cat([expected[:, :start], out.transpose(1, 2), expected[:, end:]], 1)
    torch.testing.assert_close(ours, expected)
    assert not ours[0, layout.real :].any(), "the trailing part attends to nothing"
    for actual, theirs in zip(gradients, torch.autograd.grad(expected, states, upstream), strict=True):
        torch.testing.assert_close(actual, theirs)
    assert rows_of(layout.bounds, layout.total) is rows


def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key, value = (state.repeat_interleave(module.num_key_value_groups, 1) for state in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def test_other_masks_are_the_functions_own():
    states = torch.randn(3, 1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    module = SimpleNamespace(is_causal=True)
    ours = attend_rows(sdpa_attention_forward, module, *states, mask)[0]
    torch.testing.assert_close(ours, sdpa_attention_forward(module, *states, mask)[0])
    _, layout = laid_out(MASKS["right"])
    with pytest.raises(NotImplementedError, match="position_bias"):
        attend_rows(sdpa_attention_forward, module, *states, layout.bounds, position_bias=torch.zeros(1))


def test_a_mask_that_was_copied_to_another_device_is_freed():
    _, layout = laid_out(MASKS["left"])
    copied = layout.bounds.clone()  # no view of another tensor, as the layout's own is
    rows_of(copied, layout.total)
    freed = weakref.ref(copied)
    del copied
    assert freed() is None


def test_a_layers_forward_keeps_its_name():
    """Decorators of transformers 5.24 ask for it."""

    def forward(layer, hidden):
        return hidden

    assert mixers._with_bounds(forward).__name__ == "forward"
