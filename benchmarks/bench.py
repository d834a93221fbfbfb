"""What the figures share: how much is done, where, in how many rounds, and outboxes made before."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks import filling, load, machine
from benchmarks.load import Load
from benchmarks.processes import Agent, FigureError, free_port, running

A = TypeVar("A")
B = TypeVar("B")

_PENDING_BYTES = 1_000
"""What a pending event of ours takes on disk, rounded up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is done. Times in seconds."""

    warm_up_s: float
    load_s: float
    batched_events: int
    drained_events: int
    backlog_events: int
    latency_s: float
    settle_s: float
    idle_s: float
    slow_s: float


FULL = Scale(
    warm_up_s=1,
    load_s=5,
    batched_events=100_000,
    drained_events=100_000,
    backlog_events=1_000_000,
    latency_s=10,
    settle_s=10,
    idle_s=60,
    slow_s=60,
)

DEEP = Scale(
    warm_up_s=1,
    load_s=5,
    batched_events=100_000,
    drained_events=100_000,
    backlog_events=10_000_000,
    latency_s=60,
    settle_s=10,
    idle_s=60,
    slow_s=600,
)

QUICK = Scale(
    warm_up_s=0.2,
    load_s=1,
    batched_events=2_000,
    drained_events=2_000,
    backlog_events=10_000,
    latency_s=1,
    settle_s=1,
    idle_s=2,
    slow_s=3,
)
"""For a look at whether everything runs; its figures mean nothing."""


class Bench:
    """One run of the instrument, in a folder of its own."""

    def __init__(self, folder: Path, scale: Scale, *, rounds: int, with_wrk: bool) -> None:
        self.scale = scale
        self.rounds = rounds
        self.folder = folder
        self._with_wrk = with_wrk
        self._numbers = itertools.count()
        self._filled: dict[tuple[int, bool], Path] = {}
        self.seed = secrets.randbits(32)
        """Of the events that outboxes are filled with; the bare client posts the same."""

    # --- rounds ---

    def side_by_side(
        self, figure: str, agent: Callable[[], A], reference: Callable[[], B]
    ) -> tuple[list[A], list[B]]:
        """Measure both in turn, ABAB; return the agent's rounds and the reference's."""
        ours: list[A] = []
        theirs: list[B] = []
        for number in range(1, self.rounds + 1):
            say(f"{figure}: round {number} of {self.rounds}, reference")
            theirs.append(reference())
            say(f"{figure}: round {number} of {self.rounds}, agent")
            ours.append(agent())
        return ours, theirs

    # --- load ---

    def warm_up(self, port: int) -> None:
        load.at_full_speed(port, self.scale.warm_up_s, with_wrk=self._with_wrk).checked()

    def full_speed(self, port: int) -> Load:
        """Return what a server does at full speed; raises `FigureError` for a failed request."""
        return load.at_full_speed(port, self.scale.load_s, with_wrk=self._with_wrk).checked()

    # --- outboxes ---

    @contextmanager
    def agent(
        self,
        *,
        upstream_port: int | None = None,
        backlog: int = 0,
        mode: str = "track",
        beside_dead: bool = False,
    ) -> Iterator[Agent]:
        """Run an agent on an outbox of its own while the block runs.

        *upstream_port* None: an upstream is configured, but nobody listens there. *backlog* events
        of `seed` are pending at the start; *beside_dead*: as many for one more, where nobody does.
        """
        with (
            self.outbox(backlog, beside_dead=beside_dead) as outbox,
            self.agent_on(outbox, upstream_port, mode, beside_dead=beside_dead) as agent,
        ):
            yield agent

    @contextmanager
    def agent_on(
        self,
        outbox: Path,
        upstream_port: int | None = None,
        mode: str = "track",
        *,
        beside_dead: bool = False,
    ) -> Iterator[Agent]:
        """The same on an *outbox* that is there already, or will be when the agent makes it."""
        port = free_port() if upstream_port is None else upstream_port
        with running(outbox, upstream_port=port, mode=mode, beside_dead=beside_dead) as agent:
            yield agent

    @contextmanager
    def outbox(self, backlog: int = 0, *, beside_dead: bool = False) -> Iterator[Path]:
        """Yield the path of an outbox with *backlog* events pending (0: no file); delete it after."""
        folder = self.folder / f"{next(self._numbers)}"
        folder.mkdir()
        try:
            outbox = folder / "outbox.db"
            if backlog:
                _copy(self._with_backlog(backlog, beside_dead=beside_dead), outbox)
            yield outbox
        finally:
            shutil.rmtree(folder)

    def _with_backlog(self, count: int, *, beside_dead: bool) -> Path:
        """Return an outbox to copy, made when first asked for."""
        kind = count, beside_dead
        if kind not in self._filled:
            free = shutil.disk_usage(self.folder).free
            if (
                free < 3 * (1 + beside_dead) * count * _PENDING_BYTES
            ):  # this one, its copy, and room for both to grow
                raise FigureError(
                    f"{self.folder}: {free // machine.MIB} MB free are too few for {count} events;"
                    " choose another --folder"
                )
            say(f"filling an outbox with {count:,} events, once")
            path = self.folder / f"filled-{count}{'-twice' if beside_dead else ''}.db"
            filling.fill(path, count, self.seed, beside_dead=beside_dead)
            self._filled[kind] = path
        return self._filled[kind]


def say(progress: str) -> None:
    """Tell who waits."""
    sys.stderr.write(f"{progress}\n")
    sys.stderr.flush()


def _copy(source: Path, target: Path) -> None:
    """Copy an outbox to stable storage: its way there must not fall into the measurement."""
    shutil.copyfile(source, target)
    with target.open("rb") as copied:
        os.fsync(copied.fileno())
