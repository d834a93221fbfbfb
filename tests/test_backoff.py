"""The wait grows with each failure, spreads over its whole range and never leaves it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.forward.backoff import Backoff

DEFAULT = Backoff(base_s=1.0, cap_s=300.0)


@settings(max_examples=200, deadline=None)
@given(
    base_s=st.floats(1e-3, 60.0),
    cap_s=st.floats(1e-3, 86_400.0),
    n=st.integers(1, 10**9),
    seed=st.integers(),
)
def test_a_wait_stays_between_zero_and_both_bounds(
    base_s: float, cap_s: float, n: int, seed: int
) -> None:
    wait_s = Backoff(base_s=base_s, cap_s=cap_s).wait_s(n, random.Random(seed))
    assert 0.0 <= wait_s <= cap_s
    assert n > 40 or wait_s <= base_s * 2 ** (n - 1)


def test_the_range_doubles_with_each_failure_up_to_the_cap() -> None:
    rng = random.Random(7)
    widest_s = [max(DEFAULT.wait_s(n, rng) for _ in range(2000)) for n in range(1, 12)]
    for found_s, bound_s in zip(
        widest_s, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300], strict=True
    ):
        assert 0.95 * bound_s < found_s <= bound_s


def test_the_jitter_is_full_so_that_machines_do_not_come_back_together() -> None:
    rng = random.Random(7)
    waits_s = sorted(DEFAULT.wait_s(20, rng) for _ in range(2000))
    assert waits_s[0] < 5
    assert 130 < sum(waits_s) / len(waits_s) < 170
    assert waits_s[-1] > 295


def test_the_same_randomness_gives_the_same_waits() -> None:
    first, again = random.Random(1), random.Random(1)
    assert [DEFAULT.wait_s(n, first) for n in range(1, 50)] == [
        DEFAULT.wait_s(n, again) for n in range(1, 50)
    ]
