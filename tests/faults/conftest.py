"""Two tiers of every proof: quick ones in the test command, deep ones on request.

.venv/bin/python -m pytest tests/faults --deep
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Choose how much is tried: `tier(quick, deep)`."""
    deep = request.config.getoption("--deep")
    return lambda quick, much: much if deep else quick
