"""Recomputing by memory on a GPU: the allocator's numbers, and batches of all lengths on a small share of the card."""

import gc

import pytest
import torch
from tiny_models import VOCAB, sdpa_model

from liger_trainer import apply_liger
from liger_trainer.memory.card import CudaCard
from liger_trainer.memory.recompute import recompute_of

pytestmark = pytest.mark.gpu
MIB = 2**20
LAYERS = 12


@pytest.fixture
def small_card():
    """A share of the card of 1.5 GiB above what is there."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    size = torch.cuda.memory_reserved() + 1536 * MIB
    torch.cuda.set_per_process_memory_fraction(size / total)
    yield size
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_the_card_says(small_card):
    card = CudaCard(torch.device("cuda", torch.cuda.current_device()))
    before = card.read()
    tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    after = card.read()
    assert after.allocated - before.allocated == card.allocated() - before.allocated == tensor.numel()
    assert after.free + after.reserved == pytest.approx(before.free + before.reserved, abs=4 * MIB)
    assert after.free + after.reserved <= small_card
    assert card.peak() >= after.allocated


def steps(config, lengths):
    """Losses and the last gradients of a model that keeps some 24 KB a token and layer."""
    model = sdpa_model(
        num_hidden_layers=LAYERS, hidden_size=512, intermediate_size=4096, num_attention_heads=8, head_dim=64,
        max_position_embeddings=4096,
    )  # fmt: skip
    model.cuda().to(torch.bfloat16).train().activation_checkpointing_enable()
    apply_liger(model, config)
    torch.cuda.reset_peak_memory_stats()
    losses, counts = [], []
    for i, tokens in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (8, tokens), generator=torch.Generator().manual_seed(i)).cuda()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        found = recompute_of(model)
        counts.append(len(found.last.recomputed) if found and found.last.recomputed is not None else None)
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    del model, loss, found
    gc.collect()
    return losses, gradients, counts


def test_all_lengths_on_a_small_card(small_card):
    """The longest is the last and comes at once. 8 x 640 tokens keep some 120 MiB a layer."""
    lengths = [64, 128, 256, 96, 200, 17, 64, 640]
    expected, exact, _ = steps({"recompute": "all"}, lengths)
    ooms = torch.cuda.memory_stats()["num_ooms"]
    losses, gradients, counts = steps({}, lengths)
    assert torch.cuda.memory_stats()["num_ooms"] == ooms
    assert torch.cuda.max_memory_allocated() <= small_card
    assert counts[:7] == [None, *[0] * 6]
    assert 0 < counts[-1] < LAYERS
    assert losses == pytest.approx(expected, rel=1e-3)
    for name, gradient in exact.items():
        assert (gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-6, name
