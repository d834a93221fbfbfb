"""Scenes of `test_link.py`, each played in a network namespace of its own: link_scene.py SCENE FOLDER.

Only loopback there, as plain HTTP goes nowhere else: the upstream listens on 127.7.7.7, an address
that does not exist until the scene adds it. The backoff takes an hour, so that what arrives does so
because the kernel said that the network changed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from processes import DEADLINE_S, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.forward import link

UPSTREAM = "127.7.7.7"
FORWARD = 'backoff_base = "1h"\nbackoff_max = "1h"'
BURST = 200


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def begin() -> None:
    """Leave 127.0.0.1 alone, where apps post, of the whole 127.0.0.0/8."""
    ip("link", "set", "lo", "up")
    ip("address", "del", "127.0.0.1/8", "dev", "lo")
    ip("address", "add", "127.0.0.1/32", "dev", "lo")


def event(number: int) -> dict[str, object]:
    return {"messageId": f"m-{number}", "event": "Item Sold", "userId": "1043"}


def upstream(sandbox: Sandbox) -> str:
    port = sandbox.url.rpartition(":")[2]
    return f'url = "http://{UPSTREAM}:{port}"\nwrite_key = "{DEFAULT_WRITE_KEY}"'


async def address(folder: Path) -> None:
    """An event that waits for an hour is sent when an address comes."""
    sandbox = Sandbox()
    async with (
        sandbox.serving("0.0.0.0"),
        running_agent(folder, upstream=upstream(sandbox), forward=FORWARD) as agent,
    ):
        await agent.post(event(1))
        await agent.until(lambda status: bool(status["state"] == "backing_off"))
        ip("address", "add", f"{UPSTREAM}/32", "dev", "lo")
        await sandbox.wait_for(lambda sandbox: len(sandbox.stored) == 1, DEADLINE_S)
        await agent.until(lambda status: bool(status["state"] == "flowing"))
        assert await agent.stop() == 0


async def retry_after(folder: Path) -> None:
    """What the upstream asked for is waited out, whatever comes; then `flush` sends it."""
    ip("address", "add", f"{UPSTREAM}/32", "dev", "lo")
    sandbox = Sandbox()
    sandbox.fault = Fault(mode="status", status=429, retry_after="3600", times=1)
    told = asyncio.Event()
    async with (
        sandbox.serving("0.0.0.0"),
        running_agent(folder, upstream=upstream(sandbox), forward=FORWARD) as agent,
    ):
        await agent.post(event(1))
        await agent.until(lambda status: bool(status["state"] == "backing_off"))
        with link.watching(told.set):
            ip("address", "add", "127.7.7.8/32", "dev", "lo")
            async with asyncio.timeout(DEADLINE_S):
                await told.wait()
        # Told here, so told there, for both heard it at once; a change later it is still one request.
        with link.watching(told.set):
            told.clear()
            ip("address", "add", "127.7.7.9/32", "dev", "lo")
            async with asyncio.timeout(DEADLINE_S):
                await told.wait()
        assert sandbox.requests == 1
        assert (await agent.status())["state"] == "backing_off"
        await agent.ask("POST", "flush")
        await sandbox.wait_for(lambda sandbox: len(sandbox.stored) == 1, DEADLINE_S)


async def burst(_: Path) -> None:
    """Dozens of messages are told of once, and what comes after the telling is told of again."""
    tellings: asyncio.Queue[float] = asyncio.Queue()
    now_s = asyncio.get_running_loop().time
    with link.watching(lambda: tellings.put_nowait(now_s())):
        add_addresses(range(BURST))
        async with asyncio.timeout(DEADLINE_S):
            await tellings.get()
        ip("address", "add", "127.8.0.1/32", "dev", "lo")
        async with asyncio.timeout(DEADLINE_S):
            await tellings.get()
        assert tellings.empty()


async def overflow(_: Path) -> None:
    """More messages than the socket holds are a change, too: here each of them alone would be none."""
    told = asyncio.Event()
    with link.watching(told.set):
        # Not one of them is read before all have been sent: this thread does both.
        add_routes_that_do_not_count()
        async with asyncio.timeout(DEADLINE_S):
            await told.wait()


def add_addresses(numbers: range) -> None:
    batch = "".join(f"address add 127.9.0.{number}/32 dev lo\n" for number in numbers)
    subprocess.run(["ip", "-batch", "-"], input=batch.encode(), check=True)


def add_routes_that_do_not_count() -> None:
    """Make the kernel tell thousands of times of routes to the machine itself."""
    lines = [f"route add local 127.{n // 250}.1.{n % 250}/32 dev lo" for n in range(4_000)]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines).encode(), check=True)


SCENES: dict[str, Callable[[Path], Awaitable[None]]] = {
    "address": address,
    "burst": burst,
    "overflow": overflow,
    "retry_after": retry_after,
}


async def play(name: str, folder: Path) -> None:
    await SCENES[name](folder)


if __name__ == "__main__":
    begin()
    asyncio.run(play(sys.argv[1], Path(sys.argv[2])))
