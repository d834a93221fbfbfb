"""The websites that a browser visits, all on loopback under made-up names, and what stands before the agent.

A website serves one empty page; what happens in it is the test's. The relay is between browser and
agent, and keeps what passed: so a test can tell that a trick was tried, and what it was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web
from processes import DEADLINE_S

_WORKER = """
onmessage = async ({data, source}) => {
    const said = await fetch(data.url, {method: "POST", body: data.body})
        .then(answer => String(answer.status), String);
    (source ?? self).postMessage(said);
};
"""
"""Serves as a worker and as a service worker, which answers to the page that asked."""


async def _page(request: web.Request) -> web.Response:
    """`/?referrer=no-referrer` is a page that keeps back where it comes from."""
    policy = request.query.get("referrer", "strict-origin-when-cross-origin")
    return web.Response(
        text="<!doctype html><title>page</title>",
        content_type="text/html",
        headers={"Referrer-Policy": policy},
    )


async def _worker(_: web.Request) -> web.Response:
    return web.Response(text=_WORKER, content_type="text/javascript")


async def _redirect(request: web.Request) -> web.Response:
    """`/to?url=…` sends whoever asks on to there, with method and body: 307."""
    return web.Response(status=307, headers={"Location": request.query["url"]})


@asynccontextmanager
async def website(
    host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Serve a website under whatever names lead here; yields its port."""
    app = web.Application()
    app.router.add_get("/", _page)
    app.router.add_get("/worker.js", _worker)
    app.router.add_route("*", "/to", _redirect)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def certificate(folder: Path) -> ssl.SSLContext:
    """Return TLS for a website, with a certificate that a browser must be told to put up with."""
    made = ("-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-subj", "/CN=test", *made],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return tls


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """A request that came to the agent, and the status of its answer; None while there is none."""

    method: str
    target: str
    headers: dict[str, str]
    status: int | None


# Bodies of these tests hold nothing of the kind, so that the heads can be told among them.
_REQUEST = re.compile(rb"([A-Z]+) (/\S*) HTTP/1\.1\r\n((?:[^\r\n]+\r\n)*)\r\n")
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@dataclass(slots=True)
class _Talk:
    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)

    def passed(self) -> list[Passed]:
        requests = _REQUEST.findall(self.asked)
        statuses: list[int | None] = [int(code) for code in _STATUS.findall(self.answered)]
        statuses += [None] * (len(requests) - len(statuses))
        return [
            Passed(
                method=method.decode(),
                target=target.decode(),
                headers=dict(
                    line.lower().split(": ", 1) for line in lines.decode().strip().split("\r\n")
                ),
                status=status,
            )
            for (method, target, lines), status in zip(requests, statuses, strict=True)
        ]


class Relay:
    """Passes on what browser and agent say, byte by byte, and keeps it."""

    def __init__(self, agent_port: int) -> None:
        self._agent_port = agent_port
        self._talks: list[_Talk] = []
        self._passing: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
        """Be the agent's front there; yields its URL."""
        server = await asyncio.start_server(self._take, host, port)
        try:
            host, port = server.sockets[0].getsockname()
            yield f"http://{host}:{port}"
        finally:
            server.close()
            for writer in itertools.chain.from_iterable(self._passing.values()):
                writer.transport.abort()
            await asyncio.gather(*self._passing)

    def passed(self, mark: str) -> list[Passed]:
        """Return the requests so far that have *mark* in their target."""
        return [each for talk in self._talks for each in talk.passed() if mark in each.target]

    async def answered(self, mark: str) -> list[Passed]:
        """Wait until a request with *mark* came, and all of them are answered."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (passed := self.passed(mark)) or None in {it.status for it in passed}:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{mark}: nothing came, or no answer: {passed}") from None
        return passed

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talk = _Talk()
        self._talks.append(talk)
        agent, to_agent = await asyncio.open_connection("127.0.0.1", self._agent_port)
        self._passing[task] = (writer, to_agent)
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pass(reader, to_agent, talk.asked))
                ways.create_task(self._pass(agent, writer, talk.answered))
        finally:
            to_agent.transport.abort()
            writer.transport.abort()
            del self._passing[task]

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                kept += data
                writer.write(data)
                await writer.drain()
                self._changed.set()
        if not writer.transport.is_closing():
            writer.write_eof()
