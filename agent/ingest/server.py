"""The listener: sockets, deadlines and bytes. The one module that knows aiohttp's server.

A client that stalls while it sends is closed within 15 s at each stage; one that does not read its
answer has no deadline of its own yet:

| stage                              | deadline                                   |
| ---------------------------------- | ------------------------------------------ |
| before, between and in the headers | `IDLE_S` since the last answer             |
| in the body                        | `BODY_S` since its headers, answered 408   |
| after a refusal sent before the body | `LINGER_S` more, so that the client reads it |
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote

import structlog
from aiohttp import web

from agent.errors import AgentError
from agent.exchange import Answer, Handler, Request, refuse
from agent.ingest.guard import Guard

IDLE_S = 12.0
BODY_S = 10.0
LINGER_S = 2.0

STOP_S = 3.0
"""How long answers in flight may take once the agent stops; a commit takes milliseconds."""

READING_BYTES = 64 * 1024 * 1024
"""Bodies that may be half read at once: a dozen of the largest, thousands of ordinary ones."""

_BACKLOG = 1024
"""Connections the kernel holds ready: apps that all start at boot must not be refused."""

log = structlog.get_logger()


class Server:
    """Turns aiohttp's requests into plain ones for *handler*, and its answers back."""

    def __init__(self, guard: Guard, handler: Handler) -> None:
        self._guard = guard
        self._handler = handler
        self._reading_bytes = 0

    async def handle(self, request: web.BaseRequest) -> web.Response:
        # One reading of the target, for guard and routes: two could differ.
        path = unquote(request.raw_path.partition("?")[0])
        try:
            answer = self._guard.judge(request.headers, path) or await self._answer(request, path)
        except Exception:  # the one place that turns a bug into a 500 instead of a dead connection
            log.exception("request.failed", path=path)
            answer = refuse(500, "AGENT_BUG", "the agent failed on this request; see its log")
        response = web.Response(
            status=answer.status,
            body=answer.body or None,
            headers={
                "Server": "tranthor-agent",
                **answer.headers,
                **self._guard.cors(request.headers),
            },
        )
        if answer.body:
            response.headers["Content-Type"] = answer.content_type
        if answer.close:
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest, path: str) -> Answer:
        if not path.startswith("/"):
            return refuse(400, "AGENT_BAD_TARGET", "request target: expected a path", close=True)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return Answer(status=204)  # the preflight of an allowed page; cors() says what it may
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await self._read_body(request)
        if isinstance(body, bytes):
            body = self._guard.inflate(body, request.headers.get("Content-Encoding", "identity"))
        if isinstance(body, Answer):
            return body
        return await self._handler(
            Request(
                method=request.method,
                path=path,
                query=request.query,
                headers=request.headers,
                body=body,
            )
        )

    async def _read_body(self, request: web.BaseRequest) -> bytes | Answer:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                while chunk := await request.content.readany():
                    chunks.append(chunk)
                    size += len(chunk)
                    self._reading_bytes += len(chunk)
                    if size > self._guard.max_body_bytes:  # chunked: no length to judge before
                        return self._guard.too_large()
                    if self._reading_bytes > READING_BYTES:
                        return refuse(
                            503,
                            "AGENT_OVERLOADED",
                            f"{READING_BYTES} bytes of other requests are being read;"
                            " send again shortly",
                            retry_after_s=1,
                            close=True,
                        )
        except TimeoutError:
            return refuse(
                408,
                "AGENT_BODY_TIMEOUT",
                f"body: {size} bytes came in {BODY_S:.0f} s, then no more; send it whole",
                close=True,
            )
        except web.RequestPayloadError as exc:
            return refuse(400, "AGENT_BAD_BODY", f"body: {exc}", close=True)
        finally:
            self._reading_bytes -= size
        return b"".join(chunks)


@asynccontextmanager
async def serving(
    guard: Guard,
    handler: Handler,
    *,
    host: str,
    port: int,
    unix_socket: str = "",
    inherited: Sequence[socket.socket] = (),
) -> AsyncIterator[list[str]]:
    """Answer requests while the block runs; yields the addresses bound, as URLs or socket paths.

    With *inherited* sockets (of a .socket unit) those are listened on, and host and port are not.

    On leaving: no new connections, idle ones closed, answers in flight finished (up to `STOP_S`).
    Raises `AgentError` if an address cannot be bound.
    """
    server = web.Server(
        Server(guard, handler).handle,
        access_log=None,
        logger=_QUIET,
        keepalive_timeout=IDLE_S,
        lingering_time=LINGER_S,
        auto_decompress=False,
    )
    runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=STOP_S)
    await runner.setup()
    try:
        for listening in inherited:
            await web.SockSite(runner, listening, backlog=_BACKLOG).start()
        if not inherited:
            await _bind(
                web.TCPSite(runner, host, port, backlog=_BACKLOG).start,
                f"{host}:{port}",
                "set ingest.port to a free one",
            )
        if unix_socket:
            _require_unused(unix_socket)
            await _bind(
                web.UnixSite(runner, unix_socket, backlog=_BACKLOG).start,
                unix_socket,
                "set ingest.unix_socket to another path",
            )
            # Whoever may enter its folder may post; the umask would have shut out the group.
            Path(unix_socket).chmod(0o660)  # noqa: ASYNC240  # one local call
        yield [_shown(address) for address in runner.addresses]
    finally:
        await runner.cleanup()


_QUIET = logging.getLogger("agent.ingest.aiohttp")
# It would log malformed requests raw: events, user ids and the keys of apps.
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False


def _require_unused(unix_socket: str) -> None:
    """Refuse the socket of a living agent, which binding would silently replace."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(unix_socket)
        except OSError:
            return
    raise AgentError(
        f"{unix_socket}: another agent listens on it; set ingest.unix_socket to another path"
    )


async def _bind(start: Callable[[], Awaitable[None]], address: str, remedy: str) -> None:
    try:
        await start()
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise AgentError(
                f"{address}: already in use; another agent may be running"
                f" (tranthor-agent status), or {remedy}"
            ) from exc
        raise AgentError(f"{address}: cannot listen ({exc.strerror or exc}); {remedy}") from exc


def _shown(address: object) -> str:
    match address:
        case (str(host), int(port), *_):
            return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        case _:
            return str(address)
