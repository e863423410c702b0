"""The planner's arithmetic over made-up cards: peaks, and the fewest layers that must recompute."""

import pytest

from liger_trainer.memory.plan import Costs, layers_to_recompute, peak

GIB = 2**30
ORDER = [1, 2, 3, 0]


def costs(**changes):
    """Four layers that keep 10 or pass on 1, above 100 that are there."""
    return Costs(**{"allocated": 100, "kept": [10] * 4, "recomputed": [1] * 4, **changes})


def test_the_peak_is_at_the_top_if_layers_keep():
    assert peak(costs(), ()) == 100 + 40 + 10  # the last layer's backward needs a layer's worth of gradients
    assert peak(costs(head=5, head_transient=3), ()) == 100 + 40 + 5 + 10
    assert peak(costs(head=5, head_transient=30), ()) == 100 + 40 + 5 + 30
    assert peak(costs(gathered=7), ()) == 157


def test_recomputed_layers_pass_on_their_output_and_need_a_layer_again():
    assert peak(costs(), {0, 1, 2, 3}) == 100 + 4 + 2 * 10
    assert peak(costs(), {1, 2}) == 100 + 22 + 10  # reached when the third layer is gone
    assert peak(costs(), {3}) == 100 + 31 + 20  # here it is not


def test_gradients_appear_from_the_last_layer_down():
    assert peak(costs(gradients=400), ()) == 100 + 400
    assert peak(costs(gradients=40), ()) == 150  # they replace what the layers kept


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1000, 0), (150, 0), (149, 1), (141, 1), (140, 2), (132, 2), (131, 4), (124, 4), (0, 4)],
)
def test_as_many_as_needed_and_no_more(budget, expected):
    found = layers_to_recompute(costs(), budget, ORDER)
    assert found == frozenset(ORDER[:expected])
    assert expected == 4 or peak(costs(), found) <= budget
    assert not expected or peak(costs(), frozenset(ORDER[: expected - 1])) > budget  # the last layer costs itself again


def test_layers_that_free_nothing_are_left_alone():
    some = costs(kept=[1, 1, 10, 10])
    assert layers_to_recompute(some, 0, ORDER) == {2, 3}


@pytest.mark.parametrize("total", [16, 24, 40, 80, 141])
@pytest.mark.parametrize("tokens", [4096, 32768, 131072])
def test_a_3b_model_on_cards_of_all_sizes(total, tokens):
    """More memory or fewer tokens never recompute more layers, and what is planned fits."""
    model = Costs(
        allocated=12 * GIB, kept=[60_000 * tokens] * 28, recomputed=[6_144 * tokens] * 28, head=6_144 * tokens,
        head_transient=2 * GIB, gradients=6 * GIB,
    )  # fmt: skip
    order = [*range(1, 28), 0]
    found = layers_to_recompute(model, 0.92 * total * GIB, order)
    assert len(found) == 28 or peak(model, found) <= 0.92 * total * GIB
    assert len(layers_to_recompute(model, 0.92 * (total + 8) * GIB, order)) <= len(found)
    if total == 141:
        assert len(found) == {4096: 0, 32768: 0, 131072: 15}[tokens]
    if total == 16 and tokens > 4096:
        assert len(found) == 28
