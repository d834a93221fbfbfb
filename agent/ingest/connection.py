"""One client's connection: when to read, when to answer, when to hang up.

The thin shell around `agent.ingest.wire`, which decides what the bytes mean. No task and no timer
of its own: the server looks at each connection every second. A client that stalls is cut off

| while it                  | after      | and is told          |
| ------------------------- | ---------- | -------------------- |
| sends nothing, or a head  | `idle_s`   | 408 if it had begun  |
| sends a body              | `body_s`   | 408                  |
| does not read its answer  | `write_s`  |                      |
| was refused and stays     | `linger_s` | the refusal, before  |
| waits, its side closed    | `linger_s` |                      |

counted from the last answer, for a body from its head, for the last from that closing. Who waits for
a GET and goes away is forgotten; a POST is carried out all the same. Who is one too many is told so
at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import structlog

from agent.exchange import STORED, Answer, Request, refuse
from agent.ingest.guard import Guard
from agent.ingest.reply import Handler, Later
from agent.ingest.sockets import user_at
from agent.ingest.wire import BODY, CLOSING, HEAD, PLAIN, STORED_PLAIN, Reader, Reading

MOST_CONNECTIONS = 2000
"""Far beyond what the apps of one machine open; each may take 100 KB before it has said who it is."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long a client may stall, in seconds; each ends at the latest one look later, within 15 s."""

    idle_s: float = 12.0
    """An app that posts every ten seconds keeps its connection."""
    body_s: float = 10.0
    """The largest body takes milliseconds over loopback: who needs longer has stopped sending."""
    write_s: float = 10.0
    """What does not fit into the socket's buffer is read at once, unless the client reads nothing."""
    linger_s: float = 2.0
    """Over loopback what was under way has long come in; who is slower has had its answer."""
    look_s: float = 1.0
    """Exact enough for the others, and it costs next to nothing."""
    stop_s: float = 3.0
    """For the answers in flight once the agent stops: a commit takes milliseconds."""


@dataclass(slots=True, kw_only=True)
class Shared:
    """What the connections of one server have in common. *tasks* owns those of the handlers."""

    guard: Guard
    handler: Handler
    deadlines: Deadlines
    tasks: asyncio.TaskGroup
    loop: asyncio.AbstractEventLoop
    most_connections: int = MOST_CONNECTIONS
    refused: int = 0
    """Connections that were too many since there was room."""
    reading: Reading = field(default_factory=Reading)
    connections: set[Connection] = field(default_factory=set)
    handling: set[asyncio.Task[Answer]] = field(default_factory=set)
    stopping: bool = False
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last connection went, once stopping."""


class Connection(asyncio.Protocol):
    """Answers the requests of one client one by one, in their order."""

    def __init__(self, shared: Shared, *, local: bool = False) -> None:
        """*local*: over a Unix socket, whose other end the kernel names."""
        self._shared = shared
        self._local = local
        self._handler = shared.handler
        self._now_s = shared.loop.time
        self._reader = Reader(shared.guard, shared.reading)
        self._transport: asyncio.Transport
        self._awaited: Later[Any] | None = None
        self._looking: asyncio.Task[Answer] | None = None
        """The handler of a GET, which may be given up."""
        self._framing = PLAIN
        self._since_s = self._now_s()
        self._paused = False
        self._choked = False
        self._client_done = False
        self._lingering = False

    # --- what the transport tells ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        shared, self._transport = self._shared, cast("asyncio.Transport", transport)
        shared.connections.add(self)
        if self._local:
            self._reader.peer = user_at(transport.get_extra_info("socket"))
        if shared.stopping:  # accepted a moment before
            self._transport.abort()
        elif len(shared.connections) > shared.most_connections:
            if not shared.refused:
                log.warning("connections.exhausted", limit=shared.most_connections)
            shared.refused += 1
            self._transport.write(CLOSING.encode(_crowded(shared.most_connections)))
            # Without waiting for what it sends, which would take up what there is none left of.
            self._reader.end()
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        stage = reader.stage
        reader.feed(data)
        if reader.stage is BODY and stage is not BODY:
            self._since_s = self._now_s()
        if self._awaited is None and not self._choked:
            self._advance()
        elif not self._paused:
            # One chunk ahead is enough; what follows waits in the client.
            self._transport.pause_reading()
            self._paused = True

    def eof_received(self) -> bool:
        """Stay open for the answers that are owed, as `curl | nc` and the like expect."""
        self._client_done = True
        if self._awaited is not None:
            self._since_s = self._now_s()
        return self._busy and not self._lingering

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # the base class's
        self._reader.close()
        if self._looking is not None:
            self._looking.cancel()
        self._shared.connections.discard(self)
        if self._shared.stopping and not self._shared.connections:
            self._shared.emptied.set()

    # --- what the server asks ---

    def look(self, now_s: float) -> None:
        """Cut off a client that stalls."""
        deadlines, waited_s = self._shared.deadlines, now_s - self._since_s
        if self._transport.get_write_buffer_size():
            if waited_s > deadlines.write_s:
                self._transport.abort()
        elif self._lingering:
            if waited_s > deadlines.linger_s:
                self._transport.abort()
        elif self._looking is not None:
            # A whole close looks the same as half a one: neither is waited for long.
            if self._client_done and waited_s > deadlines.linger_s:
                self._transport.abort()
        elif self._awaited is None:
            self._look_at_reading(waited_s)

    def stop(self) -> None:
        """Close now if nothing is owed; else after the answer."""
        if not self._busy and self._reader.stage is not BODY:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    # --- in between ---

    @property
    def _busy(self) -> bool:
        return self._awaited is not None or bool(self._reader.ready)

    def _advance(self) -> None:
        """Take up what was read, until an answer has to be waited for."""
        ready, transport = self._reader.ready, self._transport
        while ready and self._awaited is None and not self._choked and not transport.is_closing():
            exchange = ready.popleft()
            if isinstance(exchange, bytes):
                transport.write(exchange)
                continue
            self._framing = exchange.framing
            if isinstance(exchange.asked, Request):
                self._ask(exchange.asked)
            elif isinstance(exchange.asked, Answer):
                self._send(exchange.asked)
            else:
                self._send(_failure(exchange.asked))
        if self._awaited is None and not self._choked:
            if self._paused:
                self._paused = False
                transport.resume_reading()
            if self._client_done:
                transport.close()

    def _ask(self, request: Request) -> None:
        if "content-encoding" in request.headers:
            # Not when it was read: pipelined requests would be inflated all at once.
            body = self._shared.guard.inflate(request.body, request.headers["content-encoding"])
            if isinstance(body, Answer):
                self._send(body)
                return
            request = msgspec.structs.replace(request, body=body)
        try:
            reply = self._handler(request)
        except Exception as exc:  # noqa: BLE001  # a bug is a 500 instead of a dead connection
            self._send(_failure(exc))
            return
        if isinstance(reply, Answer):
            self._send(reply)
            return
        if not isinstance(reply, Later):
            task = self._shared.tasks.create_task(_contained(reply))
            self._shared.handling.add(task)
            task.add_done_callback(self._shared.handling.discard)
            if request.method == "GET":
                self._looking = task
            reply = Later(task, asyncio.Future.result)
        self._awaited = reply
        reply.future.add_done_callback(self._conclude)

    def _conclude(self, future: asyncio.Future[Any]) -> None:
        awaited = cast("Later[Any]", self._awaited)
        self._awaited = self._looking = None
        if future.cancelled():
            self._transport.abort()  # the server ends
            return
        try:
            answer = awaited.answer(future)
        except Exception as exc:  # noqa: BLE001  # as in _ask
            answer = _failure(exc)
        if not self._transport.is_closing():
            self._send(answer)
            self._advance()

    def _send(self, answer: Answer) -> None:
        framing = self._framing
        if self._shared.stopping:
            framing = msgspec.structs.replace(framing, closes=True)
        usual = answer is STORED and framing is PLAIN
        self._transport.write(STORED_PLAIN if usual else framing.encode(answer))
        self._since_s = self._now_s()
        if framing.closes or answer.close:
            self._hang_up()

    def _hang_up(self) -> None:
        """Close in a way that lets the client read the answer: at once would cost it a reset.

        Source: RFC 9112, 9.6. What still comes is read and dropped.
        """
        self._reader.end()
        if self._client_done:
            self._transport.close()
        else:
            self._transport.write_eof()
            self._lingering = True

    def _look_at_reading(self, waited_s: float) -> None:
        deadlines, reader = self._shared.deadlines, self._reader
        if reader.stage is BODY:
            if waited_s > deadlines.body_s:
                reader.refuse(
                    _timeout(
                        "AGENT_BODY_TIMEOUT",
                        f"body: {reader.body_bytes} bytes came in {deadlines.body_s:.0f} s,"
                        " then no more; send it whole",
                    )
                )
                self._advance()
        elif waited_s > deadlines.idle_s:
            if reader.stage is HEAD:
                reader.refuse(
                    _timeout(
                        "AGENT_HEADERS_TIMEOUT",
                        f"headers: not whole within {deadlines.idle_s:.0f} s",
                    )
                )
                self._advance()
            else:
                self._transport.close()


def _crowded(limit: int) -> Answer:
    return refuse(
        503,
        "AGENT_OVERLOADED",
        f"connections: over the limit of {limit}; keep fewer open, and send again shortly",
        retry_after_s=1,
        close=True,
    )


def _timeout(code: str, message: str) -> Answer:
    return refuse(408, code, message, close=True)


def _failure(bug: BaseException) -> Answer:
    """Return the answer to a request that the agent has a bug in; the log shows where."""
    log.error("request.failed", exc_info=bug)
    return refuse(500, "AGENT_BUG", "the agent failed on this request; see its log")


async def _contained(reply: Coroutine[Any, Any, Answer]) -> Answer:
    """Keep a bug in one answer from ending the others."""
    try:
        return await reply
    except Exception as exc:  # noqa: BLE001  # as in Connection._ask
        return _failure(exc)
