"""The search for the largest batch that fits: doubling and bisection, shortened by the memory seen so far."""

from collections.abc import Callable
from math import ceil

# Share of the free memory that counts. The rest is for fragmentation and for memory outside PyTorch.
USABLE = 0.98
# An expected batch is at most this many times the largest that fits. While the peak lies in the optimizer's step,
# memory hardly grows with the batch, and a line through two peaks would reach too far.
FARTHEST = 8


def search(
    fits: Callable[[int], bool],
    start: int,
    limit: int,
    resolution: float = 0.0,
    expected: Callable[[], int | None] = lambda: None,
    accept_expected: bool = False,
) -> int:
    """The largest number from 1 to ``limit`` that fits, or 0. Anything smaller than a number that fits must fit too.

    Args:
        fits: whether a number fits; called once for each number that is tried.
        start: the first number to try. It is doubled until one does not fit, or halved until one fits. Bisection
            follows.
        limit: the largest number to try.
        resolution: how much larger, as a share of the result, a number that would still fit may be.
        expected: the result to expect from the numbers tried so far, or None. It is asked after each number that fits,
            and tried next instead of the doubled number or the midpoint. A wrong guess costs trials but does not
            change the quality of the result.
        accept_expected: an expected number that fits is the result, though a larger one may fit as well.
    """
    good, bad = 0, limit + 1
    size = min(start, limit)
    stride, guess = 1, None
    while True:
        if fits(size):
            if accept_expected and guess is not None and size >= min(guess, limit):
                return size
            good, guess = size, expected()
        else:
            bad, guess = size, None
        if bad - good == 1 or (bad <= limit and bad - good <= good * resolution):
            return good
        if guess is not None:
            step = max(1, int(good * resolution))  # the largest that can fail and end the search
            nearest = min(good + stride * step, 2 * good)
            farthest = limit
            if bad <= limit:  # the smallest that can fit and end the search
                farthest = min(max(ceil(bad / (1 + resolution)), good + 1), bad - 1)
            if guess < nearest:  # more fits than expected, so stride ever further
                stride *= 2
            size = min(max(guess, nearest), farthest)
        elif bad > limit:
            size = min(2 * good, limit)
        else:
            size = (good + bad) // 2


def expected_batch(peaks: dict[int, float], free: float) -> int | None:
    """The largest batch by a straight line through two peaks, as activations and logits grow linearly with the rows.

    Args:
        peaks: GiB allocated at the peak, for each batch that fits.
        free: GiB free on the device before the first allocation.

    Returns:
        At most ``FARTHEST`` times the largest batch that fits. None if no batch is at most half as large (between
        neighbours, noise would decide), or if memory did not grow between the two.
    """
    largest = max(peaks, default=0)
    smaller = max((batch for batch in peaks if 2 * batch <= largest), default=None)
    if smaller is None or peaks[largest] <= peaks[smaller]:
        return None
    row = (peaks[largest] - peaks[smaller]) / (largest - smaller)
    return min(largest + int((free * USABLE - peaks[largest]) / row), FARTHEST * largest)
