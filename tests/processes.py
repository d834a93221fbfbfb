"""The real daemon as a process, for tests: started, asked, killed, started again."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

DEADLINE_S = 30.0
"""For anything waited for; generous, for a busy machine. Nothing is asserted about time."""

_POLL_S = 0.02


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environ() -> dict[str, str]:
    """Return the environment in which any Python finds the agent, its libraries and these tests."""
    tests = Path(__file__).parent
    libraries = [path for path in sys.path if path.endswith("-packages")]
    paths = [str(tests.parent), str(tests), *libraries]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class AgentProcess:
    """One agent of one configuration, through any number of processes."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession, **sections: str) -> None:
        """*sections* are bodies of TOML tables; ingest.port and outbox.path are set here."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.outbox = folder / "outbox.db"
        self.config = folder / "config.toml"
        self.log = folder / "agent.log"
        self.command = [sys.executable, "-m", "agent"]
        """How the agent is started; a fault proof puts another program in front, or a bug inside."""
        self.environ = environ()
        self._session = session
        self._process: asyncio.subprocess.Process | None = None
        bodies = {"ingest": "", "outbox": "", **sections}
        bodies["ingest"] += f"\nport = {self.port}"
        bodies["outbox"] += f'\npath = "{self.outbox}"'
        self.config.write_text("".join(f"[{name}]\n{body}\n" for name, body in bodies.items()))

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "the agent was not started"
        return self._process

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start a process; return when it accepts events."""
        await self.launch()
        assert await self.becomes_ready(), f"exit {self.process.returncode}: {self.log.read_text()}"

    async def launch(self) -> None:
        """Start a process; return while it may still be starting."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command, "run", "--config", str(self.config), stderr=log, env=self.environ
            )

    async def becomes_ready(self) -> bool:
        """Return True as soon as the process accepts events, False if it ends instead."""
        async with asyncio.timeout(DEADLINE_S):
            while not await self._is_ready():
                if not self.alive:
                    return False
                await asyncio.sleep(_POLL_S)  # another process
        return True

    async def _is_ready(self) -> bool:
        try:
            async with self._session.get(f"{self.url}/readyz") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def kill(self) -> None:
        """End the process as a power cut would: SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> int:
        """End the process as the service manager would; return its exit code."""
        if self.alive:
            self.process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()

    async def run_command(self, *arguments: str) -> tuple[int, str]:
        """Run another command of the agent; return its exit code and what it said."""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *arguments,
            "--config",
            str(self.config),
            stdout=asyncio.subprocess.PIPE,
            env=self.environ,
        )
        async with asyncio.timeout(DEADLINE_S):
            said, _ = await process.communicate()
        return await process.wait(), said.decode()

    async def post(self, body: dict[str, Any], endpoint: str = "track") -> int:
        """Post one request as an app would; return the status."""
        async with self._session.post(
            f"{self.url}/api/public/apps/{endpoint}",
            data=io.BytesIO(msgspec.json.encode(body)),
            headers={"Content-Type": "application/json"},
        ) as response:
            await response.read()
            return response.status

    async def status(self) -> dict[str, Any]:
        return await self.ask("GET", "status")

    async def get(self, path: str) -> str:
        """Return what a GET of *path* is answered with 200."""
        async with self._session.get(f"{self.url}{path}") as response:
            assert response.status == 200
            return await response.text()

    async def ask(
        self, method: str, path: str, body: object = None, *, content_type: str = ""
    ) -> dict[str, Any]:
        """Call the control API; return its JSON."""
        headers = {"Content-Type": content_type} if content_type else {}
        async with self._session.request(
            method, f"{self.url}/api/agent/{path}", json=body, headers=headers
        ) as response:
            answer: dict[str, Any] = json.loads(await response.read())
            return answer

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first status that *condition* holds for."""
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not condition(status := await self.status()):  # noqa: ASYNC110  # it is another process
                    await asyncio.sleep(_POLL_S)  # another process
        except TimeoutError:
            raise AssertionError(f"never so: {status}\n{self.log.read_text()[-2000:]}") from None
        return status


@asynccontextmanager
async def running_agent(folder: Path, **sections: str) -> AsyncIterator[AgentProcess]:
    """Start an agent in *folder* with these sections of configuration; end it with the block."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        agent = AgentProcess(folder, session, **sections)
        await agent.start()
        try:
            yield agent
        finally:
            if agent.alive:
                await agent.kill()
