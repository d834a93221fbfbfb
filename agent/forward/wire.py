"""One open connection to the upstream: a request out, its answer in, one at a time.

A protocol of our own on llhttp (httptools), as towards the apps: a request over aiohttp's session
takes four times as long. Who opens connections and keeps them is `agent.forward.pool`.
Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import cast

import aiohttp
import httptools
from multidict import CIMultiDict

from agent.forward.disposition import Response

_ANSWER_BYTES = 65_536
"""How much of an answer is read, and how long its head may be; the API's are empty or short."""

_PIECE_BYTES = 262_144
"""How much is written at once. Whatever TLS is handed it takes, and tells nobody that the link does not."""

_INTERIM = frozenset(range(100, 200)) - {101}
"""Another answer follows (RFC 9110, section 15.2), but for a switch to a protocol nobody asked for."""


class Wire(asyncio.Protocol):
    """The protocol of one connection. *lost* is told once it can carry nothing more."""

    def __init__(self, *, silence_s: float, lost: Callable[[Wire], None]) -> None:
        """*silence_s* is how long nothing may be heard of an answer."""
        self.idle_since_s = 0.0
        self._silence_s = silence_s
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        # What an old proxy says in its own way is an answer, too; the same that aiohttp lets pass.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_optional_cr_before_lf=True,
            lenient_spaces_after_chunk_size=True,
        )
        self._answer: asyncio.Future[Response] | None = None
        """What is waited for; None: nothing was asked."""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()
        self._head_bytes = 0
        """How much was heard of the answer that is not its body: chunks and trailers count, too."""
        self._head_read = False
        self._heard_s = 0.0
        self._deadline_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._rest = memoryview(b"")
        """What of the request is not written yet."""
        self._encrypts = False
        self._choked = False

    async def exchange(self, request: bytes, *, deadline_s: float) -> Response:
        """Send *request* and return its answer, which may take until *deadline_s* of the loop's clock.

        Raises `aiohttp.ClientError`, `TimeoutError` or `OSError`. Then, and where it is cancelled, the
        connection is closed: the answer may still come.
        """
        answer: asyncio.Future[Response] = self._loop.create_future()
        self._answer = answer
        self._head_bytes, self._head_read = 0, False
        self._heard_s, self._deadline_s = self._loop.time(), deadline_s
        if self._timer is None:
            self._watch()
        try:
            self._rest = memoryview(request)
            self._write()
            return await answer
        except BaseException:
            self.close()
            raise
        finally:
            self._answer, self._rest = None, memoryview(b"")

    @property
    def closed(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        """Hang up. There is nothing left to say, and no farewell of TLS to wait for."""
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        self._lost(self)

    # --- what the transport tells ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._encrypts = transport.get_extra_info("sslcontext") is not None

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(aiohttp.ClientPayloadError(f"not an answer in HTTP ({exc})"))
        if self._awaits and self._head_bytes > _ANSWER_BYTES:
            self._fail(aiohttp.ClientPayloadError("the answer has too long a head"))

    def eof_received(self) -> None:
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._heard_s = self._loop.time()
        self._write()

    # --- what is sent ---

    def _write(self) -> None:
        """Write a piece; the next one after the loop has looked around, for it may be answered."""
        if not self._rest or self._choked or self.closed:
            return
        # Without TLS each further write may meet a reset, and with it lose an answer not yet read.
        piece_bytes = _PIECE_BYTES if self._encrypts else len(self._rest)
        self._transport.write(self._rest[:piece_bytes])
        self._rest = self._rest[piece_bytes:]
        if self._rest:
            self._loop.call_soon(self._write)

    @property
    def _sends(self) -> bool:
        return bool(self._rest) or self._transport.get_write_buffer_size() > 0

    # --- what the parser tells ---

    def on_message_begin(self) -> None:
        self._headers = []
        self._body = bytearray()
        self._head_read = False
        if not self._awaits:
            self.close()  # not asked for: it would be taken for the answer to the next request

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_read:  # what a trailer says comes too late (RFC 9110, section 6.5.1)
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._head_read = True
        if sum(len(name) + len(value) for name, value in self._headers) > _ANSWER_BYTES:
            self._fail(aiohttp.ClientPayloadError("the answer has too long a head"))

    def on_body(self, piece: bytes) -> None:
        self._head_bytes -= len(piece)
        self._body += piece
        if len(self._body) >= _ANSWER_BYTES:
            self._finish(keep=False)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() in _INTERIM:
            self._head_bytes, self._head_read = 0, False
        else:
            self._finish(keep=self._parser.should_keep_alive())

    # --- how it ends ---

    @property
    def _awaits(self) -> bool:
        return self._answer is not None and not self._answer.done()

    def _end(self, exc: Exception | None) -> None:
        if self._awaits and self._head_read and exc is None and self._ends_with_the_connection:
            self._finish(keep=False)
        elif exc is not None:
            self._fail(exc)
        elif self._head_bytes:
            self._fail(aiohttp.ClientPayloadError("the answer ended half-way"))
        else:
            self._fail(aiohttp.ServerDisconnectedError())

    @property
    def _ends_with_the_connection(self) -> bool:
        """Whether the head says no other end of the body (RFC 9112, section 6.3)."""
        said = {name.lower(): value for name, value in self._headers}
        if (codings := said.get(b"transfer-encoding")) is not None:
            return codings.rpartition(b",")[2].strip().lower() != b"chunked"
        return b"content-length" not in said

    def _finish(self, *, keep: bool) -> None:
        if self._answer is None or self._answer.done():
            return
        headers = CIMultiDict(
            (name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
            for name, value in self._headers
        )
        try:
            body = _plain(bytes(self._body), headers.get("Content-Encoding", ""))
        except aiohttp.ClientPayloadError as exc:
            self._fail(exc)
            return
        status = self._parser.get_status_code()
        self._answer.set_result(Response(status=status, headers=headers, body=body[:_ANSWER_BYTES]))
        if not keep or self._sends:  # behind half a request the next one would not be seen
            self.close()

    def _fail(self, exc: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc)
        self.close()

    def _watch(self) -> None:
        """Give up on an answer that is overdue; else come back when it would be."""
        self._timer = None
        if not self._awaits:
            return
        now_s = self._loop.time()
        if self._sends:
            self._heard_s = now_s
        due_s = min(self._deadline_s, self._heard_s + self._silence_s)
        if due_s <= now_s:
            self._fail(TimeoutError())
        else:
            self._timer = self._loop.call_at(due_s, self._watch)


def _plain(body: bytes, encoding: str) -> bytes:
    """Return *body* decompressed: nobody asked for that, but a stranger in between may send it so.

    Raises `aiohttp.ClientPayloadError` for what is cut short: half of it may mean something else.
    """
    coding = encoding.strip().lower()
    if not body or coding in {"", "identity"}:
        return body
    if coding not in {"gzip", "x-gzip", "deflate"}:
        raise aiohttp.ClientPayloadError(f"compressed as nobody asked for ({coding})")
    # Some call deflate what lacks the two bytes that zlib puts before it.
    bare = coding == "deflate" and body[0] & 0x0F != zlib.DEFLATED
    stream = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
    try:
        plain = stream.decompress(body, _ANSWER_BYTES)
    except zlib.error as exc:
        raise aiohttp.ClientPayloadError(f"not compressed as it says ({exc})") from exc
    if len(plain) < _ANSWER_BYTES and (not stream.eof or stream.unused_data):
        raise aiohttp.ClientPayloadError("not compressed as it says (its end is elsewhere)")
    return plain
