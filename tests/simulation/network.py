"""The way to the upstream, and the upstream: slow, cut, refused, limited, taken over, and back again.

A request is sent, arrives, is answered, and the answer comes back, each at its own instant; a fault
meets whatever passes while it lasts. What the client makes of it is said by the agent's own
`forward.upstream` and `forward.disposition`. The upstream keeps the contract: it does not
deduplicate, validates a batch as a whole, and stores it piece by piece.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterable
from email.utils import formatdate

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from multidict import CIMultiDict
from simulation.judge import Judge
from simulation.scenario import Choices, Fault, Kind
from simulation.tracked import Attempt, Tracked
from simulation.virtual_time import EPOCH_MS, VirtualLoop, World

from agent.contract import MAX_BODY_BYTES
from agent.forward import upstream as client
from agent.forward.disposition import Outcome, Response, classify

_KEY = ConnectionKey("upstream.test", 443, True, True, None, None, None)

NARROW_BYTES = 6_000
"""What a narrow proxy lets through: any event alone, and few of the large ones together."""

_HTML = {"Content-Type": "text/html"}


class Weather:
    """Which faults there are right now."""

    def __init__(self, world: World, faults: Iterable[Fault]) -> None:
        self._world = world
        self._rng = world.rng("weather")
        self._now: list[Fault] = []
        for fault in faults:
            world.after(fault.start_s - world.now_s, lambda fault=fault: self._begin(fault))  # type: ignore[misc]
            world.after(fault.end_s - world.now_s, lambda fault=fault: self._end(fault))  # type: ignore[misc]

    def _begin(self, fault: Fault) -> None:
        self._world.note("%s begins, share %s", fault.kind, fault.share)
        self._now.append(fault)

    def _end(self, fault: Fault) -> None:
        self._world.note("%s ends", fault.kind)
        self._now.remove(fault)

    def meets(self, *kinds: Kind) -> Fault | None:
        """Return the fault of one of *kinds* that this request meets now, or None."""
        if not self._now:
            return None
        for fault in self._now:
            if fault.kind in kinds and (fault.share == 1.0 or self._rng.random() < fault.share):
                return fault
        return None


class Upstream:
    """The server, seen from the network."""

    def __init__(self, world: World, weather: Weather, judge: Judge, *, names: bool) -> None:
        """*names*: it says which event of a batch it refuses."""
        self._world = world
        self._weather = weather
        self._judge = judge
        self._names = names
        self._rng = world.rng("upstream")
        self._passed: dict[tuple[float, int], int] = {}
        """How many passed a limit in its current period."""

    def answer(self, attempt: Attempt, body: bytes) -> tuple[Response, float | None]:
        """Take a request that arrived; return the answer, and until when nothing would pass (true time)."""
        if fault := self._weather.meets("portal"):
            return _portal(fault.style), None
        fault = self._weather.meets("limited")
        if fault is not None and (limited := self._limit(fault)) is not None:
            return limited
        fault = self._weather.meets("narrow")
        if fault is not None and len(body) > NARROW_BYTES:
            return _response(413, "<html>too large", _HTML), None
        if fault := self._weather.meets("busy"):
            return _response((502, 503, 504)[fault.style % 3], "upstream busy"), None
        if self._weather.meets("moved"):
            return _response(404, '{"message":"Route not found"}'), None
        return self._refusal(attempt, body) or self._store(attempt), None

    def _refusal(self, attempt: Attempt, body: bytes) -> Response | None:
        """Return what a firewall, then the server, has against a request; all of it or none is at fault."""
        now_s = self._world.now_s
        if len(body) > MAX_BODY_BYTES:
            return _response(413, '{"message":"Request body is too large"}')
        natures = [each.post.nature for each in attempt.events if each.is_of_its_nature(now_s)]
        if "disliked" in natures:
            return _response(403, "<html>blocked</html>", _HTML)
        for i, each in enumerate(attempt.events):
            if each.post.nature == "refused":
                self._judge.refused_upstream(each)
                where = f"body/batch/{i}" if self._names and attempt.batched else "body"
                return _response(400, f'{{"message":"{where} must be nicer"}}')
        if self._weather.meets("revoked"):
            return _response(401, '{"message":"Invalid write key."}')
        return None

    def _store(self, attempt: Attempt) -> Response:
        now_s = self._world.now_s
        broken = self._weather.meets("broken") is not None
        for each in attempt.events:
            fails = each.post.nature == "fails" and each.is_of_its_nature(now_s)
            if fails or (broken and self._rng.random() < 1 / len(attempt.events)):
                return _response(500, '{"message":"Internal Server Error"}')
            self._judge.stored_upstream(attempt, each)
        return _response(204, "")

    def _limit(self, fault: Fault) -> tuple[Response, float | None] | None:
        """Return 429 with Retry-After, up to when the next period begins; None while some may pass."""
        now_s = self._world.now_s
        period = math.floor((now_s - fault.start_s) / fault.period_s)
        passed = self._passed.get((fault.start_s, period), 0)
        if passed < fault.style % 4:
            self._passed = {(fault.start_s, period): passed + 1}
            return None
        resets_s = min(fault.start_s + (period + 1) * fault.period_s, fault.end_s)
        wait_s = max(0.0, math.ceil(resets_s - now_s))
        status = 429 if fault.style % 5 else 503
        if self._rng.random() < 0.2:  # not every server behind one name says when
            return _response(status, "slow down"), None
        match fault.style % 7:
            case 0:
                return _response(status, "slow down", {"Retry-After": "soon"}), None
            case 1:
                date_s = math.ceil(EPOCH_MS / 1000 + resets_s)
                header = {"Retry-After": formatdate(date_s, usegmt=True)}
                return _response(status, "slow down", header), resets_s
            case 2 if fault.style % 11 == 0:
                return _response(status, "slow down", {"Retry-After": "864000"}), now_s + 864_000.0
            case _:
                return _response(status, "", {"Retry-After": f"{wait_s:.0f}"}), resets_s


class Link:
    """One life's way to the upstream: what the forwarder calls. *latency_s* is typical of one way."""

    def __init__(
        self,
        *,
        world: World,
        weather: Weather,
        upstream: Upstream,
        judge: Judge,
        choices: Choices,
        latency_s: float,
        loop: VirtualLoop,
    ) -> None:
        self._world = world
        self._weather = weather
        self._upstream = upstream
        self._judge = judge
        self._choices = choices
        self._latency_s = latency_s
        self._loop = loop
        self._rng: random.Random = world.rng(f"network/{judge.lives}")
        self._waiting: dict[asyncio.Future[Outcome], bool] = {}
        """Who waits for an answer, and whether anything was sent."""
        self._dead = False

    async def send(self, endpoint: str, body: bytes) -> Outcome:
        """Try once to deliver *body*, as `HttpUpstream` does."""
        answered: asyncio.Future[Outcome] = self._loop.create_future()
        self._judge.acted()
        if self._dead:
            return await answered
        attempt = self._judge.sent(endpoint, body)
        self._begin(attempt, body, answered)
        try:
            outcome = await answered
        finally:
            self._waiting.pop(answered, None)
        self._judge.answered(attempt, outcome)
        return outcome

    def crash(self) -> None:
        """Nobody listens any more; what was sent goes its way."""
        self._dead = True
        self._waiting.clear()

    def cut(self) -> None:
        """Break every connection: the machine slept."""
        for answered, was_sent in list(self._waiting.items()):
            broken = aiohttp.ServerDisconnectedError() if was_sent else _no_connection()
            self._hear(answered, client._outcome_of(broken))

    # --- one request, step by step ---

    def _begin(self, attempt: Attempt, body: bytes, answered: asyncio.Future[Outcome]) -> None:
        self._waiting[answered] = False
        if fault := self._weather.meets("unreachable", "swallowed"):
            if fault.kind == "swallowed":
                too_long = aiohttp.ConnectionTimeoutError()
                self._give_up(answered, self._choices.connect_timeout_s, too_long)
            else:
                self._fail(answered, _no_connection())
            return
        self._waiting[answered] = True
        self._give_up(answered, self._choices.timeout_s, TimeoutError())
        cut = self._weather.meets("cut_before") is not None
        arrives_s = self._trip_s()
        if self._rng.random() < 0.05:
            arrives_s += self._rng.random()  # a connection had to be made first
        self._world.after(arrives_s, lambda: self._arrive(attempt, body, answered, cut=cut))

    def _arrive(
        self, attempt: Attempt, body: bytes, answered: asyncio.Future[Outcome], *, cut: bool
    ) -> None:
        if cut or self._is_lost() or any(self._breaks(each) for each in attempt.events):
            self._break(answered)
            return
        response, until_s = self._upstream.answer(attempt, body)
        if self._weather.meets("cut_after"):
            self._break(answered)
            return
        if fault := self._weather.meets("gateway"):
            response, until_s = _response((502, 504)[fault.style % 2], "<html>", _HTML), None
        self._world.after(
            self._works_s() + self._trip_s(),
            lambda: self._come_back(attempt, answered, response, until_s),
        )

    def _come_back(
        self,
        attempt: Attempt,
        answered: asyncio.Future[Outcome],
        response: Response,
        until_s: float | None,
    ) -> None:
        world = self._world
        if world.asleep or self._dead:
            return  # `cut` tells the client
        if self._is_lost():
            self._break(answered)
            return
        is_date = not response.headers.get("Retry-After", "").isdigit()
        # A date is read by a clock that may be wrong.
        if until_s is not None and not answered.done() and not (is_date and world.clock_error_ms):
            attempt.wait_s = until_s - world.now_s
        self._hear(answered, classify(response, now_ms=world.wall_ms()))

    def _breaks(self, tracked: Tracked) -> bool:
        return tracked.post.nature == "cuts" and tracked.is_of_its_nature(self._world.now_s)

    def _is_lost(self) -> bool:
        return self._weather.meets("unreachable", "swallowed") is not None

    def _trip_s(self) -> float:
        return self._latency_s * self._rng.uniform(0.5, 1.5)

    def _works_s(self) -> float:
        """Return how long the upstream works on an answer."""
        if self._weather.meets("slow"):
            return self._rng.choice((1.0, 4.0, 20.0)) * self._rng.uniform(0.5, 2.0)
        return self._rng.expovariate(100.0)

    def _break(self, answered: asyncio.Future[Outcome]) -> None:
        """Break the connection; at times without a word, and the client waits for its time-out."""
        chance = self._rng.random()
        if chance < 0.3:
            self._fail(answered, aiohttp.ServerDisconnectedError())
        elif chance < 0.7:
            self._fail(answered, aiohttp.ClientOSError(104, "Connection reset by peer"))

    def _fail(self, answered: asyncio.Future[Outcome], exc: Exception) -> None:
        outcome = client._outcome_of(exc)
        self._world.after_here(self._trip_s(), lambda: self._hear(answered, outcome))

    def _give_up(self, answered: asyncio.Future[Outcome], wait_s: float, exc: Exception) -> None:
        timer = self._loop.call_later(wait_s, self._hear, answered, client._outcome_of(exc))
        answered.add_done_callback(lambda _: timer.cancel())

    def _hear(self, answered: asyncio.Future[Outcome], outcome: Outcome) -> None:
        if not answered.done() and not self._dead:
            answered.set_result(outcome)


def _no_connection() -> Exception:
    return aiohttp.ClientConnectorError(_KEY, OSError(111, "Connection refused"))


def _portal(style: int) -> Response:
    match style % 3:
        case 0:
            return _response(200, "<html>Welcome, please log in</html>", _HTML)
        case 1:
            return _response(302, "", {"Location": "http://portal.test/"})
        case _:
            return _response(511, "<html>log in</html>", _HTML)


def _response(status: int, body: str, headers: dict[str, str] | None = None) -> Response:
    return Response(status=status, headers=CIMultiDict(headers or {}), body=body.encode())
