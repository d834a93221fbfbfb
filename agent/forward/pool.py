"""The connections to one upstream: opened by aiohttp, kept alive, used again.

aiohttp finds the address, tries several side by side, speaks TLS and asks a proxy for a tunnel. What
then goes over a connection is `agent.forward.wire`'s.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from yarl import URL

from agent.forward.disposition import Response
from agent.forward.plan import Target
from agent.forward.wire import Wire

_KEEPALIVE_S = 60.0
"""Below the upstream's own 72 s: whoever closes first should be us, between requests."""

_OF_EACH_REQUEST = frozenset({"content-length"})
"""Header fields that differ from request to request: `Pool.post` writes them."""


class Pool:
    """The connections to one upstream, and what they have in common. Made by `open_pool`."""

    def __init__(
        self,
        connector: aiohttp.BaseConnector,
        target: Target,
        headers: Mapping[str, str],
        *,
        connections: int,
        keepalive_s: float,
    ) -> None:
        self._connector = connector
        self._target = target
        self._headers = headers
        self._connections = connections
        self._keepalive_s = keepalive_s
        self._loop = asyncio.get_running_loop()
        self._total_s = target.connect_timeout_s + target.timeout_s
        """How long a request may take, with the connection that it may need."""
        self._open: dict[Wire, Connection] = {}
        """Each with aiohttp's hold on it."""
        self._idle: list[Wire] = []
        """Those that carry no request, the last used at the end."""
        self._sweep_due: asyncio.TimerHandle | None = None
        self._field_lines = b""
        """What every request has of them, as aiohttp makes them when it connects."""
        self._request_lines: dict[str, bytes] = {}
        """By path."""

    async def post(self, path: str, body: bytes, tls: ssl.SSLContext) -> Response:
        """POST *body* once; *tls* is for a connection that must be opened.

        Raises `aiohttp.ClientError`, `TimeoutError` or `OSError`.
        """
        deadline_s = self._loop.time() + self._total_s
        line = self._request_lines.get(path) or self._request_line(path)
        wire = self._last_idle() or await self._connect(tls)
        answer = await wire.exchange(
            b"%b%bContent-Length: %d\r\n\r\n%b" % (line, self._field_lines, len(body), body),
            deadline_s=deadline_s,
        )
        if not wire.closed:
            self._keep(wire)
        return answer

    def close(self) -> None:
        """Close every connection, whatever is under way."""
        for wire in list(self._open):
            wire.close()
        if self._sweep_due is not None:
            self._sweep_due.cancel()

    # --- opening ---

    async def _connect(self, tls: ssl.SSLContext) -> Wire:
        """Open one. Raises `aiohttp.ConnectionTimeoutError` if that takes too long; else as `post`."""
        proxy = self._target.proxy
        request = aiohttp.ClientRequest(
            "POST",
            _url(self._target.url),
            headers=self._headers,
            ssl=tls,
            proxy=None if proxy is None else _url(proxy),
        )
        timeout = aiohttp.ClientTimeout(sock_connect=self._target.connect_timeout_s)
        try:
            async with asyncio.timeout(self._total_s):
                connection = await self._connector.connect(request, [], timeout)
        except TimeoutError as exc:
            raise aiohttp.ConnectionTimeoutError from exc
        # With the proxy's, if it wants them here.
        self._field_lines = _field_lines(request.headers.items())
        return self._adopt(connection, request.connection_key)

    def _adopt(self, connection: Connection, key: ConnectionKey) -> Wire:
        transport, so_far = connection.transport, connection.protocol
        if transport is None or so_far is None or transport.is_closing() or so_far.should_close:
            connection.close()
            # Whatever it said is gone, and would be missed as the answer.
            reason = OSError("the other side hung up, or spoke before it was asked")
            raise aiohttp.ClientConnectorError(key, reason)
        wire = Wire(silence_s=self._target.timeout_s, lost=self._forget)
        wire.connection_made(transport)
        transport.set_protocol(wire)
        self._open[wire] = connection
        return wire

    def _request_line(self, path: str) -> bytes:
        url = _url(self._target.url.rstrip("/") + path)
        # A proxy without a tunnel is told the whole address (RFC 9112, section 3.2.2).
        whole = self._target.proxy is not None and url.scheme == "http"
        line = f"POST {url if whole else url.raw_path_qs} HTTP/1.1\r\n".encode()
        self._request_lines[path] = line
        return line

    # --- keeping ---

    def _keep(self, wire: Wire) -> None:
        if len(self._idle) >= self._connections:
            wire.close()
            return
        wire.idle_since_s = self._loop.time()
        self._idle.append(wire)
        if self._sweep_due is None:
            self._sweep_due = self._loop.call_later(self._keepalive_s, self._sweep)

    def _last_idle(self) -> Wire | None:
        """Return a connection to use again; None if there is none."""
        while self._idle:
            wire = self._idle.pop()
            if not wire.closed:  # it is told a little later than its transport knows
                return wire
        return None

    def _sweep(self) -> None:
        """Close what was idle for too long."""
        since_s = self._loop.time() - self._keepalive_s
        for wire in [wire for wire in self._idle if wire.idle_since_s <= since_s]:
            wire.close()
        self._sweep_due = None
        if self._idle:
            due_s = self._idle[0].idle_since_s + self._keepalive_s
            self._sweep_due = self._loop.call_at(due_s, self._sweep)

    def _forget(self, wire: Wire) -> None:
        if (connection := self._open.pop(wire, None)) is not None:
            connection.close()
        if wire in self._idle:
            self._idle.remove(wire)


@asynccontextmanager
async def open_pool(
    target: Target,
    headers: Mapping[str, str],
    *,
    connections: int,
    keepalive_s: float = _KEEPALIVE_S,
) -> AsyncIterator[Pool]:
    """Yield the connections to *target*, at most so many kept alive while the block runs.

    *headers* go with each request. A connection is closed that carried none for *keepalive_s*.
    """
    async with aiohttp.TCPConnector(limit=0, ttl_dns_cache=60) as connector:
        pool = Pool(connector, target, headers, connections=connections, keepalive_s=keepalive_s)
        try:
            yield pool
        finally:
            pool.close()


def _url(text: str) -> URL:
    try:
        return URL(text)
    except ValueError as exc:
        raise aiohttp.InvalidURL(text) from exc


def _field_lines(headers: Iterable[tuple[str, str]]) -> bytes:
    return b"".join(
        f"{name}: {value}\r\n".encode()
        for name, value in headers
        if name.lower() not in _OF_EACH_REQUEST
    )
