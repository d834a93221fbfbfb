from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deep",
        action="store_true",
        help="run the proofs of tests/faults, tests/simulation and tests/security at full length (hours)",
    )


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Choose how much is tried: `tier(quick, deep)`, the latter with `--deep`."""
    deep = request.config.getoption("--deep")
    return lambda quick, much: much if deep else quick


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests of a module that asks for it (`LOOPS`) on uvloop, too, as the daemon does."""
    usual = {"asyncio": asyncio.new_event_loop}
    return usual | getattr(getattr(item, "module", None), "LOOPS", {})
