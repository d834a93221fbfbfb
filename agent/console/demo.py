"""`demo`: the whole job on this machine, with real processes and no account.

A sandbox stands in for the upstream. The real daemon runs as a process of its own, on a free port,
with a temporary outbox. The link is cut, events go on being accepted, the daemon is even killed;
then the link returns, and what arrived is compared with what was acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.errors import AgentError

_USERS = 12
_CLIENTS = 8
"""Tills, and connections that post for them: each till's events come by one, in order."""

_ONLINE = 300
_OFFLINE = 900
"""Events posted before the cut, and on each side of the kill."""

_PACE_S = 0.012
"""Between two posts of one client: slow enough that a person sees the queue grow."""

_LOOK_S = 0.2
"""How often the demo looks for what it waits for."""

_DEADLINE_S = 30.0
"""For anything that the demo waits for; it takes about fifteen seconds in all."""

_CONFIG = """\
[ingest]
port = {port}
[outbox]
path = "{outbox}"
[upstream]
url = "{url}"
write_key = "{key}"
[forward]
backoff_max = "2s"   # the default is 5m; nobody watches a demo for that long
[log]
level = "error"
"""

Echo = Callable[[str], None]


@dataclass(slots=True)
class _Scene:
    """What the demo counts on its own, beside the agent."""

    sandbox: Sandbox
    session: aiohttp.ClientSession
    agent_url: str
    echo: Echo
    acknowledged: list[str] = field(default_factory=list)
    next_number: int = 0

    async def status(self) -> dict[str, Any]:
        async with self.session.get(f"{self.agent_url}/api/agent/status") as response:
            return msgspec.json.decode(await response.read())  # type: ignore[no-any-return]

    async def show(self, link: str) -> dict[str, Any]:
        """Print one line of how things stand."""
        status = await self.status()
        waiting = status["pending"]
        self.echo(
            f"  link {link:<4}  accepted {status['accepted']:>5}   arrived"
            f" {len(self.sandbox.stored):>5}   waiting {waiting:>5}  {'█' * (waiting // 60)}"
        )
        return status


async def run_demo(echo: Echo) -> bool:
    """Play the whole story, telling it by *echo*; return whether every sum matched."""
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    with tempfile.TemporaryDirectory(prefix="tranthor-agent-demo-") as folder:
        port = _free_port()
        config = Path(folder) / "config.toml"
        async with sandbox.serving() as url, aiohttp.ClientSession() as session:
            config.write_text(
                _CONFIG.format(
                    port=port, outbox=Path(folder) / "outbox.db", url=url, key=DEFAULT_WRITE_KEY
                )
            )
            scene = _Scene(sandbox, session, f"http://127.0.0.1:{port}", echo)
            return await _play(scene, config, url)


async def _play(scene: _Scene, config: Path, url: str) -> bool:
    echo = scene.echo
    echo(f"A sandbox upstream listens on {url}, the agent on {scene.agent_url}.")
    async with _agent(config, scene) as process:
        echo(f"\n1. The link is up: {_ONLINE} events of {_USERS} users.")
        await _post_and_watch(scene, _ONLINE, link="up")
        await _drained(scene)

        echo(f"\n2. The link is cut. The apps post on: {_OFFLINE} events.")
        scene.sandbox.fault = Fault(mode="down")
        await _post_and_watch(scene, _OFFLINE, link="CUT")

        echo("\n3. The agent itself is killed (SIGKILL, as a power cut would) and started again.")
        process.send_signal(signal.SIGKILL)
        await process.wait()
    async with _agent(config, scene):
        await scene.show("CUT")
        echo(f"\n4. Still no link: {_OFFLINE} more.")
        await _post_and_watch(scene, _OFFLINE, link="CUT")

        echo("\n5. The link returns.")
        scene.sandbox.fault = Fault(mode="ok")
        await _drained(scene)
        status = await scene.status()
    return _compare(scene, status)


def _compare(scene: _Scene, status: dict[str, Any]) -> bool:
    arrived = Counter(arrival.message_id for arrival in scene.sandbox.stored)
    lost = [message_id for message_id in scene.acknowledged if message_id not in arrived]
    twice = [message_id for message_id, times in arrived.items() if times > 1]
    disordered = _out_of_order(scene.sandbox)
    sums = status["accepted"] == status["delivered"] == len(scene.acknowledged) == len(arrived)
    scene.echo(
        f"\nacknowledged to the apps {len(scene.acknowledged):>6}"
        f"\naccepted by the agent    {status['accepted']:>6}"
        f"\ndelivered                {status['delivered']:>6}"
        f"\narrived upstream         {len(arrived):>6}"
        f"\nlost                     {len(lost):>6}"
        f"\narrived twice            {len(twice):>6}"
        f"\nusers out of order       {disordered:>6}"
    )
    matched = sums and not lost and not twice and not disordered
    scene.echo(
        "\nEvery sum matches: no event lost, none twice, each user's in order."
        if matched
        else "\nTHE SUMS DO NOT MATCH. Please report this with the lines above."
    )
    return matched


def _out_of_order(sandbox: Sandbox) -> int:
    """Return for how many users the events did not arrive in the order they were posted."""
    numbers: dict[str, list[int]] = {}
    for arrival in sandbox.stored:
        _, _, number = arrival.message_id.rpartition("-")
        numbers.setdefault(arrival.user or "", []).append(int(number))
    return sum(arrived != sorted(arrived) for arrived in numbers.values())


# --- the apps ---


async def _post_and_watch(scene: _Scene, count: int, *, link: str) -> None:
    async with asyncio.TaskGroup() as apps:
        numbers = range(scene.next_number, scene.next_number + count)
        scene.next_number += count
        by_client: list[list[int]] = [[] for _ in range(_CLIENTS)]
        for number in numbers:
            # One user's events come from one client, so that their order is known.
            by_client[number % _USERS % _CLIENTS].append(number)
        posting = [apps.create_task(_post(scene, mine)) for mine in by_client]
        while not all(task.done() for task in posting):
            await scene.show(link)
            await asyncio.wait(posting, timeout=0.5)
    await scene.show(link)


async def _post(scene: _Scene, numbers: list[int]) -> None:
    for number in numbers:
        message_id = f"demo-{os.getpid()}-{number}"
        async with scene.session.post(
            f"{scene.agent_url}/api/public/apps/track",
            json={
                "messageId": message_id,
                "event": "Item Sold",
                "userId": f"till-{number % _USERS}",
                "properties": {"number": number},
            },
        ) as response:
            if response.status != 204:
                raise AgentError(f"the agent answered {response.status}: {await response.text()}")
        scene.acknowledged.append(message_id)
        await asyncio.sleep(_PACE_S)


async def _drained(scene: _Scene) -> None:
    try:
        async with asyncio.timeout(_DEADLINE_S):
            while (await scene.show("up"))["pending"]:  # noqa: ASYNC110  # it is another process
                await asyncio.sleep(_LOOK_S)
    except TimeoutError as exc:
        raise AgentError(f"the outbox did not drain within {_DEADLINE_S:.0f} s") from exc


# --- the agent ---


@asynccontextmanager
async def _agent(config: Path, scene: _Scene) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the daemon as a process while the block runs; one that was killed meanwhile is fine."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent", "run", "--config", str(config)
    )
    try:
        await _ready(process, scene)
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _ready(process: asyncio.subprocess.Process, scene: _Scene) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_DEADLINE_S):
            while process.returncode is None:
                if await _accepts(scene):
                    return
                await asyncio.sleep(_LOOK_S)
    raise AgentError("the agent did not start; its own words stand above")


async def _accepts(scene: _Scene) -> bool:
    try:
        async with scene.session.get(f"{scene.agent_url}/readyz") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
