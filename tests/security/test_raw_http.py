"""Hostile bytes to a real daemon: each answered as it must be, and the next honest post is a 204.

Planted bugs that these were seen to find: any coding with "chunked" in it taken for chunked, what
follows a compressed body left out, a body unpacked without a bound, extensions and trailers read
without one, and connections that are remembered when they have gone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from processes import DEADLINE_S, AgentProcess, running_agent
from security.hostile import GROUPS, HIDDEN, LIMIT_BYTES, MIB, Case
from security.raw import event, head, memory_bytes, post, statuses, talk, troubles

from agent.ingest.wire import READING_BYTES

pytestmark = pytest.mark.process

INGEST = f'max_body = "{LIMIT_BYTES}B"'


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[AgentProcess]:
    async with running_agent(tmp_path, ingest=INGEST) as agent:
        yield agent


def test_there_are_cases_enough_and_each_has_its_name() -> None:
    for cases in GROUPS.values():
        assert len({case.name for case in cases}) == len(cases)
    assert sum(map(len, GROUPS.values())) >= 60


@pytest.mark.parametrize("group", GROUPS)
async def test_hostile_bytes_get_their_answer_and_store_nothing_else(
    agent: AgentProcess, group: str
) -> None:
    pid, wrong = agent.process.pid, []
    for number, case in enumerate(GROUPS[group]):
        accepted = (await agent.status())["accepted"]
        wrong += await flaws(agent, case)
        stored = (await agent.status())["accepted"] - accepted
        if stored != case.stored:
            wrong.append(f"{case.name}: {stored} events stored, expected {case.stored}")
        honest = await agent.post({"messageId": f"h{number}", "event": "e", "userId": "u"})
        if honest != 204:
            wrong.append(f"{case.name}: an honest post after it is answered {honest}")
    assert not wrong, "\n".join(wrong)
    listed = await agent.ask("GET", "events?limit=1000")
    assert HIDDEN not in {found["messageId"] for found in listed["events"]}
    assert not troubles(agent, pid)


async def flaws(agent: AgentProcess, case: Case) -> list[str]:
    """Return what is wrong with the answers to one case."""
    answered = await talk(agent.port, case.sent)
    try:
        found = statuses(answered, case.sent)
    except ValueError as exc:
        return [f"{case.name}: {exc}"]
    if found != case.answers:
        return [f"{case.name}: {found}, expected {case.answers}: {answered[-300:]!r}"]
    return []


ROUNDS = 10
"""Of all cases: each time about 20 MB are read, and 400 MB would be unpacked if nothing stopped it."""

SLACK_BYTES = 4 * MIB
"""Ten times what a heap grows by that is in use as before; half of what connections alone would leave."""

PEAK_BYTES = 32 * MIB
"""What all this may take for a moment: less than half of one bomb."""


async def test_a_flood_of_it_leaves_memory_as_it_was(agent: AgentProcess) -> None:
    pid = agent.process.pid
    fresh_bytes = memory_bytes(pid)
    for _ in range(2):
        await flood(agent)
    warm_bytes = memory_bytes(pid)
    for _ in range(ROUNDS):
        await flood(agent)
    assert memory_bytes(pid) < warm_bytes + SLACK_BYTES
    assert memory_bytes(pid, "VmHWM") < fresh_bytes + PEAK_BYTES
    assert statuses(await talk(agent.port, post(event("at the end")))) == (204,)
    assert not troubles(agent, pid)


async def flood(agent: AgentProcess) -> None:
    for cases in GROUPS.values():
        for case in cases:
            for status in statuses(await talk(agent.port, case.sent), case.sent):
                assert status < 500, case.name


async def test_bodies_half_sent_by_many_are_refused_before_they_fill_memory(
    agent: AgentProcess,
) -> None:
    """Together they would be twice what may be half read; who came first may go on."""
    loop, pid = asyncio.get_running_loop(), agent.process.pid
    fresh_bytes = memory_bytes(pid)
    half = head(f"Content-Length: {LIMIT_BYTES}") + bytes(LIMIT_BYTES - 1)
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(2 * ROOM)]
        async with asyncio.timeout(DEADLINE_S):
            for client in clients:
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", agent.port))
                with suppress(ConnectionError):
                    await loop.sock_sendall(client, half)
            answered = await loop.sock_recv(clients[-1], 65_536)
        assert statuses(answered) == (503,)
        assert b"Retry-After: 1\r\n" in answered
        assert memory_bytes(pid) < fresh_bytes + READING_BYTES + PEAK_BYTES
    async with asyncio.timeout(DEADLINE_S):
        # As soon as it has noticed that they left.
        while statuses(await talk(agent.port, post(event("after them")))) != (204,):
            pass
    assert not troubles(agent, pid)


ROOM = READING_BYTES // LIMIT_BYTES
