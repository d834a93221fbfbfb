"""The measuring instrument runs: no figure is judged here, for this machine may be busy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from agent.contract import read_event
from benchmarks import events
from benchmarks.load import percentile
from benchmarks.processes import ROOT
from benchmarks.rows import Row, Target


@pytest.mark.process
def test_the_command_measures_a_figure_and_writes_it_down(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = subprocess.run(
        (
            *(sys.executable, "-m", "benchmarks", "B2", "--quick", "--rounds", "1"),
            *("--folder", str(tmp_path), "--json", str(found)),
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "executemany" in done.stdout
    (row,) = json.loads(found.read_text())["rows"]
    assert row["figure"] == "B2"
    assert row["value"] == row["agent"][0] / row["reference"][0] > 0
    assert list(tmp_path.iterdir()) == [found], "it left something behind"


@pytest.mark.process
def test_the_herd_is_shown_beside_a_naive_one(tmp_path: Path) -> None:
    done = subprocess.run(
        (
            *(sys.executable, "-m", "benchmarks.herd", "--machines", "100"),
            *("--png", str(tmp_path / "herd.png")),
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (naive,) = [line for line in done.stdout.splitlines() if "every 10 s" in line]
    assert "never" in naive


def test_each_event_of_a_load_is_another_and_such_as_the_agent_takes() -> None:
    bodies = list(events.bodies(500, seed=1))
    assert bodies == list(events.bodies(500, seed=1)), "the bare client could not post the same"
    parsed = [read_event("track", body, received_ms=0) for body in bodies]
    assert len({event.message_id for event in parsed}) == 500
    assert {len(body) for body in bodies} == {events.BODY_BYTES}
    assert 400 <= events.BODY_BYTES <= 500
    assert events.body(random.Random(2)) not in bodies


def test_a_ratio_is_of_rounds_that_ran_side_by_side() -> None:
    # In the second round the machine was busy with something else: both sides met it.
    row = Row(
        figure="B0",
        subject="of three rounds",
        unit="/s",
        agent=[80, 8, 90],
        reference=[100, 10, 100],
        target=Target(least=0.8),
    )
    assert row.value == 0.8
    assert row.values == [0.8, 0.8, 0.9]
    assert row.is_met


def test_a_percentile_is_the_slowest_of_the_rest() -> None:
    assert percentile([float(n) for n in range(1, 1001)], 99) == 990
    assert percentile([1.0], 99) == 1
    assert percentile([1.0, 2.0], 50) == 1
