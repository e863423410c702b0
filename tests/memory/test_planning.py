"""What plans of recomputing rest on: the head, the allocator, hidden states, and what to do if planning fails."""

import pytest
import torch
from fake_card import FakeCard, put_card  # noqa: F401  a fixture
from memory_runs import CONFIG, LAYERS, batch, model_of, run_of
from tiny_models import VOCAB
from torch import nn

from liger_trainer import apply_liger
from liger_trainer.memory import recompute
from liger_trainer.memory.layers import hidden_states
from liger_trainer.memory.measured import Parameters
from liger_trainer.memory.recompute import recompute_of


@pytest.fixture(autouse=True)
def random_memory():
    """No NaN in new tensors here: filling them is an operation that the card would count twice."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def test_one_step_of_several_forwards_is_forgotten(put_card):  # noqa: F811
    run = run_of(put_card, model_of(True), {})
    found = recompute_of(run.model)
    with run.fake:
        sum(run.model(**batch(8, seed=seed)).loss for seed in (0, 1)).backward()
    shares = []
    for _ in range(9):
        run.step(batch(8), keep=False)
        shares.append(max(found.rounds))
    assert shares == [2] * 7 + [1] * 2


def test_the_budget_shrinks_when_memory_lies_in_pieces(put_card):  # noqa: F811
    """The allocator had to return blocks in a step to get one; a tenth at most is lost by that."""
    total = 10_000_000
    run = run_of(put_card, model_of(True), {}, total).step(batch(64), keep=False)
    found, reading, retries, counts = recompute_of(run.model), run.fake.read, [0], []
    run.fake.read = lambda: reading()._replace(retries=retries[0])

    def one_more(*_):
        retries[0] += 1

    for _ in range(3):
        one_more()  # between the steps, as in evaluation
        run.step(batch(64), keep=False)
    assert found.lost == 0
    run.model.lm_head.register_full_backward_hook(one_more)
    for step in range(12):
        run.step(batch(64), keep=False)
        counts.append(run.recomputed[-1])
        assert found.lost == pytest.approx(min(step + 1, 10) * total / 100)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_all_processes_recompute_layers_that_free_something(put_card, monkeypatch):  # noqa: F811
    """ZeRO-3's rule; the lower layers are frozen and keep next to nothing."""

    class Partitioned(Parameters):
        def __init__(self, model):
            super().__init__(model)
            self.is_partitioned = True

    monkeypatch.setattr(recompute, "Parameters", Partitioned)
    model = model_of(False)
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers[:4]:
        layer.requires_grad_(False)
    run = run_of(put_card, model, {}, 3_700_000)
    for tokens in (8, 8, 48, 64):
        run.step(batch(tokens), keep=False)
    assert run.fake.failures == 0
    assert recompute_of(model).last.recomputed >= {4, 5}
    assert not recompute_of(model).last.recomputed & {0, 1, 2, 3}


def test_layers_that_run_without_the_model_tell_nothing_of_its_head(put_card):  # noqa: F811
    run = run_of(put_card, model_of(True), {})
    found = recompute_of(run.model)
    inputs = {name: value for name, value in batch(24).items() if name != "labels"}
    with run.fake:
        run.model.model(**inputs)
        assert found.logs()["recomputed_layers"] == LAYERS - 1
        held = torch.zeros(10**6)
        run.model.eval()
        with torch.no_grad():
            run.model(**batch(24))
    assert found.measured.head is None
    assert found.logs() == {}
    assert held.numel() == 10**6


@pytest.mark.parametrize("kind", ["several", "flat", "quantised"])
def test_a_head_that_is_no_matrix_of_floats(kind, put_card):  # noqa: F811
    """Several heads as in MusicGen, FSDP1's flat shard, and a quantised weight."""
    core = model_of(True)
    width = core.config.hidden_size
    head = nn.ModuleList([nn.Linear(width, VOCAB), nn.Linear(width, VOCAB)])
    if kind != "several":
        weight = torch.zeros(VOCAB * width) if kind == "flat" else torch.zeros(VOCAB, width, dtype=torch.int8)
        head = nn.Module()
        head.weight = nn.Parameter(weight, requires_grad=False)
    run = run_of(put_card, core, {})
    core.get_output_embeddings = lambda: head
    run.step(batch(24), keep=False).step(batch(24), keep=False)
    assert run.recomputed == [None, 0]


def test_planning_that_fails_leaves_the_layers_alone(put_card, caplog):  # noqa: F811
    """The user's training goes on."""
    run = run_of(put_card, model_of(True), {})
    report = apply_liger(run.model, CONFIG)
    run.fake.read = lambda: 1 // 0
    run.step(batch(24), keep=False).step(batch(24), keep=False)
    assert run.recomputed == []
    assert caplog.text.count("planning failed with ZeroDivisionError") == 1
    [record] = [a for a in report.applied if a.kind == "recompute"]
    assert "planning failed" in record.variant
    del run.fake.read
    run.step(batch(24), keep=False).step(batch(24), keep=False)
    assert run.recomputed == [None, 0]
    [record] = [a for a in report.applied if a.kind == "recompute"]
    assert record.variant.startswith(f"0 of {LAYERS}")  # no longer what it said before


def test_hidden_states_come_first():
    hidden, other, mask = torch.zeros(4, 2, 3, 8), torch.zeros(2, 3, 5), torch.zeros(2, 1, 3, 3)
    assert hidden_states((hidden, other), {}) is hidden
    assert hidden_states((), {"attention_mask": mask, "hidden_states": hidden}) is hidden
    assert hidden_states((torch.zeros(2, 3, 5, dtype=torch.long), other), {}) is other
    assert hidden_states((), {"past": None}) is None
