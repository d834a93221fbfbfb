"""A fault upstream or in the configuration costs nothing; one bad event blocks nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from processes import AgentProcess, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.forward.tally import open_tally
from agent.outbox.files import tally_of

pytestmark = pytest.mark.process

FORWARD = 'backoff_base = "20ms"\nbackoff_max = "200ms"\nhold_probe = "200ms"\n'


def event(name: str, user: str = "u") -> dict[str, object]:
    return {"messageId": name, "event": "Item Sold", "userId": user}


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    async with sandbox.serving():
        yield sandbox


@pytest.fixture
async def agent(tmp_path: Path, sandbox: Sandbox) -> AsyncIterator[AgentProcess]:
    async with running_agent(
        tmp_path,
        upstream=f'url = "{sandbox.url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\ntimeout = "2s"',
        forward=FORWARD + 'max_attempts = 3\ngive_up_after = "0s"\n',
    ) as agent:
        yield agent


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(mode="status", status=401, body={"message": "Invalid write key."}), "write key"),
        (Fault(mode="status", status=403), "403"),
        (Fault(mode="status", status=404), "upstream.url"),
        (Fault(mode="redirect", status=302), "redirected to"),
        (Fault(mode="redirect", status=307), "redirected to"),
        (Fault(mode="html"), "captive portal"),
        (
            Fault(
                mode="status",
                status=400,
                body={"message": "headers must have required property 'authorization'"},
            ),
            "authorization",
        ),
    ],
    ids=lambda value: value.mode + str(value.status or "") if isinstance(value, Fault) else "",
)
async def test_a_fault_of_configuration_holds_the_queue_until_it_is_mended(
    agent: AgentProcess, sandbox: Sandbox, fault: Fault, reason: str
) -> None:
    sandbox.fault = fault
    for number in range(20):
        assert await agent.post(event(f"m-{number}", f"u-{number % 4}")) == 204

    held = await agent.until(lambda status: status["state"] == "held")
    assert reason in held["reason"]
    assert (held["pending"], held["dead"]) == (20, 0)
    assert held["next_attempt_in_s"] is not None
    requests = sandbox.requests
    await sandbox.wait_for(lambda sandbox: sandbox.requests > requests, timeout_s=10)

    sandbox.fault = Fault(mode="ok")
    flowing = await agent.until(lambda status: status["pending"] == 0)
    assert (flowing["state"], flowing["delivered"], flowing["dead"]) == ("flowing", 20, 0)
    assert len(sandbox.stored) == 20


async def test_a_rejected_event_is_set_aside_with_the_answer_and_the_rest_flow(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(
        mode="status", status=400, match='"bad"', body={"message": "body/event must be nicer"}
    )
    for name in ("before", "bad", "after"):
        assert await agent.post(event(name)) == 204

    await agent.until(lambda status: status["delivered"] == 2 and status["dead"] == 1)
    letter = await agent.ask("GET", "events/bad")
    assert letter["state"] == "dead"
    assert letter["reason"] == "rejected"
    assert letter["status"] == 400
    assert letter["answer"] == "body/event must be nicer"
    assert [arrival.message_id for arrival in sandbox.stored] == ["before", "after"]

    sandbox.fault = Fault(mode="ok")
    assert await agent.ask("POST", "dead/requeue", {"messageIds": ["bad"]}) == {"requeued": 1}
    await agent.until(lambda status: status["delivered"] == 3)
    attempts = [a.body for a in sandbox.arrivals if a.message_id == "bad"]
    assert len(set(attempts)) == 1


async def test_an_event_that_alone_keeps_failing_is_set_aside_in_the_end(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="status", status=500, match='"poison"')
    assert await agent.post(event("poison", "a")) == 204
    await agent.until(lambda status: "500" in str(status["last_error"]))
    for number in range(10):
        assert await agent.post(event(f"good-{number}", "b")) == 204
        await agent.until(lambda status, n=number: status["delivered"] > n)  # type: ignore[misc]

    await agent.until(lambda status: status["dead"] == 1)
    letter = await agent.ask("GET", "events/poison")
    assert (letter["reason"], letter["status"]) == ("gave_up", 500)
    assert letter["attempts"] >= 2


async def test_an_outage_of_500s_buries_nothing(agent: AgentProcess, sandbox: Sandbox) -> None:
    sandbox.fault = Fault(mode="status", status=500)
    for number in range(6):
        assert await agent.post(event(f"m-{number}", f"u-{number}")) == 204
    await sandbox.wait_for(lambda sandbox: sandbox.requests >= 30, timeout_s=20)
    assert (await agent.status())["dead"] == 0

    sandbox.fault = Fault(mode="ok")
    await agent.until(lambda status: status["delivered"] == 6)


async def test_a_delivery_that_was_recorded_is_in_no_doubt_after_a_kill(
    agent: AgentProcess,
) -> None:
    for number in (1, 2):
        assert await agent.post(event(f"m-{number}")) == 204
        await agent.until(lambda status, n=number: status["delivered"] == n)  # type: ignore[misc]
        await agent.kill()
        await agent.start()
    assert await agent.post(event("m-3")) == 204
    status = await agent.until(lambda status: status["delivered"] == 3)
    assert status["ambiguous"] == 0
    await agent.kill()
    # What is settled stays in the file only until its slot is taken again.
    with open_tally(tally_of(agent.outbox, "")) as tally:
        assert tally.doubtful == [3]


async def test_pause_survives_a_kill_and_resume_ends_it(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    paused = await agent.ask("POST", "pause")
    assert paused["state"] == "paused"
    assert await agent.post(event("m-1")) == 204
    await agent.kill()
    await agent.start()
    assert (await agent.status())["state"] == "paused"
    assert sandbox.requests == 0

    await agent.ask("POST", "resume")
    await agent.until(lambda status: status["delivered"] == 1)


async def test_flush_ends_a_wait(tmp_path: Path, sandbox: Sandbox) -> None:
    async with running_agent(
        tmp_path,
        upstream=f'url = "{sandbox.url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"',
        forward='hold_probe = "1h"',
    ) as agent:
        sandbox.fault = Fault(mode="status", status=401)
        assert await agent.post(event("m-1")) == 204
        held = await agent.until(lambda status: status["state"] == "held")
        assert held["next_attempt_in_s"] > 60
        sandbox.fault = Fault(mode="ok")
        await agent.ask("POST", "flush")
        await agent.until(lambda status: status["delivered"] == 1)


async def test_without_configuration_events_are_kept_and_what_is_missing_is_said(
    tmp_path: Path,
) -> None:
    async with running_agent(tmp_path) as agent:
        assert await agent.post(event("m-1")) == 204
        status: dict[str, Any] = await agent.status()
        assert (status["state"], status["pending"]) == ("unconfigured", 1)
        assert "upstream.url" in status["reason"]


async def test_stopping_finishes_in_order(agent: AgentProcess, sandbox: Sandbox) -> None:
    sandbox.fault = Fault(mode="slow", delay_s=0.5)
    assert await agent.post(event("m-1")) == 204
    await sandbox.wait_for(lambda sandbox: sandbox.requests == 1, timeout_s=10)
    assert await agent.stop() == 0
    assert [arrival.message_id for arrival in sandbox.stored] == ["m-1"]
    assert not agent.outbox.with_name("outbox.db-wal").exists()


async def test_an_event_that_a_firewall_refuses_does_not_hold_the_others(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="status", status=403, match='"disliked"')
    assert await agent.post(event("disliked", "a")) == 204
    await agent.until(lambda status: status["state"] == "held")
    for number in range(100):
        assert await agent.post(event(f"good-{number}", f"b-{number % 3}")) == 204

    status = await agent.until(lambda status: status["delivered"] == 100)
    assert (status["pending"], status["dead"]) == (1, 0)
    sandbox.fault = Fault(mode="ok")
    await agent.ask("POST", "flush")
    await agent.until(lambda status: status["delivered"] == 101)


async def test_an_event_that_alone_times_out_is_set_aside_in_the_end(
    agent: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="cut_before", match='"poison"')
    assert await agent.post(event("poison", "a")) == 204
    number = 0
    while not (await agent.status())["dead"]:
        assert await agent.post(event(f"good-{number}", "b")) == 204
        await agent.until(lambda status, n=number: status["delivered"] > n)  # type: ignore[misc]
        number += 1
    letter = await agent.ask("GET", "events/poison")
    assert (letter["reason"], letter["status"]) == ("gave_up", None)


async def test_what_was_evicted_in_an_outage_is_not_sent_after_it(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="down")
    async with running_agent(
        tmp_path,
        upstream=f'url = "{sandbox.url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"',
        forward=FORWARD,
        outbox='max_size = "1MiB"\nwhen_full = "drop_oldest"',
    ) as agent:
        for number in range(500):
            body = {**event(f"m-{number}"), "properties": {"text": "x" * 3000}}
            assert await agent.post(body) == 204
        full = await agent.status()
        assert full["evicted"] > 100
        sandbox.fault = Fault(mode="ok")
        await agent.ask("POST", "flush")
        drained = await agent.until(lambda status: status["pending"] == 0)

    assert drained["delivered"] + drained["discarded"] == 500
    assert len(sandbox.stored) == drained["delivered"]


async def test_a_form_cannot_steer_the_agent(agent: AgentProcess) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        refused = await agent.ask("POST", "pause", content_type=content_type)
        assert refused["statusCode"] == 415
    assert (await agent.status())["state"] == "flowing"
