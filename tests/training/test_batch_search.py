"""The search for the largest batch: its result for any expectation, and its number of trials."""

import pytest

from liger_trainer.training.batch_search import FARTHEST, USABLE, expected_batch, search


def trials(fits, *args, **options):
    """What ``search`` finds, and what it tries."""
    tried = []

    def once(size):
        assert size not in tried, (tried, size)
        tried.append(size)
        return fits(size)

    return search(once, *args, **options), tried


@pytest.mark.parametrize("largest", [*range(1, 20), 63, 64, 65, 100])
def test_the_largest_in_few_trials(largest):
    for start in (1, 8, 64, 500):
        found, tried = trials(lambda n: n <= largest, start, 100)
        assert found == largest
        assert len(tried) <= 14
        assert max(tried) <= 100
        rough, _ = trials(lambda n: n <= largest, start, 100, resolution=0.25)
        assert rough <= largest < 1.25 * rough or rough == largest


def test_every_resolution_ends():
    """However fractions round, no number is tried twice, and the result is within the resolution."""
    for percent in range(101):
        for largest in range(1, 131, 1 if percent in (29, 35, 58) else 7):
            for guess in (largest // 2, largest, largest + 2, 100):
                found, _ = trials(lambda n: n <= largest, 16, 1000, percent / 100, lambda: guess)  # noqa: B023
                assert found == largest or found < largest <= found * (1 + percent / 100)


def test_more_fits_than_expected():
    """Strides above what was expected grow, up to doubling."""
    assert trials(lambda n: True, 32, 1024, 1 / 16, lambda: 1)[1] == [32, 34, 38, 46, 62, 110, 220, 440, 880, 1024]


def test_an_expected_size_that_fits_can_be_the_result():
    guess = {"accept_expected": True, "expected": lambda: 90}
    assert trials(lambda n: n <= 99, 32, 1024, 1 / 16, **guess) == (90, [32, 90])
    assert trials(lambda n: n <= 80, 32, 1024, **guess)[0] == 80
    assert trials(lambda n: True, 32, 70, **guess) == (70, [32, 70])


def test_the_ends():
    assert trials(lambda n: False, 8, 100) == (0, [8, 4, 2, 1])
    assert trials(lambda n: False, 1, 1) == (0, [1])
    assert trials(lambda n: True, 8, 100, resolution=1.0) == (100, [8, 16, 32, 64, 100])


@pytest.mark.parametrize("guess", [1, 5, 17, 99, 100, 1023])
def test_what_is_expected_changes_no_result(guess):
    """Too low, too high, or right by chance: the same largest number, and never one over the limit."""
    for largest in range(101):
        for start in (1, 8, 64):
            found, tried = trials(lambda n: n <= largest, start, 100, expected=lambda: guess)  # noqa: B023
            assert found == largest
            assert len(tried) <= 22
            assert max(tried) <= 100
            rough, _ = trials(lambda n: n <= largest, start, 100, resolution=0.25, expected=lambda: guess)  # noqa: B023
            assert rough <= largest < 1.25 * rough or rough == largest


@pytest.mark.parametrize(
    ("peak", "with_memory", "without"),
    [
        # What Llama-3.2-1B took on an H200 with rows of 1024 tokens, as a curve through it.
        (lambda n: 8.4 + 0.9213 * n + 0.00015 * n * n, [8, 16, 128, 136, 144], 10),
        # The peak is in the optimizer's step up to 31 rows, so that the line through 16 and 32 reaches too far.
        (lambda n: max(60, 44 + 0.52 * n), [8, 16, 32, 256, 144, 177, 188], 10),
    ],
    ids=["activations", "optimizer"],
)
def test_memory_saves_trials(peak, with_memory, without):
    free = 139.2
    largest = max(n for n in range(1, 1025) if peak(n) <= free)
    peaks = {}

    def fits(batch):
        if peak(batch) <= free:
            peaks[batch] = peak(batch)
        return batch in peaks

    found, tried = trials(fits, 8, 1024, resolution=1 / 16, expected=lambda: expected_batch(peaks, free))
    assert tried == with_memory
    assert found <= largest < 1.0625 * found
    assert len(trials(fits, 8, 1024, resolution=1 / 16)[1]) == without


def test_the_line_through_two_batches():
    free = 100 / USABLE
    assert expected_batch({}, free) is None
    assert expected_batch({8: 10.0}, free) is None
    assert expected_batch({8: 10.0, 9: 11.0}, free) is None, "neighbours differ by noise"
    assert expected_batch({8: 10.0, 16: 10.0}, free) is None, "memory has not grown"
    assert expected_batch({8: 20.0, 16: 30.0, 24: 41.0}, free) == 24 + 44, "through 8 and 24: 1.3125 GiB a row"
    assert expected_batch({8: 10.0, 16: 10.5}, free) == 16 * FARTHEST
    assert expected_batch({8: 90.0, 16: 120.0}, free) < 16, "more fits than was free: a smaller one is expected"
