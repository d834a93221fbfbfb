"""Batches to the upstream, by the real daemon: what fills them, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path

import msgspec
import pytest
from processes import AgentProcess, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Arrival, Fault, Sandbox
from agent.console.sandbox_contract import BODY_LIMIT_BYTES

BATCH = "/api/public/apps/batch"

pytestmark = pytest.mark.process

FORWARD = 'backoff_base = "20ms"\nbackoff_max = "100ms"\nhold_probe = "200ms"\n'


@asynccontextmanager
async def batching(
    folder: Path, *, forward: str = "", sandbox: Sandbox | None = None
) -> AsyncIterator[tuple[AgentProcess, Sandbox]]:
    """Yield an agent that sends batches, paused, and the upstream it sends to."""
    sandbox = sandbox or Sandbox(DEFAULT_WRITE_KEY)
    async with sandbox.serving() as url:
        upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\nmode = "batch"\n'
        async with running_agent(folder, upstream=upstream, forward=FORWARD + forward) as agent:
            await agent.ask("POST", "pause")
            yield agent, sandbox


async def post(agent: AgentProcess, number: int, *, user: str = "", **more: object) -> None:
    body = {"messageId": f"m{number}", "event": "Sold", "userId": user or f"u{number}", **more}
    assert await agent.post(body) == 204


async def drained(agent: AgentProcess) -> dict[str, object]:
    await agent.ask("POST", "resume")
    return await agent.until(lambda status: status["pending"] == 0)


def requests(arrivals: list[Arrival]) -> list[list[str]]:
    """Return the messageIds of each request, in the order of arrival."""
    by_request = groupby(arrivals, key=lambda arrival: arrival.request)
    return [[arrival.message_id for arrival in group] for _, group in by_request]


async def test_what_waits_travels_together_up_to_the_configured_count(tmp_path: Path) -> None:
    async with batching(tmp_path, forward="batch_events = 4\nconcurrency = 1\n") as (agent, up):
        for number in range(10):
            await post(agent, number)
        await drained(agent)
        assert {arrival.path for arrival in up.stored} == {BATCH}
        assert requests(up.stored) == [
            ["m0", "m1", "m2", "m3"],
            ["m4", "m5", "m6", "m7"],
            ["m8", "m9"],
        ]


async def test_an_event_that_comes_alone_goes_alone_without_waiting_for_others(
    tmp_path: Path,
) -> None:
    async with batching(tmp_path) as (agent, up):
        await agent.ask("POST", "resume")
        await post(agent, 1)
        await up.wait_for(lambda seen: len(seen.stored) == 1)
        await post(agent, 2)
        await up.wait_for(lambda seen: len(seen.stored) == 2)
        assert requests(up.stored) == [["m1"], ["m2"]]


async def test_the_items_are_the_stored_bytes_with_their_type(tmp_path: Path) -> None:
    async with batching(tmp_path) as (agent, up):
        await post(agent, 1, timestamp="2026-11-23T10:00:00Z", properties={"price": 1.10})
        await drained(agent)
        [arrival] = up.stored
        assert json.loads(arrival.body) == {
            "type": "track",
            "messageId": "m1",
            "event": "Sold",
            "userId": "u1",
            "timestamp": "2026-11-23T10:00:00Z",
            "properties": {"price": 1.10},
        }


async def test_no_request_is_larger_than_the_upstream_takes(tmp_path: Path) -> None:
    padding = "x" * (BODY_LIMIT_BYTES // 3 - 200)
    at = "2026-11-23T10:00:00Z"
    frame = {"messageId": "m7", "event": "Sold", "userId": "u7", "timestamp": at}
    bare_bytes = len(msgspec.json.encode({**frame, "properties": {"note": ""}}))
    whole = "x" * (BODY_LIMIT_BYTES - bare_bytes)
    async with batching(tmp_path) as (agent, up):
        for number in range(7):
            await post(agent, number, properties={"note": padding})
        # Alone it fits, in an envelope it does not.
        await post(agent, 7, timestamp=at, properties={"note": whole})
        status = await drained(agent)
        assert (status["delivered"], status["dead"]) == (8, 0)
        assert sorted(len(each) for each in requests(up.stored)) == [1, 1, 3, 3]
        assert up.stats().answers == {"204": 4}
        [alone] = [arrival for arrival in up.stored if arrival.message_id == "m7"]
        assert alone.path == "/api/public/apps/track"


@pytest.mark.parametrize("users", [1, 3, 20])
async def test_the_one_bad_event_is_set_aside_and_the_others_arrive_once_in_order(
    tmp_path: Path, users: int
) -> None:
    fault = Fault(mode="status", status=400, match="poison")
    async with batching(tmp_path) as (agent, up):
        up.fault = fault
        for number in range(20):
            event = "poison" if number == 7 else "Sold"
            await post(agent, number, user=f"u{number % users}", event=event)
        status = await drained(agent)
        assert (status["delivered"], status["dead"], status["ambiguous"]) == (19, 1, 0)
        arrived = [int(arrival.message_id[1:]) for arrival in up.stored]
        assert sorted(arrived) == [number for number in range(20) if number != 7]
        for user in range(users):
            own = [number for number in arrived if number % users == user]
            assert own == sorted(own)
        [dead] = (await agent.ask("GET", "events?state=dead"))["events"]
        assert (dead["messageId"], dead["status"]) == ("m7", 400)


async def test_a_user_with_many_bad_events_is_not_sent_whole_for_each_of_them(
    tmp_path: Path,
) -> None:
    async with batching(tmp_path) as (agent, up):
        up.fault = Fault(mode="status", status=400, match="poison")
        for number in range(60):
            await post(agent, number, user="u", event="Sold" if number % 3 else "poison")
        status = await drained(agent)
        assert (status["delivered"], status["dead"]) == (40, 20)
        assert len(up.arrivals) <= 5 * 60


async def test_batches_grow_again_once_the_bad_event_is_found(tmp_path: Path) -> None:
    forward = "batch_events = 8\nconcurrency = 1\n"
    async with batching(tmp_path, forward=forward) as (agent, up):
        up.fault = Fault(mode="status", status=400, match="poison")
        for number in range(40):
            await post(agent, number, user="u", event="Sold" if number else "poison")
        status = await drained(agent)
        assert (status["delivered"], status["dead"]) == (39, 1)
        sizes = [len(each) for each in requests(up.arrivals)]
        assert sizes == [8, 4, 2, 1, 1, 2, 4, 8, 8, 8, 8]


async def test_the_event_that_the_upstream_names_is_tried_first(tmp_path: Path) -> None:
    answer = {"message": "body/batch/11 must have required property 'event'"}
    fault = Fault(mode="status", status=400, body=answer, match="poison")
    async with batching(tmp_path, forward="concurrency = 1\n") as (agent, up):
        up.fault = fault
        for number in range(16):
            await post(agent, number, event="poison" if number == 11 else "Sold")
        status = await drained(agent)
        assert (status["delivered"], status["dead"]) == (15, 1)
        sizes = [len(each) for each in requests(up.arrivals)]
        assert sizes == [16, 1, 15]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(mode="cut_after", times=2, match='"m0"'),
        Fault(mode="status", status=500, times=2, match='"m0"'),
    ],
)
async def test_a_batch_that_fails_is_sent_again_with_the_same_members(
    tmp_path: Path, fault: Fault
) -> None:
    async with batching(tmp_path, forward="concurrency = 1\n") as (agent, up):
        for number in range(5):
            await post(agent, number)
        up.fault = fault
        await agent.ask("POST", "resume")
        await up.wait_for(lambda seen: len(seen.arrivals) >= 5)
        for number in range(5, 9):
            await post(agent, number)
        await agent.until(lambda status: status["pending"] == 0)
        tries = [each for each in requests(up.arrivals) if "m0" in each]
        assert tries == [[f"m{number}" for number in range(5)]] * 3


async def test_a_resend_of_what_may_be_stored_is_counted(tmp_path: Path) -> None:
    async with batching(tmp_path, forward="concurrency = 1\n") as (agent, up):
        for number in range(5):
            await post(agent, number)
        up.fault = Fault(mode="cut_after", times=1)
        status = await drained(agent)
        assert len(up.stored) == 10
        assert status["ambiguous"] == 5


async def test_a_proxy_that_takes_less_is_asked_for_less_from_then_on(tmp_path: Path) -> None:
    async with batching(tmp_path, forward="concurrency = 1\n") as (agent, up):
        up.fault = Fault(mode="status", status=413, times=1)
        for number in range(16):
            await post(agent, number)
        await drained(agent)
        await agent.ask("POST", "pause")
        for number in range(16, 32):
            await post(agent, number)
        status = await drained(agent)
        assert (status["delivered"], status["dead"]) == (32, 0)
        first, *others = (len(each) for each in requests(up.arrivals))
        assert first == 16
        assert max(others) <= 9, "the proxy would refuse it once more"


async def test_an_event_that_breaks_the_upstream_is_found_in_its_batch(tmp_path: Path) -> None:
    patience = 'max_attempts = 2\ngive_up_after = "0s"\n'
    async with batching(tmp_path, forward=patience) as (agent, up):
        up.fault = Fault(mode="status", status=500, match="poison")
        for number in range(12):
            await post(agent, number, event="poison" if number == 5 else "Sold")
        status = await drained(agent)
        assert (status["delivered"], status["dead"]) == (11, 1)
        assert len(up.stored) == 11


async def test_a_revoked_key_holds_batches_and_costs_none(tmp_path: Path) -> None:
    async with batching(tmp_path) as (agent, up):
        up.fault = Fault(mode="status", status=401, body={"message": "Invalid write key."})
        for number in range(50):
            await post(agent, number)
        await agent.ask("POST", "resume")
        await agent.until(lambda status: status["state"] == "held")
        await up.wait_for(lambda seen: seen.requests >= 4)
        up.fault = Fault(mode="ok")
        status = await agent.until(lambda status: status["pending"] == 0)
        assert (status["delivered"], status["dead"], status["ambiguous"]) == (50, 0, 0)
        assert len(up.stored) == 50


async def test_a_kill_at_full_speed_repeats_what_was_in_flight_and_says_so(tmp_path: Path) -> None:
    async with batching(tmp_path, forward="batch_events = 10\nconcurrency = 4\n") as (agent, up):
        async with asyncio.TaskGroup() as posts:
            for number in range(600):
                posts.create_task(post(agent, number))
        await agent.ask("POST", "resume")
        await up.wait_for(lambda seen: len(seen.stored) >= 200)
        await agent.kill()
        await agent.start()
        status = await agent.until(lambda status: status["pending"] == 0)
        stats = up.stats()
        assert stats.unique == 600
        # Four requests of ten, and what waited for its commit.
        assert stats.duplicates <= status["ambiguous"] <= 4 * 10 + 128 + 10
