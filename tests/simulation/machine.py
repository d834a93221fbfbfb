"""One machine from its first event to the last: the agent's lives, the apps, and what befalls them.

`play` runs a seed and returns what became of it. What is real: the forwarder with its lanes, breaker,
backoff and disposition, the store's verbs, the reader's queries, the translation of what the network
does. What is not: time, threads, sockets and the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
from simulation.judge import Judge, ObservedBackoff
from simulation.network import Link, Upstream, Weather
from simulation.outbox import Disk, SimulatedReader, SimulatedWriter
from simulation.scenario import (
    OPEN_MIN,
    PERIOD_MIN,
    URGENT,
    Deed,
    Post,
    Scenario,
    Stroke,
    draw,
)
from simulation.tracked import Tracked
from simulation.virtual_time import Note, StuckError, VirtualLoop, World
from structlog.testing import capture_logs

from agent.event import Event, lane_of
from agent.forward import lanes, supply
from agent.forward.forwarder import Forwarder, forwarding
from agent.forward.lanes import Lanes
from agent.forward.plan import Plan
from agent.forward.tally import TALLY_BYTES, Tally
from agent.outbox import letters
from agent.outbox.store import Store

MONTH_MS = 30 * 86_400_000

RESTS_S = 200.0
"""How long the agent rests at most when the upstream is slow."""

SETTLED_S = 60.0
"""After so long an agent has looked for what there is to do, and apps have posted once more."""

QUIET_S = 600.0
"""How long the agent is watched doing nothing when there is nothing to do."""

STEPS = 60
"""Turns and actions within which an announced crash strikes: at any await, between any two actions."""

IDLE_S = 60.0
"""How long such a crash waits for them."""

LAST_EVENTS = 30
"""Lines of the trace that tell what led to a complaint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a seed. *complaint* is empty if all held."""

    seed: int
    complaint: str
    trace: Sequence[Note]
    events: int
    attempts: int
    lives: int
    stored_twice: int

    def told(self) -> str:
        """Return what a person needs to see of it."""
        last = "\n".join(map(str, self.trace[-LAST_EVENTS:]))
        return (
            f"seed {self.seed}: {self.complaint}\n{last}\n"
            f"replay, in tests: ../.venv/bin/python -m simulation {self.seed} --trace"
        )


def play(seed: int) -> Report:
    """Run *seed* to its end, or to the first thing that does not hold."""
    machine = Machine(seed)
    with capture_logs(), small(machine.scenario.choices.window):
        return machine.run()


@contextmanager
def small(window: int | None) -> Iterator[None]:
    """Have the agent hold *window* events in memory, so that few fill it; None: as it is built."""
    with pytest.MonkeyPatch.context() as patch:
        if window is not None:
            patch.setattr(supply, "SCAN", window // 2)
            patch.setattr(supply, "COUNTED", window)
            patch.setattr(supply, "PER_LANE", 2)
            patch.setattr(lanes, "AHEAD", window)
            sizes = {**(Lanes.__init__.__kwdefaults__ or {}), "window": window, "per_lane": 2}
            patch.setattr(Lanes.__init__, "__kwdefaults__", sizes)
        yield


def make_forwarder(
    *,
    scenario: Scenario,
    writer: SimulatedWriter,
    reader: SimulatedReader,
    link: Link,
    backoff: ObservedBackoff,
    world: World,
    rng: random.Random,
    paused: bool,
    tally: Tally,
) -> Forwarder:
    """Return the real forwarder among stand-ins. The one place that knows how it is made."""
    choices = scenario.choices
    return Forwarder(
        writer=cast(Any, writer),
        reader=reader,
        upstream=link,
        plan=Plan(
            concurrency=choices.concurrency,
            ordered=choices.ordered,
            backoff=backoff,
            give_up=choices.give_up,
            hold_probe_s=choices.hold_probe_s,
            batch=choices.batch,
            budget=choices.budget,
            urgent=(URGENT,) if choices.budget.windows else (),
        ),
        tally=tally,
        clock=world,
        rng=rng,
        paused=paused,
    )


class Machine:
    """See the module."""

    def __init__(self, seed: int) -> None:
        self._world = world = World(seed)
        self.scenario = scenario = draw(world)
        self._judge = Judge(world, scenario.choices, self._stop, self._step)
        self._weather = Weather(world, scenario.faults)
        self._upstream = Upstream(world, self._weather, self._judge, names=scenario.choices.names)
        self._rng = world.rng("machine")
        self._disk = Disk()
        self._tally_file = bytearray(TALLY_BYTES)
        """What is kept of the tally: it outlives a killed agent, as it is at that moment."""
        self._unanswered = len(scenario.posts)
        self._refused: list[Callable[[], None]] = []
        """Apps that found no agent, or none that lived to answer."""
        self._paused = False
        self._calm = False
        self._over = False
        self._down_s = 0.0
        """How long the agent stays away after this life."""
        self._steps_left = 0
        self._wait_for_end = False
        self._deeds: dict[Deed, Callable[[Stroke], None]] = {
            "crash": self._crash,
            "restart": self._restart,
            "suspend": self._suspend,
            "set_clock": self._set_clock,
            "pause": self._pause_a_while,
            "flush": self._flush,
            "expire": self._expire,
            "evict": self._evict,
            "requeue": self._requeue,
        }
        # Of the current life:
        self._born_s = world.now_s
        self._loop: VirtualLoop | None = None
        self._writer: SimulatedWriter | None = None
        self._link: Link | None = None
        self._forwarder: Forwarder | None = None
        self._leave: asyncio.Event | None = None
        for post in scenario.posts:
            self._plan_post(post)
        for stroke in scenario.strokes:
            world.after_here(stroke.at_s - world.now_s, lambda stroke=stroke: self._strike(stroke))  # type: ignore[misc]
        world.after_here(scenario.calm_s - world.now_s, self._calm_down)

    def run(self) -> Report:
        """Live one life after another until the end of the scenario."""
        try:
            while not self._over:
                self._live()
                self._stay_away()
            if self._judge.complaint is None:
                self._judge.conclude(self._disk.db)
        finally:
            self._disk.close()
        world, judge = self._world, self._judge
        return Report(
            seed=world.seed,
            complaint=judge.complaint or "",
            trace=world.trace,
            events=len(self.scenario.posts),
            attempts=judge.attempts,
            lives=judge.lives,
            stored_twice=judge.stored_twice,
        )

    # --- a life ---

    def _live(self) -> None:
        world, judge = self._world, self._judge
        world.note("the agent starts, life %s", judge.lives)
        self._born_s = world.now_s
        refused, self._refused = self._refused, []
        for hand_in in refused:
            world.after_here(20.0 * self._rng.random(), hand_in)
        self._loop = loop = VirtualLoop(world, self._turn)
        loop.set_exception_handler(self._be_told)
        task = loop.create_task(self._be_agent(loop))
        task.add_done_callback(lambda _: loop.stop())
        try:
            loop.run_forever()
        except StuckError as exc:
            judge.complain(str(exc))
        if not task.done():
            self._die()
        elif task.exception() is None:
            self._die(in_order=True)
        else:
            judge.complain(f"the agent died of {_innermost(task.exception())!r}")
            self._die()
        loop.bury()

    async def _be_agent(self, loop: VirtualLoop) -> None:
        world, judge, scenario = self._world, self._judge, self.scenario
        choices = scenario.choices
        self._writer = SimulatedWriter(
            self._disk, world, judge, commit_s=scenario.commit_s, remembers=choices.remembers
        )
        self._link = Link(
            world=world,
            weather=self._weather,
            upstream=self._upstream,
            judge=judge,
            choices=choices,
            latency_s=scenario.latency_s,
            loop=loop,
        )
        backoff = ObservedBackoff(base_s=choices.base_s, cap_s=choices.cap_s)
        object.__setattr__(backoff, "judge", judge)
        self._forwarder = forwarder = make_forwarder(
            scenario=scenario,
            writer=self._writer,
            reader=SimulatedReader(self._disk, world, judge, self._is_unreadable),
            link=self._link,
            backoff=backoff,
            world=world,
            rng=world.rng(f"forwarder/{judge.lives}"),
            paused=self._paused,
            tally=self._open_tally(),
        )
        judge.born(forwarder, paused=self._paused)
        self._leave = asyncio.Event()
        async with forwarding(forwarder):
            await self._leave.wait()

    def _open_tally(self) -> Tally:
        file = self._tally_file

        def keep(at: int, piece: bytes) -> None:
            file[at : at + len(piece)] = piece

        return Tally(bytearray(file), keep)

    def _is_unreadable(self) -> bool:
        return self._weather.meets("unreadable") is not None

    def _turn(self) -> None:
        self._judge.turned()
        self._step()

    def _step(self) -> None:
        """A turn of the loop, or something that the agent does in one: a crash may come before it."""
        if self._steps_left > 0:
            self._steps_left -= 1
            if not self._steps_left:
                self._world.note("crash")
                self._stop()

    def _stop(self) -> None:
        """End this life in the middle of whatever it does: nothing that it still does has an effect."""
        self._tally_file = bytearray(self._tally_file)
        if self._link is not None:
            self._link.crash()
        if self._writer is not None:
            self._writer.stop()
        if self._loop is not None:
            self._loop.stop()

    def _die(self, *, in_order: bool = False) -> None:
        if self._link is not None:
            self._link.crash()
        if self._writer is not None and in_order:
            self._writer.close()
        elif self._writer is not None:
            self._writer.crash(committed=self._rng.random() < 0.5)
        self._judge.died()
        self._judge.books.audit(self._disk.db)
        self._loop = self._writer = self._link = self._forwarder = self._leave = None
        self._steps_left = 0

    def _stay_away(self) -> None:
        """Let the world go on without an agent."""
        down_s, self._down_s = self._down_s, 0.0
        if self._judge.complaint is not None:
            self._over = True
        elif not self._over:
            world = self._world
            at_most_s = max(0.5, self.scenario.calm_s - world.now_s)
            world.go_on(min(down_s, at_most_s), lambda: False)

    def _be_told(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._judge.complain(f"the event loop complains: {context}")

    # --- the apps ---

    def _plan_post(self, post: Post) -> None:
        world = self._world
        name, user = f"m{post.number}", f"u{post.user}"
        tracked = Tracked(post=post, message_id=name, user=user)
        self._judge.books.tracked[name] = tracked
        sent = f'{{"messageId":"{name}","event":"{post.name}","userId":"{user}","properties":{{"pad":"{"x" * post.size}"}}'
        digest = hashlib.blake2b(sent.encode(), digest_size=16).digest()
        lane = lane_of(user_id=user, anonymous_id=None)

        def hand_in(*, again: bool) -> None:
            now_ms = world.wall_ms()
            event = Event(
                message_id=name,
                kind="track",
                lane=lane,
                digest=digest,
                received_ms=now_ms,
                body=f'{sent},"timestamp":"{now_ms}"}}'.encode(),
            )

            def hear(stored: bool) -> None:
                if not stored:
                    self._refused.append(lambda: hand_in(again=again))
                elif not again:
                    self._unanswered -= 1
                    self._look_for_end()

            if self._writer is None:
                hear(False)
            else:
                self._writer.append(event, hear)

        world.after_here(post.at_s - world.now_s, lambda: hand_in(again=False))
        if post.again_s is not None:
            again_s = max(post.at_s, post.again_s)
            world.after_here(again_s - world.now_s, lambda: hand_in(again=True))

    # --- what befalls the machine ---

    def _strike(self, stroke: Stroke) -> None:
        if not self._calm:
            self._world.note("%s for %.1f s", stroke.deed, stroke.for_s)
            self._deeds[stroke.deed](stroke)

    def _crash(self, stroke: Stroke) -> None:
        """Strike a few steps from now: while there is work, at any await and between any two of them."""
        if self._loop is not None:
            self._down_s = stroke.for_s
            self._steps_left = 1 + stroke.style % STEPS
            lives = self._judge.lives
            self._world.after_here(IDLE_S, lambda: self._crash_if_idle(lives))

    def _restart(self, stroke: Stroke) -> None:
        if self._leave is not None:
            self._down_s = stroke.for_s
            self._leave.set()
            self._judge.asked(leaving=True)

    def _suspend(self, stroke: Stroke) -> None:
        self._world.sleep(stroke.for_s * 10)
        if self._link is not None:
            self._link.cut()

    def _set_clock(self, stroke: Stroke) -> None:
        self._world.set_clock((-MONTH_MS, 0, MONTH_MS, 3_600_000)[stroke.style % 4])

    def _pause_a_while(self, stroke: Stroke) -> None:
        self._pause()
        self._world.after_here(stroke.for_s, self._resume)

    def _expire(self, stroke: Stroke) -> None:
        now_ms = self._world.wall_ms()
        cutoff_ms = now_ms - int(stroke.for_s * 1000)
        self._perform(lambda store: store.expire(cutoff_ms, now_ms=now_ms, limit=500))

    def _evict(self, stroke: Stroke) -> None:
        self._perform(lambda store: store.evict(stroke.style * 10, limit=500))

    def _requeue(self, stroke: Stroke) -> None:
        now_ms = self._world.wall_ms()
        rows = self._disk.db.execute("SELECT seq FROM dead ORDER BY seq")
        seqs = [seq for (seq,) in rows]
        self._perform(lambda store: letters.requeue(store, seqs, now_ms=now_ms))

    def _crash_if_idle(self, lives: int) -> None:
        """An agent that has little to do is struck all the same."""
        if self._steps_left and self._judge.lives == lives:
            self._steps_left = 0
            self._world.note("crash while idle")
            self._stop()

    def _perform(self, verb: Callable[[Store], object]) -> None:
        if self._writer is not None:
            self._writer.perform(verb)

    def _pause(self) -> None:
        self._paused = True
        if self._forwarder is not None:
            self._forwarder.pause()
            self._judge.asked(paused=True)

    def _resume(self) -> None:
        self._paused = False
        if self._forwarder is not None:
            self._forwarder.resume()
            self._judge.asked(paused=False)

    def _flush(self, stroke: Stroke) -> None:
        if self._forwarder is not None:
            self._judge.asked(flushed=True)
            self._forwarder.flush()

    # --- the end ---

    def _calm_down(self) -> None:
        """From now on nothing goes wrong; in a bounded time nothing may be left to do."""
        world, scenario = self._world, self.scenario
        world.note("calm")
        self._resume()
        choices = scenario.choices
        hopeless = sum(post.nature == "fails" and post.until_s is None for post in scenario.posts)
        patience_s = choices.give_up.unproven_after_s + choices.give_up.attempts * choices.cap_s
        # What a hopeless event was sent with waits until it is found among them.
        rounds = 10 if choices.batch == 1 else 40
        bound_s = (
            self._judge.waits_s
            + rounds * choices.cap_s
            + 5 * choices.hold_probe_s
            + 5.0 * len(scenario.posts)
            + RESTS_S
        )
        if choices.budget.windows:
            share = PERIOD_MIN / OPEN_MIN
            bound_s, patience_s = bound_s * share + 60.0 * PERIOD_MIN, patience_s * share
        if choices.budget.events_per_s:
            bound_s += 5 * len(scenario.posts) / choices.budget.events_per_s
        self._calm = True
        world.after_here(bound_s, self._judge.expect_only_the_hopeless)
        world.after_here(bound_s + hopeless * patience_s, self._run_out_of_time)
        self._look_for_end()

    def _look_for_end(self) -> None:
        """After each change: whether everything is done."""
        if self._calm and not self._wait_for_end and not self._unanswered:
            if self._judge.books.pending:
                self._world.after_here(10.0, self._look_for_end)
                return
            self._wait_for_end = True
            self._world.note("nothing is left to do")
            # What expired while it waited is looked at once more when its wait ends.
            choices = self.scenario.choices
            waits_s = self._judge.waits_s + choices.cap_s + choices.hold_probe_s + RESTS_S
            if choices.budget.windows:
                waits_s += 60.0 * PERIOD_MIN
            self._world.after_here(SETTLED_S + waits_s, self._be_quiet)

    def _be_quiet(self) -> None:
        if self._forwarder is None or self._world.now_s < self._born_s + SETTLED_S:
            self._world.after_here(SETTLED_S, self._be_quiet)
            return
        self._judge.quiet = True
        self._world.after_here(QUIET_S, self._finish)

    def _run_out_of_time(self) -> None:
        if not self._wait_for_end:
            flow = None if self._forwarder is None else self._forwarder.flow()
            self._judge.complain(
                f"{self._judge.books.pending} events are not delivered in time: {flow}"
            )
            self._finish()

    def _finish(self) -> None:
        self._over = True
        self._stop()


def _innermost(exc: BaseException | None) -> BaseException | None:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
