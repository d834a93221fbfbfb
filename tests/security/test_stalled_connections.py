"""Clients that stall or never leave: hundreds are cut off, and honest posts go on meanwhile.

How long honest posts take meanwhile is a benchmark: `python -m benchmarks B12`.

Planted bugs that these were seen to find: a server that does not look after its connections, a body
without a deadline, no bound on connections, one that is not lifted again, and a line in the log for
each refusal.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from socket import socket

import pytest
from processes import DEADLINE_S, AgentProcess, running_agent
from security.raw import event, head, post, statuses, talk, troubles

from agent.console.sandbox import DEFAULT_WRITE_KEY, Sandbox

pytestmark = pytest.mark.process

STALLED = 500

PATIENCE_S = 60.0
"""Four times as long as the agent may take: a busy machine is no fault."""


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[AgentProcess]:
    async with running_agent(tmp_path) as agent:
        yield agent


async def heard(client: socket) -> bytes:
    """Return what comes until the agent hangs up."""
    answered = b""
    while piece := await asyncio.get_running_loop().sock_recv(client, 65_536):
        answered += piece
    return answered


async def test_500_clients_that_stall_are_all_told_and_closed(agent: AgentProcess) -> None:
    loop, pid = asyncio.get_running_loop(), agent.process.pid
    stages = {
        "head": (head()[:-2], (408,)),
        "body": (post(event("stalled"))[:-1], (408,)),
        "idle": (post(event("idle")), (204,)),
    }
    expected, listening = [], []
    with ExitStack() as stack:
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            for number in range(STALLED):
                sent, answers = stages[list(stages)[number % len(stages)]]
                client = stack.enter_context(socket())
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", agent.port))
                await loop.sock_sendall(client, sent)
                listening.append(tasks.create_task(heard(client)))
                expected.append(answers)
            # They are all there, and nobody else waits for them.
            for number in range(50):
                honest = {"messageId": f"honest-{number}", "event": "e", "userId": "u"}
                assert await agent.post(honest) == 204
    assert [statuses(client.result()) for client in listening] == expected
    assert (await agent.status())["accepted"] == 51
    assert not troubles(agent, pid)


# --- more than there is room for ---

FILES = 200
"""What the agent may open here, where 8192 are usual."""

CLIENTS = 300


@contextmanager
def few_files() -> Iterator[None]:
    """Let processes that start in the block open few files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_more_clients_than_there_is_room_for_are_told_and_the_others_are_served(
    tmp_path: Path,
) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(sandbox.serving())
        with few_files():
            agent = await stack.enter_async_context(
                running_agent(
                    tmp_path, upstream=f'url = "{upstream}"\nwrite_key = "{DEFAULT_WRITE_KEY}"'
                )
            )
        pid = agent.process.pid
        for crowd in range(2):
            await be_crowded(agent, sandbox, f"crowd-{crowd}")
            lines = logged(agent)
            assert lines.count("connections.exhausted") == crowd + 1
            assert lines.count("connections.available") == crowd + 1
        assert not troubles(agent, pid)


async def be_crowded(agent: AgentProcess, sandbox: Sandbox, message_id: str) -> None:
    """Keep more connections than there may be; leave when one of them was served and all went."""
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        clients = []
        for _ in range(CLIENTS):
            clients.append(stack.enter_context(socket()))
            clients[-1].setblocking(False)
            await loop.sock_connect(clients[-1], ("127.0.0.1", agent.port))
        async with asyncio.timeout(DEADLINE_S):
            refused = await heard(clients[-1])
            assert statuses(refused) == (503,)
            assert b"Retry-After: 1\r\n" in refused
            # The first is still served, and its event reaches the upstream.
            await loop.sock_sendall(clients[0], post(event(message_id)))
            assert statuses(await loop.sock_recv(clients[0], 65_536)) == (204,)
        await sandbox.wait_for(
            lambda sandbox: message_id in {stored.message_id for stored in sandbox.stored},
            DEADLINE_S,
        )
    async with asyncio.timeout(DEADLINE_S):
        while statuses(await talk(agent.port, post(event(f"after-{message_id}")))) != (204,):
            pass
        while logged(agent)[-1] != "connections.available":  # noqa: ASYNC110  # it is another process
            await asyncio.sleep(0.02)  # another process


def logged(agent: AgentProcess) -> list[str]:
    return [json.loads(line)["event"] for line in agent.log.read_text().splitlines()]
