"""The search for the largest batch that fits: doubling and bisection, cut short by what memory has shown so far."""

from collections.abc import Callable
from math import ceil

# Of the memory that was free: the rest is for blocks that the allocator cannot use and for what is not PyTorch's.
USABLE = 0.98
# Times the largest that fits. Where memory has hardly grown, as the peak was in the optimizer's step, the line through
# two peaks reaches too far.
FARTHEST = 8


def search(
    fits: Callable[[int], bool],
    start: int,
    limit: int,
    resolution: float = 0.0,
    expected: Callable[[], int | None] = lambda: None,
) -> int:
    """The largest number from 1 to ``limit`` that fits, or 0, assuming that whatever is smaller fits, too.

    Args:
        fits: whether a number fits; called once for each number that is tried.
        start: the first to try. It is doubled until one does not fit, or halved until one does; bisection follows.
        limit: the largest to try.
        resolution: how much larger, as a share of the result, a number that would still fit may be.
        expected: what the result should be by the numbers tried so far, or None; asked after one that fits, and tried
            next in place of the doubled one or the middle. Where it is wrong it costs trials, but the result is as
            good.
    """
    good, bad = 0, limit + 1
    size = min(start, limit)
    stride = 1
    while True:
        if fits(size):
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
            if guess < nearest:  # more fits than expected: ever longer strides
                stride *= 2
            size = min(max(guess, nearest), farthest)
        elif bad > limit:
            size = min(2 * good, limit)
        else:
            size = (good + bad) // 2


def expected_batch(peaks: dict[int, float], free: float) -> int | None:
    """The largest batch by the straight line through the peaks of two: activations and logits grow with the rows.

    Args:
        peaks: GiB allocated at the peak, for each batch that fits.
        free: GiB of the device before the first allocation.

    Returns:
        None without a batch of at most half the largest (noise would decide between neighbours), or where memory has
        not grown between the two. At most ``FARTHEST`` times the largest that fits.
    """
    largest = max(peaks, default=0)
    smaller = max((batch for batch in peaks if 2 * batch <= largest), default=None)
    if smaller is None or peaks[largest] <= peaks[smaller]:
        return None
    row = (peaks[largest] - peaks[smaller]) / (largest - smaller)
    return min(largest + int((free * USABLE - peaks[largest]) / row), FARTHEST * largest)
