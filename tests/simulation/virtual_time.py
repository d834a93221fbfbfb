"""Time that passes only when there is nothing left to do, and an event loop that lives in it.

The `World` is an agenda of what happens when; the agent runs on a `VirtualLoop`, which lets the
world go on where others would wait. An hour takes as long as what happens in it. There is no thread,
no socket and no chance but the seed's, so that every run of a seed is the same.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import selectors
from collections.abc import Callable
from typing import Any, NamedTuple

EPOCH_MS = 1_795_000_000_000
"""The time of day at which every seed begins: a day of November 2026."""

STILL = 2_000
"""Turns of a loop in one and the same instant from which it is called hot: a burst takes dozens."""


_LATE_S = 1e-6
"""By how much a wait takes longer than asked, as every real one does. Floating point could otherwise
end it a hair before its time, again and again."""


class StuckError(Exception):
    """Nothing will ever happen again, or no end of it in one instant."""


class Note(NamedTuple):
    """A line of the trace; only one that somebody reads is put into words."""

    at_s: float
    text: str
    values: tuple[object, ...]

    def __str__(self) -> str:
        return f"{self.at_s:12.4f}  {self.text % self.values}"


class World:
    """What happens, in order; and the clocks of one machine, which may jump and sleep.

    *now_s* is the true time, which only the world knows. The machine's monotonic clock stands still
    while it sleeps, as CLOCK_MONOTONIC does; its time of day may be set wrong.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_s = 1000.0
        self.asleep = False
        self.clock_error_ms = 0
        self.clock_set_s = 0.0
        """When it was set last (true time)."""
        self.trace: list[Note] = []
        self._slept_s = 0.0
        self._entries = 0
        self._agenda: list[tuple[float, int, bool, Callable[[], None]]] = []

    def rng(self, purpose: str) -> random.Random:
        """Return chance of its own for *purpose*, so that one part's use of it changes no other's."""
        return random.Random(f"{self.seed}/{purpose}")

    def note(self, text: str, *values: object) -> None:
        """Add to the trace; *values* go into *text* when somebody reads it."""
        self.trace.append(Note(self.now_s, text, values))

    # --- the machine's clocks (agent.clock.Clock) ---

    def monotonic_s(self) -> float:
        return self.now_s - self._slept_s

    def wall_ms(self) -> int:
        return EPOCH_MS + int(self.now_s * 1000) + self.clock_error_ms

    def set_clock(self, error_ms: int) -> None:
        """Set the time of day wrong by *error_ms*."""
        self.clock_set_s = self.now_s
        self.clock_error_ms = error_ms

    # --- the agenda ---

    def after(self, wait_s: float, what: Callable[[], None]) -> None:
        """Do *what* somewhere else, whether or not the machine sleeps then."""
        self._enter(wait_s, False, what)

    def after_here(self, wait_s: float, what: Callable[[], None]) -> None:
        """Do *what* on the machine, after *wait_s* of its being awake."""
        self._enter(wait_s, True, what)

    def _enter(self, wait_s: float, here: bool, what: Callable[[], None]) -> None:
        self._entries += 1
        heapq.heappush(self._agenda, (self.now_s + wait_s, self._entries, here, what))

    def go_on(self, wait_s: float | None, is_stirred: Callable[[], bool]) -> None:
        """Let time pass until *is_stirred*, or for *wait_s* of the machine's being awake."""
        until_s = None if wait_s is None else self.monotonic_s() + wait_s + _LATE_S
        while True:
            # Anew each time: the machine may have slept.
            end_s = None if until_s is None else until_s + self._slept_s
            if not self._agenda or (end_s is not None and self._agenda[0][0] > end_s):
                if end_s is None:
                    raise StuckError("nothing will ever happen again")
                self.now_s = max(self.now_s, end_s)
                return
            self._do_next()
            if is_stirred():
                return

    def _do_next(self) -> None:
        at_s, _, _, what = heapq.heappop(self._agenda)
        self.now_s = max(self.now_s, at_s)
        what()

    def sleep(self, for_s: float) -> None:
        """Suspend the machine: what happens elsewhere goes on."""
        self.asleep = True
        wake_s = self.now_s + for_s
        here = [entry for entry in self._agenda if entry[2]]
        self._agenda = [entry for entry in self._agenda if not entry[2]]
        heapq.heapify(self._agenda)
        while self._agenda and self._agenda[0][0] <= wake_s:
            self._do_next()
        self.now_s = wake_s
        self._slept_s += for_s
        for at_s, entry, _, what in here:
            heapq.heappush(self._agenda, (at_s + for_s, entry, True, what))
        self.asleep = False


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop for one life of the agent. *on_turn* is called at each turn, before its waiting."""

    def __init__(self, world: World, on_turn: Callable[[], None]) -> None:
        self._world = world
        self._on_turn = on_turn
        self._stirred = False
        self._dead_s: float | None = None
        self._still = 0
        self._still_since_s = -1.0
        super().__init__(_Patience(self._wait))

    def time(self) -> float:
        return self._world.monotonic_s() if self._dead_s is None else self._dead_s

    def call_soon(  # type: ignore[override]  # how it says it differs from version to version
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        self._stirred = True
        return super().call_soon(callback, *args, context=context)

    def stop(self) -> None:
        self._stirred = True
        super().stop()

    def bury(self) -> None:
        """End what is left of a life without any effect on the world: time is the loop's own now."""
        self._dead_s = self._world.monotonic_s()
        while pending := sorted(asyncio.all_tasks(self), key=lambda each: each.get_name()):
            for each in pending:
                each.cancel()
            self.call_later(60.0, self.stop)
            self.run_forever()
        self.close()

    def _wait(self, timeout: float | None) -> None:
        if self._dead_s is not None:
            self._dead_s += timeout or 0.0
            return
        self._stirred = False
        self._on_turn()
        if self._world.now_s == self._still_since_s:
            self._still += 1
            if self._still > STILL:
                raise StuckError(f"a hot loop: {STILL} turns without any time passing")
        else:
            self._still, self._still_since_s = 0, self._world.now_s
        if (timeout is None or timeout > 0) and not self._stirred:
            self._world.go_on(timeout, self._is_stirred)

    def _is_stirred(self) -> bool:
        return self._stirred


class _Patience(selectors.SelectSelector):
    """Has only the loop's own wake-up pipe to look after, which nobody uses; waits in virtual time."""

    def __init__(self, wait: Callable[[float | None], None]) -> None:
        super().__init__()
        self._pass_time = wait

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._pass_time(timeout)
        return []
