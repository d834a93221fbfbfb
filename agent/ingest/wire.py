"""HTTP/1.1 as values: bytes in, requests and refusals out; answers in, bytes out. No sockets, no clock.

llhttp (by httptools) splits the bytes, in its strict mode. What it leaves open is decided here, and
whatever could be read in two ways is refused: the next reader might read it the other way.
Source: RFC 9110 and 9112. The sockets are `agent.ingest.connection`'s.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote

import httptools
import msgspec

from agent.exchange import STORED, Answer, Request, refuse
from agent.ingest.guard import Guard

MAX_TARGET_BYTES = 8 * 1024
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
"""Far beyond what an app sends, and together little memory for each connection."""

READING_BYTES = 64 * 1024 * 1024
"""Bodies that may be half read at once: a dozen of the largest, thousands of ordinary ones."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_ONCE = frozenset(
    {"host", "origin", "sec-fetch-site", "content-type", "content-encoding", "content-length"}
)
"""Headers that decide something, and of which a second one might be meant."""

_USUAL = {
    spelled.encode(): name
    for name in (*_ONCE, "accept", "accept-encoding", "authorization", "connection", "user-agent")
    for spelled in (name, name.title())
}
"""The headers that nearly every request has, as libraries spell them."""


class Stage(enum.Enum):
    """How far the reading of a request has come; ENDED: nothing more is read."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    ENDED = enum.auto()


IDLE, HEAD, BODY, ENDED = Stage


@dataclass(slots=True)
class Reading:
    """What all connections read at this moment, to bound it."""

    body_bytes: int = 0


class Framing(msgspec.Struct, frozen=True, kw_only=True):
    """How the answer to one request is to be sent."""

    closes: bool = False
    bodiless: bool = False
    http_1_0: bool = False
    cors: Mapping[str, str] = {}

    def encode(self, answer: Answer) -> bytes:
        """Return the whole response: one write, so that it leaves in one segment."""
        headers = {"Server": "tranthor-agent", **answer.headers, **self.cors}
        if answer.body:
            headers = {**_SEALED, **headers, "Content-Type": answer.content_type}
        if answer.status != HTTPStatus.NO_CONTENT:  # of which RFC 9110, 8.6 forbids a length
            headers["Content-Length"] = str(len(answer.body))
        if self.closes or answer.close:
            headers["Connection"] = "close"
        elif self.http_1_0:
            headers["Connection"] = "keep-alive"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n{lines}\r\n"
        return head.encode("latin-1") + (b"" if self.bodiless else answer.body)


_SEALED = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""What is in a body is not for a page of somebody else: neither as a script or image, nor in a frame,
nor from a cache. For browsers without Sec-Fetch-Site, whose GETs look like those of an app."""

PLAIN = Framing()
"""That of nearly all."""

CLOSING = Framing(closes=True)

STORED_PLAIN = PLAIN.encode(STORED)
"""Made once: nearly every response."""


class Exchange(msgspec.Struct):
    """One request as it was read, or what it is answered without asking further.

    An exception is a bug of the agent's, met while it was read: it is for the log.
    """

    asked: Request | Answer | BaseException
    framing: Framing


class _RefusedError(Exception):
    """Ends the reading from within a callback of the parser."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Reader:
    """Reads the requests of one connection. What they come to is in `ready`, in their order.

    A refusal ends it: nothing behind one is read, for where it ends is not known.
    """

    def __init__(self, guard: Guard, reading: Reading) -> None:
        self.stage = IDLE
        self.ready: deque[Exchange | bytes] = deque()
        """Bytes are to be sent as they are: an interim response."""
        self.peer: int | None = None
        """The user at the other end of a Unix socket."""
        self.body_bytes = 0
        self._guard = guard
        self._reading = reading
        self._framing = CLOSING
        self._chunk_bytes = 0
        self._unproductive_bytes = 0
        self._advanced = False
        self.on_message_begin()
        self.stage = IDLE
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> None:
        """Take up *data* as it came from the socket."""
        if self.stage is ENDED:
            return
        self._advanced = False
        self._chunk_bytes = len(data)
        self._arrived_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError as exc:
            raised = exc.__context__ or exc
            self._end_with(raised.answer if isinstance(raised, _RefusedError) else raised)
        except httptools.HttpParserError as exc:
            # What follows a request that closes is an error, too, but no answer is owed to it.
            if self.stage is not ENDED:
                self.refuse(_bad(f"not valid HTTP ({exc})"))
        # A header, trailer or chunk extension without an end would else be kept without an end.
        self._unproductive_bytes = 0 if self._advanced else self._unproductive_bytes + len(data)
        if self._unproductive_bytes > MAX_HEAD_BYTES:
            self.refuse(_HEAD_TOO_LARGE)

    def refuse(self, answer: Answer) -> None:
        """Answer the request that is being read, and end."""
        self._end_with(answer)

    def _end_with(self, asked: Answer | BaseException) -> None:
        if self.stage is not ENDED:
            framing = msgspec.structs.replace(self._framing, closes=True)
            self._forget_body()
            self.ready.append(Exchange(asked, framing))
            self.stage = ENDED

    def end(self) -> None:
        """Read nothing more, and forget what was read."""
        self._forget_body()
        self.ready.clear()
        self.stage = ENDED

    def close(self) -> None:
        """Let go of the parser, which holds on to the reader in turn."""
        self.end()
        del self._parser

    # --- the parser's callbacks ---

    def on_message_begin(self) -> None:
        self.stage = HEAD
        # With the whole chunk that the head begins in: no less than the head, which is only measured
        # where this is too much.
        self._arrived_bytes = self._chunk_bytes
        self._framing = CLOSING
        self._target = b""
        self._headers: dict[str, str] = {}
        self._header_lines = 0
        self._upgrades = False
        self._chunks: list[bytes] = []

    def on_url(self, part: bytes) -> None:
        self._target += part
        if len(self._target) > MAX_TARGET_BYTES:
            raise _RefusedError(_TARGET_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_lines += 1
        if self._header_lines > MAX_HEADERS:
            raise _RefusedError(_HEAD_TOO_LARGE)
        if self.stage is BODY:
            return  # a trailer: the guard has judged already, nothing may change now
        headers = self._headers
        key = _USUAL.get(name) or name.decode("latin-1").lower()
        text = value.decode("latin-1").strip(" \t")
        if key in headers:
            if key in _ONCE:
                raise _RefusedError(_bad(f"{key}: given twice"))
            text = f"{headers[key]}, {text}"
        headers[key] = text

    def on_headers_complete(self) -> None:
        if self._arrived_bytes > MAX_HEAD_BYTES and self._head_bytes() > MAX_HEAD_BYTES:
            raise _RefusedError(_HEAD_TOO_LARGE)
        headers, parser = self._headers, self._parser
        method = parser.get_method().decode()
        version = parser.get_http_version()
        if parser.should_upgrade() and method != "CONNECT":
            self._upgrades = True
            return
        self._framing = self._framed(method, version)
        # RFC 9112, 6.1: any other coding leaves the length open; HTTP/1.0 knows none.
        if "transfer-encoding" in headers and (
            headers["transfer-encoding"].lower() != "chunked" or version != "1.1"
        ):
            raise _RefusedError(_bad("Transfer-Encoding: expected chunked, of HTTP/1.1"))
        if version not in {"1.1", "1.0"}:
            raise _RefusedError(_bad("HTTP version: expected 1.1 or 1.0"))
        # One reading of the target, for guard and routes: two could differ.
        whole = self._target.decode("latin-1")
        target, _, self._query = whole.partition("?")
        self._path = unquote(target)
        refusal = self._guard.judge_peer(self.peer) or self._guard.judge(headers, self._path)
        if refusal is not None:
            raise _RefusedError(refusal)
        if not target.startswith("/") or method == "CONNECT" or "#" in whole:
            raise _RefusedError(_bad("request target: expected a path", code="AGENT_BAD_TARGET"))
        self._method = method
        self.stage = BODY
        self._advanced = True
        if "expect" in headers and version == "1.1" and headers["expect"].lower() == "100-continue":
            self.ready.append(_CONTINUE)

    def on_body(self, chunk: bytes) -> None:
        self._advanced = True
        self._chunks.append(chunk)
        self.body_bytes += len(chunk)
        self._reading.body_bytes += len(chunk)
        if self.body_bytes > self._guard.max_body_bytes:  # chunked: no length to judge before
            raise _RefusedError(self._guard.too_large())
        if self._reading.body_bytes > READING_BYTES:
            raise _RefusedError(_overloaded())

    def on_message_complete(self) -> None:
        if self._upgrades:
            return  # it is read once more
        self.ready.append(Exchange(self._asked(), self._framing))
        self._advanced = True
        self._forget_body()
        self.stage = ENDED if self._framing.closes else IDLE

    # --- what they are made of ---

    def _parse(self, data: bytes | memoryview) -> None:
        """Feed the parser; a request that offers another protocol is read again without its offer.

        llhttp would take the offer up and leave the body. Java's HttpClient offers HTTP/2 with each
        request, and RFC 9110, 7.8 lets a server ignore it.
        """
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                data = memoryview(data)[exc.args[0] :]
            else:
                return
            head = self._head_without_offer()
            self._parser = httptools.HttpRequestParser(self)  # the old one may be done for good
            self._parser.feed_data(head)

    def _head_without_offer(self) -> bytes:
        del self._headers["upgrade"]
        fields = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        return b"%b %b HTTP/%b\r\n%b\r\n" % (
            self._parser.get_method(),
            self._target,
            self._parser.get_http_version().encode(),
            fields.encode("latin-1"),
        )

    def _head_bytes(self) -> int:
        headers = self._headers
        return len(self._target) + sum(map(len, headers)) + sum(map(len, headers.values()))

    def _framed(self, method: str, version: str) -> Framing:
        closes = not self._parser.should_keep_alive()
        if version == "1.1" and method != "HEAD" and not closes and "origin" not in self._headers:
            return PLAIN
        return Framing(
            closes=closes,
            bodiless=method == "HEAD",
            http_1_0=version == "1.0",
            cors=self._guard.cors(self._headers),
        )

    def _asked(self) -> Request | Answer:
        method, headers = self._method, self._headers
        if method == "OPTIONS" and {"origin", "access-control-request-method"} <= headers.keys():
            return Answer(status=204)  # the preflight of an allowed page; cors says what it may
        return Request(
            method="GET" if method == "HEAD" else method,
            path=self._path,
            query=_first_of_each(self._query) if self._query else {},
            headers=headers,
            body=b"".join(self._chunks),
            peer=self.peer,
        )

    def _forget_body(self) -> None:
        self._reading.body_bytes -= self.body_bytes
        self.body_bytes = 0
        self._chunks = []


def _first_of_each(query: str) -> dict[str, str]:
    return dict(reversed(parse_qsl(query, keep_blank_values=True)))


def _bad(message: str, *, code: str = "AGENT_BAD_REQUEST") -> Answer:
    return refuse(400, code, message, close=True)


_TARGET_TOO_LONG = refuse(
    414,
    "AGENT_TARGET_TOO_LONG",
    f"request target: over the limit of {MAX_TARGET_BYTES} bytes",
    close=True,
)

_HEAD_TOO_LARGE = refuse(
    431,
    "AGENT_HEADERS_TOO_LARGE",
    f"headers: over the limit of {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes",
    close=True,
)


def _overloaded() -> Answer:
    return refuse(
        503,
        "AGENT_OVERLOADED",
        f"{READING_BYTES} bytes of other requests are being read; send again shortly",
        retry_after_s=1,
        close=True,
    )
