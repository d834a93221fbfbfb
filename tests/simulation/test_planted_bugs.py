"""The simulation finds what it is there to find, and says what it saw."""

from __future__ import annotations

import pytest
from simulation.machine import play
from simulation.planted import BUGS, planted

SEEDS_TO_FIND = 1_000
"""Within so many seeds every planted bug must be found; most show in the first few."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    with planted(bug):
        assert any(play(seed).complaint for seed in range(SEEDS_TO_FIND))


def test_a_complaint_tells_what_led_to_it() -> None:
    with planted("lane_of_each_event"):
        report = next(report for seed in range(100) if (report := play(seed)).complaint)
    told = report.told()
    assert "overtakes" in told.splitlines()[0]
    assert "send " in told
    assert f"simulation {report.seed} --trace" in told
