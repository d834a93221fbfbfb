"""A fresh event does not wait behind a backlog, and its user's order holds: with the real daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from processes import AgentProcess, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox

BACKLOG = 4000
USERS = 50
SENT_BEFORE = 300

pytestmark = pytest.mark.process


async def post(agent: AgentProcess, name: str, user: str) -> None:
    assert await agent.post({"messageId": name, "event": "Sold", "userId": user}) == 204


async def fill(agent: AgentProcess) -> None:
    numbers = iter(range(BACKLOG))

    async def app() -> None:
        for number in numbers:
            await post(agent, f"m{number}", f"u{number % USERS}")

    async with asyncio.TaskGroup() as apps:
        for _ in range(16):
            apps.create_task(app())


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_fresh_event_overtakes_the_backlog_of_others_and_none_of_its_own_user(
    tmp_path: Path, restarted: bool
) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    async with sandbox.serving() as url:
        upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\n'
        async with running_agent(tmp_path, upstream=upstream, forward="concurrency = 1") as agent:
            await agent.ask("POST", "pause")
            await fill(agent)
            if restarted:
                await agent.kill()
                await agent.start()
            sandbox.fault = Fault(mode="slow", delay_s=0.005)
            await agent.ask("POST", "resume")
            await sandbox.wait_for(lambda seen: len(seen.stored) >= SENT_BEFORE, timeout_s=30)
            await post(agent, "fresh", "somebody new")
            await post(agent, "late", "u7")
            await sandbox.wait_for(
                lambda seen: any(each.message_id == "fresh" for each in seen.stored), timeout_s=30
            )
            sent = len(sandbox.stored)
            assert sent < BACKLOG / 2, "it waited for the backlog"
            sandbox.fault = Fault(mode="ok")
            await agent.until(lambda status: status["pending"] == 0)
    names = [arrival.message_id for arrival in sandbox.stored]
    assert len(names) == len(set(names)) == BACKLOG + 2
    own = [name for name, each in zip(names, sandbox.stored, strict=True) if each.user == "u7"]
    assert own[-1] == "late"
