"""Receipts: where one event stands, what it waits for, and waiting until it is settled.

Planted bugs that these tests were seen to find: a waiter that no commit wakes, one that is woken by
its own event alone and not by an eviction, a wait that begins after the last look, one that the end
of the agent does not end, a client that is gone and still counted.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from processes import AgentProcess, running_agent

from agent.clock import SystemClock
from agent.console.control import PREFIX, Control
from agent.console.receipts import WAIT_MAX_S, wait_s
from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.contract import read_event
from agent.flow import Flow, Wait
from agent.forward.claims import Claim
from agent.forward.lanes import Lanes, Place
from agent.forward.waits import wait_of
from agent.ingest.connection import Deadlines
from agent.ingest.guard import Guard
from agent.ingest.routes import Mount, Routes
from agent.ingest.server import serving
from agent.outbox.access import open_own_reader
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, Bury, Head, Policy, Receipt
from agent.outbox.waiters import WAITERS
from agent.outbox.writer import Writer, open_writer

DEADLINE_S = 30.0

WAIT_S = 20
"""How long a wait may take that is ended by a commit; one that nothing ends is answered as pending."""


def track(message_id: str, user: str = "ann") -> dict[str, Any]:
    return {"messageId": message_id, "event": "Paid", "userId": user}


def upstream(sandbox: Sandbox, key: str = DEFAULT_WRITE_KEY) -> str:
    return f'url = "{sandbox.url}"\nwrite_key = "{key}"'


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # the kernel tells nobody that a client is gone
            await asyncio.sleep(0.005)


# --- with the real daemon --------------------------------------------------------------------------


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    stand_in = Sandbox()
    async with stand_in.serving():
        yield stand_in


@pytest.fixture
async def agent(tmp_path: Path, sandbox: Sandbox) -> AsyncIterator[AgentProcess]:
    async with running_agent(tmp_path, upstream=upstream(sandbox)) as process:
        yield process


@asynccontextmanager
async def waiting(agent: AgentProcess, path: str) -> AsyncIterator[asyncio.Task[dict[str, Any]]]:
    """Yield a request that waits by now.

    Its two looks at the outbox stand in one line with those of `status`, which are more than two.
    """
    async with asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(agent.ask("GET", path))
        await asyncio.sleep(0)
        for _ in range(3):
            await agent.status()
        assert not asked.done()
        yield asked


@pytest.mark.process
async def test_a_wait_ends_with_the_delivery(agent: AgentProcess) -> None:
    await agent.ask("POST", "pause")
    await agent.post(track("m-1"))

    async with waiting(agent, f"events/m-1?wait={WAIT_S}") as asked:
        await agent.ask("POST", "resume")

    told = asked.result()
    assert (told["state"], told["waitsFor"]) == ("delivered", None)
    assert told["settledAt"] >= told["acceptedAt"]


@pytest.mark.process
async def test_a_wait_ends_when_the_event_is_set_aside(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="status", status=422, body={"message": "no such thing"})
    await agent.ask("POST", "pause")
    await agent.post(track("m-1"))

    async with waiting(agent, f"events/m-1?wait={WAIT_S}s") as asked:
        await agent.ask("POST", "resume")

    told = asked.result()
    assert (told["state"], told["reason"]) == ("dead", "rejected")
    assert (told["status"], told["answer"], told["attempts"]) == (422, "no such thing", 1)


@pytest.mark.process
async def test_a_wait_for_a_requeued_event_ends_with_its_delivery(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="status", status=422, times=1)
    await agent.post(track("m-1"))
    assert (await agent.ask("GET", f"events/m-1?wait={WAIT_S}"))["state"] == "dead"
    await agent.ask("POST", "pause")
    await agent.ask("POST", "dead/requeue", {"all": True})

    async with waiting(agent, f"events/m-1?wait={WAIT_S}") as asked:
        await agent.ask("POST", "resume")

    assert asked.result()["state"] == "delivered"


@pytest.mark.process
async def test_what_is_settled_or_unknown_is_answered_at_once(agent: AgentProcess) -> None:
    await agent.post(track("m-1"))
    await agent.until(lambda status: bool(status["delivered"] == 1))

    # Longer than these tests wait for anything.
    assert (await agent.ask("GET", f"events/m-1?wait={WAIT_MAX_S}"))["state"] == "delivered"
    unknown = await agent.ask("GET", f"events/nobody?wait={WAIT_MAX_S}")

    assert (unknown["statusCode"], unknown["code"]) == (404, "AGENT_UNKNOWN_EVENT")
    assert (unknown["messageId"], unknown["state"]) == ("nobody", "unknown")


@pytest.mark.process
async def test_a_wait_that_is_over_is_answered_with_what_is_known(agent: AgentProcess) -> None:
    await agent.ask("POST", "pause")
    await agent.post(track("m-1"))

    told = await agent.ask("GET", "events/m-1?wait=50ms")

    assert (told["state"], told["waitsFor"], told["attempts"]) == ("pending", "resume", 0)


@pytest.mark.process
async def test_the_end_of_the_agent_ends_a_wait_with_an_answer(agent: AgentProcess) -> None:
    await agent.ask("POST", "pause")
    await agent.post(track("m-1"))

    async with waiting(agent, f"events/m-1?wait={WAIT_MAX_S}") as asked:
        assert await agent.stop() == 0

    assert asked.result()["state"] == "pending"


@pytest.mark.process
async def test_an_outage_is_told_with_the_next_try(agent: AgentProcess, sandbox: Sandbox) -> None:
    sandbox.fault = Fault(mode="status", status=503, retry_after="3600")
    await agent.post(track("m-1"))
    await agent.until(lambda status: bool(status["state"] == "backing_off"))
    await agent.post(track("m-2", user="bob"))

    first, second = [await agent.ask("GET", f"events/{name}") for name in ("m-1", "m-2")]

    assert (first["waitsFor"], second["waitsFor"]) == ("backoff", "backoff")
    assert min(first["nextAttemptInS"], second["nextAttemptInS"]) > 60
    assert first["lastError"] == first["waitReason"] == second["waitReason"]
    assert "503" in first["lastError"]
    assert second["lastError"] is None
    assert first["attempts"] == 0, "no answer was about the event"


@pytest.mark.process
async def test_an_event_that_fails_by_itself_is_told_apart_from_those_behind_it(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="status", status=500, match="m-1", body={"message": "broken"})
    forward = 'backoff_base = "1h"\nbackoff_max = "1h"'
    async with running_agent(tmp_path, upstream=upstream(sandbox), forward=forward) as agent:
        await agent.post(track("m-1"))
        await agent.until(lambda status: bool(status["parked_users"] == 1))
        await agent.post(track("m-2"))
        await agent.post(track("m-3", user="bob"))
        other = await agent.ask("GET", f"events/m-3?wait={WAIT_S}")
        failing, behind = [await agent.ask("GET", f"events/{name}") for name in ("m-1", "m-2")]
        _, shown = await agent.run_command("show", "m-2")

    assert other["state"] == "delivered"
    assert (failing["waitsFor"], failing["attempts"]) == ("backoff", 1)
    assert failing["lastError"] == "the upstream answers 500 broken"
    assert failing["failingSince"] >= failing["acceptedAt"]
    assert failing["nextAttemptInS"] > 0
    assert (behind["waitsFor"], behind["attempts"], behind["lastError"]) == ("predecessor", 0, None)
    assert "m-1" in behind["waitReason"]
    assert "waits for an earlier event, in " in " ".join(shown.split())


@pytest.mark.process
async def test_an_event_under_way_waits_for_its_answer(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="stall")
    await agent.post(track("m-1"))
    await sandbox.wait_for(lambda sandbox: sandbox.requests == 1, DEADLINE_S)

    assert (await agent.ask("GET", "events/m-1"))["waitsFor"] == "answer"


@pytest.mark.process
async def test_behind_a_refused_key_an_event_waits_for_a_person(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    async with running_agent(tmp_path, upstream=upstream(sandbox, "wrong")) as agent:
        await agent.post(track("m-1"))
        await agent.until(lambda status: bool(status["state"] == "held"))
        told = await agent.ask("GET", "events/m-1")

    assert told["waitsFor"] == "hold"
    assert told["waitReason"].startswith("401")
    assert told["lastError"] == told["waitReason"]


@pytest.mark.process
async def test_of_several_upstreams_each_has_a_receipt(tmp_path: Path, sandbox: Sandbox) -> None:
    sections = {"upstream": upstream(sandbox), "upstreams.crm": upstream(sandbox)}
    async with running_agent(tmp_path, **sections) as agent:
        await agent.ask("POST", "pause?upstream=crm")
        await agent.post(track("m-1"))
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{agent.url}/w/crm/api/public/apps/track", json=track("m-1")) as response,
        ):
            assert response.status == 204
        default = await agent.ask("GET", f"events/m-1?wait={WAIT_S}")
        crm = await agent.ask("GET", "events/m-1?upstream=crm")
        neither = await agent.ask("GET", "events/m-1?upstream=shop")
        code, shown = await agent.run_command("show", "m-1", "--wait", "50ms", "--json")
        one = await agent.run_command("show", "m-1", "--upstream", "default", "--wait", "50ms")

    assert (default["upstream"], default["state"]) == ("default", "delivered")
    assert (crm["upstream"], crm["waitsFor"]) == ("crm", "resume")
    assert default["upstreams"] == crm["upstreams"] == ["default", "crm"]
    assert neither["state"] == "unknown"
    assert (code, [json.loads(line) for line in shown.splitlines()]) == (3, [default, crm])
    assert one[0] == 0


@pytest.mark.process
async def test_show_says_and_waits_for_the_same(agent: AgentProcess, sandbox: Sandbox) -> None:
    sandbox.fault = Fault(mode="status", status=422, match="bad")
    hard = "a/b c?d=é%2F"
    await agent.ask("POST", "pause")
    for name in (hard, "bad"):
        await agent.post(track(name, user=name))
    pending = await agent.run_command("show", hard, "--wait", "10ms", "--json")

    async with asyncio.TaskGroup() as tasks:
        good = tasks.create_task(agent.run_command("show", hard, "--wait", "5m", "--json"))
        bad = tasks.create_task(agent.run_command("show", "bad", "--wait", "5m"))
        await agent.ask("POST", "resume")
    known = await agent.run_command("show", "bad")
    unknown = await agent.run_command("show", "nobody", "--json")
    await agent.stop()
    at_rest = await agent.run_command("show", hard, "--json")

    assert (pending[0], json.loads(pending[1])["waitsFor"]) == (3, "resume")
    assert (good.result()[0], json.loads(good.result()[1])["state"]) == (0, "delivered")
    assert bad.result()[0] == 1
    assert "dead: rejected" in bad.result()[1]
    assert known[0] == 0
    assert (unknown[0], json.loads(unknown[1])["state"]) == (1, "unknown")
    assert at_rest == good.result()


@pytest.mark.process
async def test_show_does_not_wait_where_nothing_can_be_delivered(agent: AgentProcess) -> None:
    await agent.ask("POST", "pause")
    await agent.post(track("m-1"))
    await agent.stop()

    code, shown = await agent.run_command("show", "m-1", "--wait", "1d", "--json")

    assert (code, json.loads(shown)["waitsFor"]) == (3, "agent")


# --- the waits themselves --------------------------------------------------------------------------


class StoppedLink:
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def flush(self) -> None: ...

    def flow(self) -> Flow:
        raise AssertionError("a receipt asks for the wait alone")

    def wait_of(self, seq: int, lane: int) -> Wait:
        return Wait(waits_for="turn")


class Between:
    """A reader after whose first look something is committed, before anybody learns what it saw."""

    def __init__(self, reader: Reader, commit: Callable[[], Awaitable[object]]) -> None:
        self._reader = reader
        self._commit: Callable[[], Awaitable[object]] | None = commit

    async def receipts(self, message_id: str) -> list[Receipt]:
        return await self._reader.receipts(message_id)

    async def receipt(self, message_id: str, upstream: str | None) -> Receipt | None:
        seen = await self._reader.receipt(message_id, upstream)
        if self._commit is not None:
            commit, self._commit = self._commit, None
            await commit()
        return seen


class Desk:
    """The control API on a socket, before an outbox from which nothing is sent."""

    def __init__(self, writer: Writer, port: int, session: aiohttp.ClientSession) -> None:
        self.writer = writer
        self.port = port
        self._session = session

    async def store(self, *message_ids: str) -> None:
        now_ms = SystemClock().wall_ms()
        bodies = [json.dumps(track(message_id)).encode() for message_id in message_ids]
        await self.writer.append([read_event("track", body, received_ms=now_ms) for body in bodies])

    async def ask(self, path: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        url = f"http://127.0.0.1:{self.port}{PREFIX}events/{path}"
        async with self._session.get(url) as response:
            return response.status, json.loads(await response.read()), dict(response.headers)

    @asynccontextmanager
    async def waiting(self, path: str) -> AsyncIterator[asyncio.Task[tuple[int, Any, Any]]]:
        before = len(self.writer.waiters)
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(self.ask(path))
            await until(lambda: len(self.writer.waiters) > before)
            # The last look before it waits: another query stands behind it in the reader's line.
            await self.ask("nobody")
            yield asked


@asynccontextmanager
async def desk_at(
    path: Path, between: Callable[[Writer], Awaitable[object]] | None = None
) -> AsyncIterator[Desk]:
    """Yield a desk; *between* is done after the first look of a wait."""
    clock = SystemClock()
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=True)
    guard = Guard(allowed_hosts=frozenset(), allowed_origins=frozenset(), max_body_bytes=1_000_000)
    async with (
        open_writer(path, policy, clock) as writer,
        open_own_reader(path) as reader,
        # Shorter than the longest wait: one that nothing ends is a failure.
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session,
    ):
        control = Control(
            reader=reader if between is None else Between(reader, partial(between, writer)),  # type: ignore[arg-type]
            writer=writer,
            links={"": StoppedLink()},
            clock=clock,
            urls={"": ""},
            max_bytes=policy.max_bytes,
        )
        mounts = [Mount(PREFIX, control.answer)]
        routes = Routes(writer, clock, mounts=mounts)
        async with serving(
            guard,
            routes.answer,
            host="127.0.0.1",
            port=0,
            deadlines=Deadlines(look_s=0.01, linger_s=0.05, idle_s=0.05),
        ) as (address,):
            yield Desk(writer, int(address.rpartition(":")[2]), session)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path / "outbox.db") as desk:
        yield desk


async def test_each_wait_is_ended_by_its_own_event(desk: Desk) -> None:
    await desk.store("a", "b")
    async with desk.waiting(f"b?wait={WAIT_MAX_S}") as second:
        async with desk.waiting(f"a?wait={WAIT_MAX_S}") as first, desk.waiting("a?wait=1m") as same:
            await desk.writer.settle(Ack(1))
        assert not second.done()
        await desk.writer.settle(Bury(seq=2, reason="gave_up", status=500, answer="no"))

    assert first.result()[1] == same.result()[1]
    assert first.result()[1]["state"] == "delivered"
    assert second.result()[1]["state"] == "dead"
    assert len(desk.writer.waiters) == 0


async def test_what_is_evicted_while_it_is_waited_for_is_unknown(desk: Desk) -> None:
    await desk.store("a", "b")
    async with desk.waiting(f"a?wait={WAIT_MAX_S}") as evicted:
        await desk.writer.perform(lambda store: store.evict(1, limit=1))

    assert (evicted.result()[0], evicted.result()[1]["state"]) == (404, "unknown")


async def test_what_is_evicted_after_the_outbox_was_reopened_is_told_too(desk: Desk) -> None:
    await desk.store("a", "b")
    await desk.writer.perform(lambda store: store.evict(1, limit=1))
    desk.writer._break("as a failed sync does")
    await until(lambda: desk.writer.fault is None)
    async with desk.waiting(f"b?wait={WAIT_MAX_S}") as evicted:
        await desk.writer.perform(lambda store: store.evict(1, limit=1))

    assert evicted.result()[1]["state"] == "unknown"


async def test_what_expires_while_it_is_waited_for_is_dead(desk: Desk) -> None:
    await desk.store("a")
    later_ms = SystemClock().wall_ms() + 1000
    async with desk.waiting(f"a?wait={WAIT_MAX_S}") as expired:
        await desk.writer.perform(lambda store: store.expire(later_ms, now_ms=later_ms, limit=10))

    assert (expired.result()[1]["state"], expired.result()[1]["reason"]) == ("dead", "expired")


@pytest.mark.parametrize(
    ("between", "state"),
    [
        (lambda writer: writer.settle(Ack(1)), "delivered"),
        (lambda writer: writer.perform(lambda store: store.evict(1, limit=1)), "unknown"),
    ],
    ids=["delivered", "evicted"],
)
async def test_what_is_committed_between_look_and_wait_is_not_missed(
    tmp_path: Path, between: Callable[[Writer], Awaitable[object]], state: str
) -> None:
    async with desk_at(tmp_path / "outbox.db", between) as desk:
        await desk.store("a")

        assert (await desk.ask(f"a?wait={WAIT_MAX_S}"))[1]["state"] == state


async def test_what_a_damaged_outbox_gave_back_is_looked_at_again(desk: Desk) -> None:
    with desk.writer.waiters.watch(1) as told:
        desk.writer.salvaged("outbox.db.damaged-1")
    assert told.is_set()


async def test_what_may_still_come_back_is_not_called_unknown(desk: Desk) -> None:
    desk.writer.suspect("for the test")
    await until(lambda: desk.writer.rescuing and desk.writer.fault is None)
    status, said, headers = await desk.ask("a")
    (name,) = desk.writer.opening.unsalvaged
    desk.writer.salvaged(name)

    assert (status, said["code"]) == (503, "AGENT_OUTBOX_UNAVAILABLE")
    assert "Retry-After" in headers
    assert (await desk.ask("a"))[0] == 404


async def test_more_waits_than_there_may_be_are_put_off(desk: Desk) -> None:
    await desk.store("a")
    with ExitStack() as others:
        for _ in range(WAITERS):
            others.enter_context(desk.writer.waiters.watch(99))
        refused = await desk.ask("a?wait=1")
        at_once = await desk.ask("a")
    async with desk.waiting(f"a?wait={WAIT_MAX_S}") as asked:
        await desk.writer.settle(Ack(1))

    assert (refused[0], refused[1]["code"]) == (503, "AGENT_OVERLOADED")
    assert int(refused[2]["Retry-After"]) > 0
    assert at_once[0] == 200
    assert asked.result()[1]["state"] == "delivered"


@pytest.mark.parametrize("rudely", [True, False])
async def test_a_client_that_is_gone_waits_no_longer(desk: Desk, rudely: bool) -> None:
    await desk.store("a")
    reader, writer = await asyncio.open_connection("127.0.0.1", desk.port)
    writer.write(b"GET /api/agent/events/a?wait=60 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    await until(lambda: len(desk.writer.waiters) == 1)

    if rudely:
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    writer.close()

    await until(lambda: len(desk.writer.waiters) == 0)
    del reader


async def test_no_wait_begins_once_the_agent_stops(desk: Desk) -> None:
    await desk.store("a")
    desk.writer.waiters.end()

    assert (await desk.ask(f"a?wait={WAIT_MAX_S}"))[1]["state"] == "pending"


@pytest.mark.parametrize("text", ["61", "2m", "-1", "1e1", "", "30 apples", "nan", "٣"])
async def test_a_wait_that_cannot_be_is_refused(desk: Desk, text: str) -> None:
    await desk.store("a")

    status, told, _ = await desk.ask(f"a?wait={text}")

    assert (status, told["code"]) == (400, "AGENT_BAD_REQUEST")
    assert told["message"].startswith("wait: ")
    if text in {"61", "2m"}:
        assert "60 s" in told["message"]


async def test_a_misspelt_parameter_is_refused(desk: Desk) -> None:
    assert (await desk.ask("a?wiat=30"))[0] == 400


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [("0", 0), ("30", 30), ("0.5", 0.5), ("30s", 30), ("1m", 60), ("250ms", 0.25)],
)
def test_a_wait_is_read_as_people_write_it(text: str, expected_s: float) -> None:
    assert wait_s(text) == expected_s


# --- what a pending event waits for ----------------------------------------------------------------

FLOWING = Flow(
    state="flowing",
    reason="",
    next_attempt_in_s=None,
    last_error=None,
    last_error_ms=None,
    in_flight=0,
    limit=1,
    parked_users=0,
    ambiguous=0,
)
HEADS = [Head(seq, lane, f"m-{seq}", "track", 0, None, 2, b"{}") for seq, lane in
         ((1, 7), (2, 7), (3, 8), (4, 9))]  # fmt: skip


@pytest.mark.parametrize(
    ("flow", "place", "sent", "expected"),
    [
        (FLOWING, Place(), False, ("turn", None)),
        (FLOWING, Place(), True, ("answer", None)),
        (FLOWING, Place(Claim.of(HEADS[:1]), 105.0), False, ("backoff", 5.0)),
        (FLOWING, Place(Claim.of(HEADS[:1]), 95.0), False, ("backoff", 0.0)),
        (FLOWING, Place(until_s=105.0, behind="m-1"), False, ("predecessor", 5.0)),
        (replace(FLOWING, state="backing_off", next_attempt_in_s=9.0),
         Place(until_s=105.0, behind="m-1"), False, ("backoff", 9.0)),
        (replace(FLOWING, state="held", next_attempt_in_s=9.0), Place(), False, ("hold", 9.0)),
        (replace(FLOWING, state="held", next_attempt_in_s=0.0), Place(), True, ("answer", None)),
        (replace(FLOWING, state="paused"), Place(), False, ("resume", None)),
        (replace(FLOWING, state="unconfigured"), Place(), False, ("upstream", None)),
        (replace(FLOWING, state="waiting", next_attempt_in_s=9.0), Place(), False, ("budget", 9.0)),
        (replace(FLOWING, state="waiting", next_attempt_in_s=9.0), Place(urgent=True), False,
         ("turn", None)),
    ],
)  # fmt: skip
def test_what_stands_in_front_is_what_is_waited_for(
    flow: Flow, place: Place, sent: bool, expected: tuple[str, float | None]
) -> None:
    wait = wait_of(flow, place, sent=sent, last_error=None, now_s=100.0)

    assert (wait.waits_for, wait.next_attempt_in_s) == expected


@pytest.mark.parametrize("ordered", [True, False])
def test_lanes_know_where_each_event_stands(ordered: bool) -> None:
    lanes = Lanes(ordered=ordered)
    lanes.scanned(HEADS, complete=True)
    failed, again = lanes.take(0.0), None
    assert failed is not None
    lanes.again(failed, until_s=50.0)
    while again is None or again.heads[0].seq != 3:
        again = lanes.take(0.0)
        assert again is not None
    lanes.again(again, until_s=None)

    assert lanes.place(1, 7) == Place(failed, 50.0)
    assert lanes.place(2, 7) == (Place(None, 50.0, behind="m-1") if ordered else Place())
    assert lanes.place(3, 8) == Place(again)
    assert lanes.place(4, 9) == Place()
    assert lanes.place(99, 7) == (Place(None, 50.0, behind="m-1") if ordered else Place())
