"""What a metered link may carry, and when: on a clock of our own, and by the real daemon."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import AgentProcess, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Sandbox
from agent.forward.budget import REQUEST_BYTES, Budget, Meter, Window, day_of

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
NIGHT = Window(time(22), time(6))
LUNCH = Window(time(11, 30), time(13))


def kept_back_for_s(
    meter: Meter, *, now_s: float = 0.0, at: datetime = NOON, today: int = 0
) -> float:
    kept_back = meter.kept_back(now_s, at, today_bytes=today)
    return 0.0 if kept_back is None else kept_back.until_s - now_s


# --- windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hour", "minute", "opens"),
    [(21, 59, False), (22, 0, True), (23, 59, True), (0, 0, True), (5, 59, True), (6, 0, False)],
)
def test_a_window_across_midnight_is_open_on_both_sides_of_it(
    hour: int, minute: int, opens: bool
) -> None:
    meter = Meter(Budget(windows=(NIGHT,)))
    at = NOON.replace(hour=hour, minute=minute)
    assert (meter.kept_back(0.0, at, today_bytes=0) is None) is opens


def test_a_closed_window_says_when_the_next_one_opens() -> None:
    meter = Meter(Budget(windows=(NIGHT, LUNCH)))
    found = meter.kept_back(0.0, NOON.replace(hour=9), today_bytes=0)
    assert found is not None
    assert found.why == "outside forward.windows; opens at 11:30"
    assert kept_back_for_s(meter, at=NOON) == 0.0


def test_the_wall_clock_is_looked_at_each_minute_for_a_person_may_set_it() -> None:
    meter = Meter(Budget(windows=(NIGHT,)))
    assert kept_back_for_s(meter, now_s=5.0) == 60.0
    assert kept_back_for_s(meter, at=NOON.replace(hour=21, minute=59, second=50)) == 10.0


@settings(deadline=None)
@given(minutes=st.integers(0, 24 * 60 - 1), opens=st.times(), closes=st.times())
def test_whoever_waits_as_long_as_it_says_comes_to_an_open_window(
    minutes: int, opens: time, closes: time
) -> None:
    if opens == closes:
        return
    meter = Meter(Budget(windows=(Window(opens, closes),)))
    at = NOON.replace(hour=0) + timedelta(minutes=minutes)
    looks = 0
    while wait_s := kept_back_for_s(meter, at=at):
        at += timedelta(seconds=wait_s)
        looks += 1
        assert looks <= 24 * 60 + 1


# --- rates and the day -------------------------------------------------------------------------------


def test_events_leave_at_the_rate_on_average_whatever_a_request_holds() -> None:
    meter = Meter(Budget(events_per_s=10))
    now_s = 0.0
    for events in (1, 5, 200, 1, 1):
        assert kept_back_for_s(meter, now_s=now_s) == 0.0
        meter.spend(now_s, events=events, sent_bytes=1)
        now_s += kept_back_for_s(meter, now_s=now_s)
    assert now_s == pytest.approx(208 / 10)


def test_time_without_events_is_not_saved_up() -> None:
    meter = Meter(Budget(bytes_per_s=1000))
    meter.spend(0.0, events=1, sent_bytes=500)
    meter.spend(1000.0, events=1, sent_bytes=2000)
    assert kept_back_for_s(meter, now_s=1000.0) == pytest.approx(2.0)


def test_a_day_that_is_spent_ends_at_midnight() -> None:
    meter = Meter(Budget(bytes_per_day=1000))
    late = NOON.replace(hour=23, minute=59, second=30)
    assert kept_back_for_s(meter, at=late, today=999) == 0.0
    assert kept_back_for_s(meter, at=late, today=1000) == 30.0
    assert day_of(late) + 1 == day_of(late + timedelta(seconds=30))


def test_no_budget_never_closes() -> None:
    meter = Meter(Budget())
    meter.spend(0.0, events=10**9, sent_bytes=10**12)
    assert meter.unlimited
    assert kept_back_for_s(meter, today=10**15) == 0.0


# --- the daemon --------------------------------------------------------------------------------------


def shut() -> str:
    """Return a window that is closed for the next hours, whatever the time of day."""
    opens = datetime.now().astimezone() + timedelta(hours=6)
    return f"{opens:%H:%M}-{opens + timedelta(minutes=1):%H:%M}"


async def post(agent: AgentProcess, message_id: str, *, user: str, event: str = "Sold") -> None:
    body = {"messageId": message_id, "event": event, "userId": user}
    assert await agent.post(body) == 204


@pytest.mark.process
@pytest.mark.parametrize("mode", ["track", "batch"])
async def test_outside_the_windows_only_what_may_always_go_does_with_what_is_before_it(
    tmp_path: Path, mode: str
) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    forward = f'windows = ["{shut()}"]\nalways = ["Payment Failed"]\n'
    async with sandbox.serving() as url:
        upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\nmode = "{mode}"\n'
        async with running_agent(tmp_path, upstream=upstream, forward=forward) as agent:
            for message_id, user in (("a1", "a"), ("b1", "b"), ("a2", "a")):
                await post(agent, message_id, user=user)
            status = await agent.until(lambda status: status["state"] == "waiting")
            assert status["reason"].startswith("outside forward.windows; opens at ")
            assert sandbox.stored == []
            await post(agent, "a3", user="a", event="Payment Failed")
            await post(agent, "c1", user="c", event="Payment Failed")
            await sandbox.wait_for(lambda seen: len(seen.stored) == 4, timeout_s=30)
            await agent.until(lambda status: status["pending"] == 1)
    arrived = [arrival.message_id for arrival in sandbox.stored]
    assert [each for each in arrived if each != "c1"] == ["a1", "a2", "a3"]


BACKLOG = 3000
"""More than the lanes hold in memory."""

USERS = 500


async def post_all(agent: AgentProcess, numbers: range) -> None:
    for number in numbers:  # all of a user's are in one range
        await post(agent, f"m{number}", user=f"u{number % USERS}")


@pytest.mark.process
async def test_an_urgent_event_is_found_behind_a_backlog_larger_than_memory(tmp_path: Path) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    forward = f'windows = ["{shut()}"]\nalways = ["Payment Failed"]\n'
    async with sandbox.serving() as url:
        upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\n'
        async with running_agent(tmp_path, upstream=upstream, forward=forward) as agent:
            async with asyncio.TaskGroup() as apps:
                for client in range(20):
                    apps.create_task(post_all(agent, range(client, BACKLOG, 20)))
            await post(agent, "urgent", user="u7", event="Payment Failed")
            own = [f"m{number}" for number in range(7, BACKLOG, USERS)]
            await sandbox.wait_for(lambda seen: len(seen.stored) == len(own) + 1, timeout_s=30)
            status = await agent.until(lambda status: status["pending"] == BACKLOG - len(own))
            assert status["state"] == "waiting"
    assert [arrival.message_id for arrival in sandbox.stored] == [*own, "urgent"]


@pytest.mark.process
async def test_the_bytes_of_a_day_are_remembered_over_a_kill(tmp_path: Path) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    forward = f'max_bytes_per_day = "{3 * REQUEST_BYTES}B"\nconcurrency = 1\n'
    async with sandbox.serving() as url:
        upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\n'
        async with running_agent(tmp_path, upstream=upstream, forward=forward) as agent:
            for number in range(6):
                await post(agent, f"m{number}", user="u")
            before = await agent.until(lambda status: status["state"] == "waiting")
            assert "forward.max_bytes_per_day" in before["reason"]
            sent = len(sandbox.stored)
            assert 0 < sent < 6
            await agent.kill()
            await agent.start()
            await post(agent, "m6", user="u")
            after = await agent.until(lambda status: status["state"] == "waiting")
            assert (after["pending"], len(sandbox.stored)) == (7 - sent, sent)
