"""Recomputing by memory on a made-up card, which counts every living byte: same gradients, and never out of memory."""

import copy
import functools
import logging
import pickle

import pytest
import survey
import torch
from fake_card import FakeCard, put_card  # noqa: F401  a fixture
from memory_runs import CONFIG, LAYERS, PLENTY, Run, assert_equal, batch, model_of, run_of
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from liger_trainer import LigerConfig, apply_liger, revert_liger
from liger_trainer.memory.measured import USES_OF_WALK, Measured, Size
from liger_trainer.memory.recompute import recompute_of


@pytest.fixture(autouse=True)
def random_memory():
    """No NaN in new tensors here: filling them is an operation that the card would count twice."""
    torch.utils.deterministic.fill_uninitialized_memory = False


SIZES = [8, 24, 40, 16, 64, 64]  # tokens of a row


@pytest.mark.parametrize(
    ("asked", "reentrant"), [(True, True), (True, False), (False, False)], ids=["reentrant", "asked", "not asked"]
)
def test_losses_and_gradients_are_those_of_full_checkpointing(asked, reentrant, put_card):  # noqa: F811
    """Bit-equal on every card, and the peak is within what was planned and within the budget."""
    theirs = run_of(put_card, model_of(True), {"recompute": "all"})
    for i, tokens in enumerate(SIZES):
        theirs.step(batch(tokens, seed=i), keep=i % 2 == 0)
    counts = []
    for total in (PLENTY, 9_000_000, 7_000_000):
        model = model_of(False)
        if asked:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        ours = run_of(put_card, model, {}, total)
        for i, tokens in enumerate(SIZES):
            ours.step(batch(tokens, seed=i), keep=i % 2 == 0)
        assert_equal(ours, theirs)
        assert ours.fake.failures == 0
        assert all(p <= 0.96 * total for p in ours.peaks)
        for seen, planned in zip(ours.peaks, ours.planned, strict=True):
            assert planned is None or seen <= planned <= 1.15 * seen + 2**20  # the chunk is smaller
        assert all(layer.gradient_checkpointing == asked for layer in model.model.layers)
        counts.append([n for n in ours.recomputed if n is not None])
    assert set(counts[0]) == {0}
    assert 0 < max(counts[1]) < LAYERS
    assert min(counts[1]) == 0
    assert max(counts[2]) > max(counts[1])


@pytest.mark.long
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_300_steps_of_random_lengths_with_the_longest_last(share, put_card):  # noqa: F811
    """Another process holds the rest of the card."""
    total = 22_000_000
    run = run_of(put_card, model_of(True), {}, total, int((1 - share) * total))
    lengths = torch.randint(4, 97, (299,), generator=torch.Generator().manual_seed(0)).tolist()
    for i, tokens in enumerate([*lengths, 128]):
        run.step(batch(tokens, seed=i), keep=False)
        run.results.clear()
    counts, longest = run.recomputed[1:], max(run.peaks)
    print(
        f"{share:.0%} of {total} bytes: peak {longest / total:.1%}; layers recomputed: mean "
        f"{sum(counts) / len(counts):.2f}, last {counts[-1]} of {LAYERS}"
    )
    assert run.fake.failures == 0
    assert longest <= (share - 0.04) * total
    assert counts[-1] == max(counts) > 0


def test_lengths_that_grow_fourfold_in_the_middle(put_card):  # noqa: F811
    """The first long batch is the largest of all: what it keeps is measured in its own first layer."""
    run = run_of(put_card, model_of(True, attn_implementation="eager"), {}, 30_000_000)  # keeps T * T probabilities
    for i in range(4):
        run.step(batch(40, seed=i), keep=False)
    assert run.recomputed[1:] == [0, 0, 0]
    for i in range(4):
        run.step(batch(160, seed=i), keep=False)
    assert run.fake.failures == 0
    assert all(0 < n < LAYERS for n in run.recomputed[4:])
    assert max(run.peaks) <= 0.96 * 30_000_000


def test_others_take_memory_and_give_it_back(put_card):  # noqa: F811
    run = run_of(put_card, model_of(True), {}, 12_000_000)
    for i, others in enumerate([0, 0, 4_000_000, 0]):
        run.fake.others = others
        run.step(batch(64, seed=i), keep=False)
    assert run.recomputed[1] == run.recomputed[3] < run.recomputed[2]
    assert run.fake.failures == 0


def test_a_card_that_is_too_small_to_measure_stays_as_it_was(put_card):  # noqa: F811
    plain = run_of(put_card, model_of(True), {"recompute": "all"})
    run = run_of(put_card, model_of(True), {}, 5_000_000)
    for i in range(3):
        plain.step(batch(64, seed=i), keep=False)
        run.step(batch(64, seed=i), keep=False)
    assert run.recomputed == [LAYERS] * 3
    assert run.peaks == plain.peaks
    assert_equal(run, plain)


def test_not_asked_says_once_that_it_has_to(put_card, caplog):  # noqa: F811
    run = run_of(put_card, model_of(False), {}, 9_000_000)
    for i, tokens in enumerate([24, 64, 64]):
        run.step(batch(tokens, seed=i), keep=False)
    said = [r.getMessage() for r in caplog.records if "would not fit" in r.getMessage()]
    assert len(said) == 1
    assert run.recomputed[0] == 0 < run.recomputed[1]
    assert not hasattr(run.model.model.layers[1], "_gradient_checkpointing_func")


def test_forwards_that_share_a_backward_share_the_memory(put_card):  # noqa: F811
    """Seen in the first step; after that the first forward leaves half to the second."""
    run = run_of(put_card, model_of(True), {}, 20_000_000).step(batch(40), keep=False)
    found, counts, peaks = recompute_of(run.model), [], []
    for _ in range(3):
        run.fake.most = 0
        with run.fake:
            losses = []
            for seed in (0, 1):
                losses.append(run.model(**batch(96, seed=seed)).loss)
                counts.append(len(found.last.recomputed))
            sum(losses).backward()
            del losses
        peaks.append(run.fake.most)
        run.model.zero_grad()
    assert max(found.rounds) == 2
    assert counts[0] < counts[2] == counts[4]
    assert counts[3] == counts[5]
    assert max(peaks[1:]) <= 0.96 * 20_000_000


def test_layers_on_several_devices_stay_as_they_are(put_card, caplog):  # noqa: F811
    model = model_of(True)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    run = run_of(put_card, model, {}).step(batch(40))
    assert run.recomputed == []
    assert "several devices" in caplog.text


def test_measures_again_when_other_parameters_are_trained(put_card):  # noqa: F811
    model = model_of(True)
    run = run_of(put_card, model, {}).step(batch(40), keep=False)
    found = recompute_of(model)
    before = found.measured
    run.step(batch(40), keep=False)
    assert found.measured is before
    for layer in model.model.layers[:4]:
        layer.requires_grad_(False)
    run.step(batch(40), keep=False)
    assert found.measured is not before
    assert len(found.measured.kept) == 2
    assert run.recomputed == [None, 0, None]
    model.to(torch.float64)
    run.step(batch(40), keep=False)
    assert run.recomputed[-1] is None
    before = found.measured
    model.model.layers[3].mlp.extra = nn.Linear(4, 4)  # seen by the next walk
    for _ in range(USES_OF_WALK):
        assert found.measured is before
        run.step(batch(4, rows=1), keep=False)
    assert found.measured is not before


def test_lora(put_card):  # noqa: F811
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    runs = []
    for config in ({"recompute": "all"}, {}):
        torch.manual_seed(0)
        model = get_peft_model(model_of(True), lora)
        runs.append(run_of(put_card, model, config, 9_000_000))
        for i in range(3):
            runs[-1].step(batch(72, seed=i), keep=False)
    assert_equal(*runs)
    assert runs[1].recomputed[0] is None
    assert 0 < runs[1].recomputed[2] < LAYERS
    assert runs[1].fake.failures == 0


@pytest.mark.parametrize("how", ["every second", "own function"])
def test_what_the_user_sets_stays(how, put_card, caplog):  # noqa: F811
    """Whoever sets the layers otherwise is followed, also later and back again."""
    model, called = model_of(True), []
    run = run_of(put_card, model, {}).step(batch(40), keep=False)
    if how == "every second":
        model.activation_checkpointing_enable(every_n_layers=2)
    for layer in model.model.layers if how == "own function" else ():
        layer._gradient_checkpointing_func = functools.partial(_noted, called)  # as offloading has
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    for _ in range(2):
        run.step(batch(40), keep=False)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == flags
    assert {"every second": "not all of them", "own function": "not torch's own"}[how] in caplog.text
    assert how == "every second" or len(called) == 2 * LAYERS
    model.activation_checkpointing_enable()
    for _ in range(3):
        run.step(batch(40), keep=False)
    assert run.recomputed[-1] == 0


def _noted(called, function, *args, **kwargs):
    called.append(function)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


@pytest.mark.long
def test_a_prefix_of_keys_and_values_is_kept(put_card):  # noqa: F811
    """transformers drops it for a layer that is checkpointed."""
    model = model_of(False)
    run = run_of(put_card, model, {}, 12_000_000).step(batch(40), keep=False)
    past = DynamicCache(config=model.config)
    for index in range(LAYERS):
        past.update(*torch.zeros(2, 4, 2, 3, 16), index)
    with run.fake:
        model(**batch(40), past_key_values=past)
    assert recompute_of(model).last is None
    assert past.get_seq_length() == 43


@pytest.mark.parametrize("model_type", ["llama", "bamba"])
def test_layers_are_checkpointed_under_another_class(model_type, put_card):  # noqa: F811
    """FSDP2 gives them one, and transformers checkpoints in the forward of a layer's class alone."""
    put_card(FakeCard(0))  # without room to keep anything
    model = tiny_model(model_type) if model_type == "llama" else survey.tiny_model(model_type)
    model.train().activation_checkpointing_enable()
    apply_liger(model, CONFIG)
    calls = []
    for layer in model.model.layers:
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(**batch(12)).loss.backward()
    assert len(calls) == 2 * len(model.model.layers)


def test_evaluation_in_between_and_two_models(put_card):  # noqa: F811
    """A reference model in evaluation on the same card counts as memory that is taken."""
    model, reference = model_of(True), model_of(False).eval()
    run = run_of(put_card, model, {}, 20_000_000)
    apply_liger(reference, CONFIG)
    run.step(batch(40), keep=False)
    with torch.no_grad():
        model.eval()(**batch(64))
        reference(**batch(64))
    model.train()
    run.step(batch(40), keep=False)
    assert run.recomputed == [None, 0]
    assert recompute_of(reference) is not recompute_of(model)
    assert recompute_of(reference).run is None


def test_revert_copies_and_pickles(put_card):  # noqa: F811
    model = model_of(True)
    forwards = [vars(layer).get("forward") for layer in model.model.layers]
    run = run_of(put_card, model, {}).step(batch(24), keep=False)
    copied = copy.deepcopy(model)
    assert recompute_of(copied) is not recompute_of(model)
    assert recompute_of(copied).core() is copied
    model.disable_input_require_grads()  # its hook cannot be pickled
    again = pickle.loads(pickle.dumps(model))
    apply_liger(again, {**CONFIG})
    for other in (copied, again):
        Run(other, run.fake).step(batch(24), keep=False).step(batch(24), keep=False)
        assert recompute_of(other).last.recomputed == frozenset()
    revert_liger(model)
    assert recompute_of(model) is None
    assert [vars(layer).get("forward") for layer in model.model.layers] == forwards
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_the_report_and_the_logs(put_card, caplog):  # noqa: F811
    caplog.set_level(logging.WARNING)
    model = model_of(True)
    run = run_of(put_card, model, {}, 9_000_000)
    report = recompute_of(model) and apply_liger(model, CONFIG)
    assert report.counts["recompute"] == 1
    for i, tokens in enumerate([24, 64, 64]):
        run.step(batch(tokens, seed=i), keep=False)
    [record] = [a for a in report.applied if a.kind == "recompute"]
    assert record.variant.startswith(f"{run.recomputed[-1]} of {LAYERS} layers recompute")
    assert "256 tokens" in record.variant
    assert caplog.text.count("only as far as memory requires") == 1
    logs = recompute_of(model).logs()
    assert logs["recomputed_layers"] == round((LAYERS - 1 + 2 * run.recomputed[-1]) / 3, 2)
    assert logs["memory_headroom_gib"] == round((9_000_000 - run.fake.most) / 2**30, 2)
    assert recompute_of(model).logs() == {}


def test_models_without_layers_of_the_kind_are_in_the_report(put_card):  # noqa: F811
    put_card(FakeCard(PLENTY))
    one = apply_liger(model_of(True, layers=1), CONFIG)
    assert [s.reason for s in one.skipped if s.kind == "recompute"] == [
        "it has no list of layers that can be checkpointed one by one"
    ]
    assert "recompute" not in apply_liger(model_of(True), {"recompute": "all"}).kinds()


def test_bad_options_are_named():
    with pytest.raises(TypeError, match="recompute: got 'some'; must be of type 'auto' or 'all'"):
        LigerConfig.parse({"recompute": "some"})
    with pytest.raises(ValueError, match=r"memory_margin: got 1\.0; must be from 0 to below 1"):
        LigerConfig.parse({"memory_margin": 1.0})


def test_other_kinds_grow_as_the_first_layer_does():
    measured = Measured(kinds={0: "a", 1: "b", 2: "a", 3: "c"})
    measured.note_kept("a", Size(100, 10))
    measured.note_kept("b", Size(300, 10))
    assert [measured.size_of(i, 20) for i in range(4)] == [200, 600, 200, 200]
    measured.note_kept("a", Size(400, 20))  # twice as much for each token
    assert [measured.size_of(i, 20) for i in range(3)] == [400, 1200, 400]
    measured.note_kept("a", Size(100, 20))
    assert [measured.size_of(i, 20) for i in range(3)] == [100, 600, 100]


def test_sizes():
    assert Size(100, 10).at(5) == 50
    assert Size(100, 10).at_least(5) == 100
    assert Size(100, 10).at_least(20) == 200
