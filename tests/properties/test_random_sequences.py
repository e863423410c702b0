"""Random sequences of what users do to a model, on a patched and an unpatched copy: every result is the same.

A failure prints the shortest sequence found, as calls that can be pasted into a test. The long form runs more of them,
with compilation as a further step:

    make test-long                                      # 2,000 sequences; the seed is new, and printed
    LIGER_SEED=7 LIGER_SEQUENCES=500 make test-long
"""

import gc
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from sequence_changes import ChangeRules
from sequence_forwards import ForwardRules

STEPS, LONG_STEPS = 10, 12  # at most; a few sequences end early


class Sequences(ForwardRules, ChangeRules):
    """All rules."""


@pytest.fixture(autouse=True)
def cheap_garbage_collection() -> Iterator[None]:
    """Collections, of which there are many, leave out what has been imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _settings(count: int, steps: int, **options: Any) -> settings:
    return settings(
        max_examples=count, stateful_step_count=steps, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=[*HealthCheck], **options,
    )  # fmt: skip


def test_random_sequences() -> None:
    run_state_machine_as_test(Sequences, settings=_settings(60, STEPS, derandomize=True))


@pytest.mark.long
@pytest.mark.timeout(0)
def test_many_random_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    count = int(os.environ.get("LIGER_SEQUENCES", "2000"))
    number = int(os.environ.get("LIGER_SEED", random.SystemRandom().randrange(2**32)))
    begun = time.monotonic()

    class Long(Sequences):
        compiles = True

        def teardown(self) -> None:
            if self.started % 50 == 0:
                report(f"{self.started} sequences after {time.monotonic() - begun:.0f} s")

    def report(line: str) -> None:
        with capsys.disabled():
            print(f"\nLIGER_SEED={number}: {line}", file=sys.stderr, flush=True)

    report(f"{count} sequences of up to {LONG_STEPS} steps")
    run_state_machine_as_test(seed(number)(Long), settings=_settings(count, LONG_STEPS))
    report(f"{count} sequences without a difference")
