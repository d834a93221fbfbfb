"""One call to an upstream that misbehaves in every way there is, over real sockets and real TLS."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from certificates import Certificates, why_no_certificates

from agent.clock import SystemClock
from agent.console.sandbox import Fault, Sandbox
from agent.forward.disposition import (
    Delivered,
    Failed,
    Misconfigured,
    Outcome,
    Rejected,
    Unavailable,
)
from agent.forward.plan import Target
from agent.forward.pool import open_pool
from agent.forward.upstream import Refusing, open_upstream

KEY = "wk-5up3r-s3cr3t"
BODY = '{"event":"Café","userId":"u1","messageId":"m1"}'.encode()
DEADLINE_S = 10.0
LOOPS = {"uvloop": uvloop.new_event_loop}
"""Beside asyncio's own: transports differ."""

PORTAL = b"<html><body>Please log in</body></html>"


def target(url: str) -> Target:
    return Target(
        url=url,
        authorization=f"Bearer {KEY}",
        bare_key=KEY,
        connect_timeout_s=5.0,
        timeout_s=5.0,
        ca_file=None,
        client_cert=None,
        client_key=None,
        proxy=None,
    )


async def send(to: Target, *bodies: bytes) -> Outcome:
    """Send the bodies over one upstream; return what came of the last."""
    found: Outcome | None = None
    async with (
        asyncio.timeout(DEADLINE_S),
        open_upstream(to, SystemClock(), connections=2) as upstream,
    ):
        for body in bodies or (BODY,):
            found = await upstream.send("track", body)
    assert found is not None
    assert KEY not in repr(found)
    return found


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if why := why_no_certificates():
        pytest.skip(why)
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    sandbox = Sandbox(KEY)
    async with sandbox.serving():
        yield sandbox


# --- a server that says exactly what it is told ------------------------------------------------------

Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Wire:
    """A listener for one conversation at a time. *heard* is what was sent to it."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.heard = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """Return the head of one request whose body is read, too."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heard += head
        for line in head.lower().split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name == b"content-length":
                self.heard += await reader.readexactly(int(value))
        return head


@asynccontextmanager
async def listening(
    converse: Callable[[Wire, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Wire]:
    wire = Wire()
    open_writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.connections += 1
        open_writers.add(writer)
        try:
            await converse(wire, reader, writer)
            await writer.drain()
            writer.close()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            open_writers.discard(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    wire.port = server.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        server.close()
        for writer in list(open_writers):
            writer.transport.abort()
        await server.wait_closed()


def saying(*parts: bytes) -> Callable[..., Awaitable[None]]:
    """Answer each request of a connection with the next part, then close it."""

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for part in parts:
            await wire.request(reader)
            writer.write(part)

    return converse


NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


def http(status: str, body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 " + status.encode(), b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# --- what is sent ------------------------------------------------------------------------------------


async def test_the_body_arrives_as_it_is_with_both_headers() -> None:
    async with listening(saying(NO_CONTENT)) as wire:
        assert await send(target(wire.url)) == Delivered()
    head, _, body = wire.heard.partition(b"\r\n\r\n")
    request_line, *headers = head.decode().split("\r\n")
    given = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in headers)}
    assert request_line == "POST /api/public/apps/track HTTP/1.1"
    assert given["authorization"] == f"Bearer {KEY}"
    assert given["publicwritekey"] == KEY
    assert given["content-type"] == "application/json"
    assert given["content-length"] == str(len(BODY))
    assert "transfer-encoding" not in given
    assert "content-encoding" not in given
    assert given["user-agent"].startswith("tranthor-agent/")
    assert body == BODY


async def test_the_stand_in_stores_what_was_sent_and_knows_the_key(sandbox: Sandbox) -> None:
    assert await send(target(f"{sandbox.url}/")) == Delivered()
    (arrival,) = sandbox.stored
    assert arrival.body == BODY
    assert (arrival.authorized, arrival.public_write_key, arrival.scheme) == (True, True, "Bearer")


async def test_a_large_body_goes_out_whole(sandbox: Sandbox) -> None:
    body = json.dumps(
        {"event": "e", "userId": "u", "messageId": "m", "properties": {"x": "y" * 5_000_000}}
    ).encode()
    assert await send(target(sandbox.url), body) == Delivered()
    assert sandbox.stored[0].body == body


async def test_a_connection_is_used_again() -> None:
    async with listening(saying(NO_CONTENT, NO_CONTENT, NO_CONTENT)) as wire:
        assert await send(target(wire.url), BODY, BODY, BODY) == Delivered()
    assert wire.connections == 1


async def test_no_cookie_is_carried_to_the_next_request() -> None:
    baked = b"HTTP/1.1 204 No Content\r\nSet-Cookie: sticky=1; Path=/\r\n\r\n"
    async with listening(saying(baked, baked)) as wire:
        await send(target(wire.url.replace("127.0.0.1", "localhost")), BODY, BODY)
    assert b"cookie" not in wire.heard.lower()


# --- each fault of the stand-in ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "meaning"),
    [
        (Fault(mode="ok"), Delivered),
        (Fault(mode="slow", delay_s=0.05), Delivered),
        (Fault(mode="status", status=500), Failed),
        (Fault(mode="status", status=400), Rejected),
        (Fault(mode="status", status=413), Rejected),
        (Fault(mode="status", status=401), Misconfigured),
        (Fault(mode="status", status=403), Misconfigured),
        (Fault(mode="status", status=404), Misconfigured),
        (
            Fault(
                mode="status",
                status=400,
                body={"message": "headers must have required property 'authorization'"},
            ),
            Misconfigured,
        ),
        (Fault(mode="html"), Misconfigured),
        (Fault(mode="redirect"), Misconfigured),
        (Fault(mode="redirect", status=307), Misconfigured),
    ],
    ids=lambda value: f"{value.mode} {value.status or ''}" if isinstance(value, Fault) else "",
)
async def test_an_answer_becomes_its_outcome(
    sandbox: Sandbox, fault: Fault, meaning: type[Outcome]
) -> None:
    sandbox.fault = fault
    assert isinstance(await send(target(sandbox.url)), meaning)


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504, 520])
async def test_a_busy_upstream_is_unavailable_as_long_as_it_asks(
    sandbox: Sandbox, status: int
) -> None:
    sandbox.fault = Fault(mode="status", status=status, retry_after="17")
    found = await send(target(sandbox.url))
    assert isinstance(found, Unavailable)
    # What a proxy had handed on may be stored.
    assert (found.retry_after_s, found.ambiguous) == (17.0, status in {502, 504, 520})


@pytest.mark.parametrize("mode", ["cut_before", "cut_after", "down"])
async def test_a_connection_cut_after_sending_is_ambiguous(sandbox: Sandbox, mode: str) -> None:
    sandbox.fault = Fault(mode=mode)  # type: ignore[arg-type]  # each a FaultMode
    found = await send(target(sandbox.url))
    assert isinstance(found, Unavailable)
    assert found.ambiguous


async def test_no_answer_in_time_is_ambiguous(sandbox: Sandbox) -> None:
    sandbox.fault = Fault(mode="stall")
    found = await send(replace(target(sandbox.url), timeout_s=0.2))
    assert isinstance(found, Unavailable)
    assert found.ambiguous
    assert "upstream.timeout" in found.why


@pytest.mark.parametrize("mode", ["cut_before", "cut_after"])
async def test_what_was_cut_on_a_used_connection_is_not_sent_again_by_itself(
    sandbox: Sandbox, mode: str
) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        open_upstream(target(sandbox.url), SystemClock(), connections=1) as upstream,
    ):
        await upstream.send("track", BODY)
        sandbox.fault = Fault(mode=mode)  # type: ignore[arg-type]  # each a FaultMode
        assert isinstance(await upstream.send("track", BODY), Unavailable)
        assert sandbox.requests == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(sandbox: Sandbox, status: int) -> None:
    async with listening(saying(NO_CONTENT)) as elsewhere:
        sandbox.fault = Fault(mode="redirect", status=status, location=f"{elsewhere.url}/login")
        found = await send(target(sandbox.url))
    assert isinstance(found, Misconfigured)
    assert f"{elsewhere.url}/login" in found.why
    assert (elsewhere.connections, sandbox.requests) == (0, 1)


# --- answers that are hardly HTTP --------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 999999 Nonsense\r\n\r\n",
        b"HTTP/1.1 204\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n""',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        http("200 OK", b"not gzip", b"Content-Encoding: gzip"),
        http("200 OK", gzip.compress(PORTAL)[:10], b"Content-Encoding: gzip"),
        http("200 OK", zlib.compress(PORTAL)[:2], b"Content-Encoding: deflate"),
        http("200 OK", gzip.compress(b"") + gzip.compress(PORTAL), b"Content-Encoding: gzip"),
        http("400 Bad Request", b"\x8b\x00\x80{}\x03", b"Content-Encoding: br"),
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 2",
    ],
    ids=range(17),
)
async def test_an_answer_that_cannot_be_read_is_ambiguous_and_never_raised(said: bytes) -> None:
    async with listening(saying(said)) as wire:
        found = await send(target(wire.url))
    assert isinstance(found, Unavailable)
    assert found.ambiguous


@pytest.mark.parametrize(
    ("status", "first", "rest", "meaning"),
    [
        ("200 OK", b"\r\n", PORTAL, Misconfigured),
        ("200 OK", b'""', PORTAL, Misconfigured),
        ("200 OK", b'"', b'ok"', Delivered),
        (
            "400 Bad Request",
            b'{"statusCode":400,"code":"FST_ERR_VALIDATION","message":"headers must',
            b" have required property 'authorization'\"}",
            Misconfigured,
        ),
        ("400 Bad Request", b"\r\n", PORTAL, Misconfigured),
    ],
    ids=["blank line, portal", "string, portal", "string", "authorization", "blank line, 400"],
)
async def test_an_answer_in_pieces_means_what_it_means_whole(
    status: str, first: bytes, rest: bytes, meaning: type[Outcome]
) -> None:
    judged = asyncio.Event()

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        writer.write(http(status, first + rest)[: -len(rest)])
        try:
            async with asyncio.timeout(0.3):
                await judged.wait()  # by the first piece alone, which is too soon
        except TimeoutError:
            writer.write(rest)

    async with listening(converse) as wire:
        found = await send(target(wire.url))
        judged.set()
    assert isinstance(found, meaning)


async def test_an_endless_answer_is_read_no_further_than_needed() -> None:
    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            writer.write(b"x" * 65_536)
            await writer.drain()

    async with listening(converse) as wire:
        assert isinstance(await send(target(wire.url)), Misconfigured)


@pytest.mark.parametrize(
    "endless",
    [b"X: " + b"x" * 1000 + b"\r\n", b"x" * 1000],
    ids=["lines", "one line"],
)
async def test_endless_trailers_are_read_no_further_than_a_head(endless: bytes) -> None:
    left = asyncio.Event()

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ")
        with suppress(ConnectionError):
            while True:
                writer.write(endless)
                await writer.drain()
        left.set()

    async with listening(converse) as wire:
        found = await send(target(wire.url))
        await left.wait()
    assert isinstance(found, Unavailable)
    assert "too long a head" in found.why


async def test_an_answer_a_byte_at_a_time_ends_at_the_timeouts_together() -> None:
    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        writer.write(b"HTTP/1.1 204 No Content\r\nX: ")
        while True:
            try:
                async with asyncio.timeout(0.05):
                    await reader.readexactly(1)  # ends with the connection
            except TimeoutError:
                writer.write(b"x")

    async with listening(converse) as wire:
        found = await send(replace(target(wire.url), connect_timeout_s=0.2, timeout_s=0.2))
    assert isinstance(found, Unavailable)
    assert found.ambiguous


async def test_a_key_that_an_answer_quotes_is_masked() -> None:
    quoting = http("401 Unauthorized", json.dumps({"message": f"key {KEY} is unknown"}).encode())
    async with listening(saying(quoting)) as wire:
        found = await send(target(wire.url))
    assert isinstance(found, Misconfigured)
    assert "is unknown" in found.why


# --- connections -------------------------------------------------------------------------------------


async def answers(to: Target, count: int) -> list[Outcome]:
    """Send as many events one after the other."""
    async with (
        asyncio.timeout(DEADLINE_S),
        open_upstream(to, SystemClock(), connections=1) as upstream,
    ):
        return [await upstream.send("track", BODY) for _ in range(count)]


@pytest.mark.parametrize(
    "more",
    [http("500 Oops", b""), b"HTTP/1.1 500 Oo", b"junk"],
    ids=["another answer", "the beginning of one", "junk"],
)
async def test_what_follows_an_answer_is_not_taken_for_the_next_ones(more: bytes) -> None:
    async with listening(saying(NO_CONTENT + more, NO_CONTENT)) as wire:
        assert await answers(target(wire.url), 2) == [Delivered(), Delivered()]
    assert wire.connections == 2


async def test_what_comes_unasked_is_not_taken_for_an_answer() -> None:
    left = asyncio.Event()

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        writer.write(NO_CONTENT)
        if wire.connections == 1:
            await asked.wait()
            writer.write(http("500 Oops", b""))
            await reader.read()
            left.set()

    asked = asyncio.Event()
    async with (
        asyncio.timeout(DEADLINE_S),
        listening(converse) as wire,
        open_upstream(target(wire.url), SystemClock(), connections=1) as upstream,
    ):
        assert await upstream.send("track", BODY) == Delivered()
        asked.set()
        await left.wait()
        assert await upstream.send("track", BODY) == Delivered()


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"]
)
async def test_an_interim_answer_is_passed_over(interim: bytes) -> None:
    async with listening(saying(interim + NO_CONTENT, interim * 2 + NO_CONTENT)) as wire:
        assert await answers(target(wire.url), 2) == [Delivered(), Delivered()]
    assert wire.connections == 1


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\n""', Delivered),
        (b"HTTP/1.0 200 OK\r\n\r\n" + PORTAL, Misconfigured),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n""', Delivered),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n""\r\n0\r\n\r\n', Delivered),
        (
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                b'2\r\n""\r\n0\r\nContent-Encoding: gzip\r\n\r\n'
            ),
            Delivered,
        ),
        (http("200 OK", gzip.compress(b'""'), b"Content-Encoding: gzip"), Delivered),
        (http("200 OK", gzip.compress(PORTAL), b"Content-Encoding: gzip"), Misconfigured),
        (http("200 OK", zlib.compress(b'""'), b"Content-Encoding: deflate"), Delivered),
        (http("200 OK", zlib.compress(b'""', wbits=-15), b"Content-Encoding: deflate "), Delivered),
        (http("200 OK", b"", b"Content-Encoding: br"), Delivered),
        (http("200 OK", PORTAL + b" " * 70_000), Misconfigured),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            Misconfigured,
        ),
    ],
    ids=[
        "no length",
        "1.0",
        "1.1 until it ends",
        "chunked",
        "trailer",
        "gzip",
        "gzip portal",
        "deflate",
        "bare deflate",
        "br",
        "long portal",
        "101",
    ],
)
async def test_an_answer_is_read_however_it_is_framed(said: bytes, meaning: type[Outcome]) -> None:
    async with listening(saying(said)) as wire:
        assert isinstance(await send(target(wire.url)), meaning)


async def test_a_connection_that_is_said_to_close_is_not_used_again() -> None:
    closing = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
    async with listening(saying(closing, closing)) as wire:
        assert await answers(target(wire.url), 2) == [Delivered(), Delivered()]
    assert wire.connections == 2


async def test_an_attempt_that_is_cancelled_takes_its_connection_along() -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        if wire.connections == 1:
            asked.set()
            await reader.read()
            left.set()
        writer.write(NO_CONTENT)

    async with (
        asyncio.timeout(DEADLINE_S),
        listening(converse) as wire,
        open_upstream(target(wire.url), SystemClock(), connections=1) as upstream,
        asyncio.TaskGroup() as tasks,
    ):
        attempt = tasks.create_task(upstream.send("track", BODY))
        await asked.wait()
        attempt.cancel()
        await left.wait()
        assert await upstream.send("track", BODY) == Delivered()


async def test_a_connection_without_requests_is_closed_in_time() -> None:
    left = asyncio.Event()

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        writer.write(NO_CONTENT)
        await reader.read()
        left.set()

    async with (
        asyncio.timeout(DEADLINE_S),
        listening(converse) as wire,
        open_pool(target(wire.url), {}, connections=1, keepalive_s=0.1) as pool,
    ):
        answer = await pool.post("/", BODY, ssl.create_default_context())
        assert answer.status == 204
        await left.wait()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_a_connection_that_the_upstream_closed_meanwhile_is_not_used_again(
    encrypted: bool, certificates: Certificates
) -> None:
    answered, left = asyncio.Event(), asyncio.Event()

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await wire.request(reader)
        writer.write(NO_CONTENT)
        if wire.connections == 1:
            await answered.wait()
            writer.close()
            await reader.read()
            left.set()

    async with (
        asyncio.timeout(DEADLINE_S),
        listening(converse, certificates.server() if encrypted else None) as wire,
        open_upstream(
            https(wire, certificates) if encrypted else target(wire.url),
            SystemClock(),
            connections=1,
        ) as upstream,
    ):
        assert await upstream.send("track", BODY) == Delivered()
        answered.set()
        await left.wait()
        assert await upstream.send("track", BODY) == Delivered()


async def test_a_connection_that_breaks_at_the_moment_of_its_next_use_is_not_used() -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        listening(saying(NO_CONTENT, NO_CONTENT)) as wire,
        open_pool(target(wire.url), {}, connections=1) as pool,
    ):
        tls = ssl.create_default_context()
        await pool.post("/", BODY, tls)
        pool._idle[0]._transport.abort()  # of which it is told in the loop's next turn
        assert (await pool.post("/", BODY, tls)).status == 204


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_an_upstream_that_speaks_before_it_is_asked_is_not_waited_for(
    encrypted: bool, certificates: Certificates
) -> None:
    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(http("500 Oops", b""))
        await reader.read(-1)

    async with listening(converse, certificates.server() if encrypted else None) as wire:
        found = await send(https(wire, certificates) if encrypted else target(wire.url))
    # As its answer, where that is still to be had.
    assert isinstance(found, Failed) or not (isinstance(found, Unavailable) and found.ambiguous)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_an_upstream_is_not_called_silent_while_it_still_takes_the_body(
    encrypted: bool, certificates: Certificates
) -> None:
    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.Event().wait()  # a thin link
        await reader.readexactly(20_000_000)
        writer.write(NO_CONTENT)

    async with listening(converse, certificates.server() if encrypted else None) as wire:
        to = https(wire, certificates) if encrypted else target(wire.url)
        assert await send(replace(to, timeout_s=0.2), b"x" * 20_000_000) == Delivered()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_a_request_does_not_follow_on_one_that_was_answered_before_its_end(
    encrypted: bool, certificates: Certificates
) -> None:
    done = asyncio.Event()

    async def converse(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if wire.connections == 1:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(http("413 Too Large", b""))
            await done.wait()  # and reads no more of it
        else:
            await wire.request(reader)
            writer.write(NO_CONTENT)

    async with (
        asyncio.timeout(DEADLINE_S),
        listening(converse, certificates.server() if encrypted else None) as wire,
        open_upstream(
            https(wire, certificates) if encrypted else target(wire.url),
            SystemClock(),
            connections=1,
        ) as upstream,
    ):
        assert isinstance(await upstream.send("track", b"x" * 20_000_000), Rejected)
        assert await upstream.send("track", BODY) == Delivered()
        done.set()


# --- no connection at all ----------------------------------------------------------------------------


async def test_a_refused_connection_is_not_ambiguous() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        found = await send(target(f"http://127.0.0.1:{port}"))
    assert isinstance(found, Unavailable)
    assert not found.ambiguous
    assert f"127.0.0.1:{port}" in found.why


async def test_a_connection_that_takes_too_long_is_not_ambiguous() -> None:
    with ExitStack() as sockets:
        deaf = sockets.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        # Its queue is full: the next one's SYN is dropped.
        for _ in range(3):
            queued = sockets.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(deaf.getsockname())
        to = target(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        found = await send(replace(to, connect_timeout_s=0.2))
    assert isinstance(found, Unavailable)
    assert not found.ambiguous
    assert "upstream.connect_timeout" in found.why


async def test_a_name_that_is_not_found_is_not_ambiguous() -> None:
    found = await send(target("https://upstream.invalid"))
    assert isinstance(found, Unavailable)
    assert not found.ambiguous


async def test_an_address_without_a_host_is_held() -> None:
    assert isinstance(await send(target("https://")), Misconfigured)


@pytest.mark.parametrize(
    "url",
    [
        "http://upstream.example",
        "http://192.0.2.1",
        "http://127.0.0.1.example",
        "http://localhost.example",
        "http://127.0.0.1@upstream.example",
        "http://0.0.0.0",
        "HTTP://upstream.example",
        "http://[2001:db8::1]",
        "//upstream.example",
        "upstream.example",
    ],
)
async def test_plain_http_beyond_this_machine_is_held_and_nothing_is_sent(url: str) -> None:
    async with listening(saying(NO_CONTENT)) as proxy:
        found = await send(replace(target(url), proxy=proxy.url))
        assert isinstance(found, Misconfigured)
        assert "https" in found.why
        assert proxy.connections == 0


async def test_a_stand_in_that_refuses_holds_every_event() -> None:
    assert await Refusing("no key").send("track", BODY) == Misconfigured("no key")


# --- secrets -----------------------------------------------------------------------------------------


def test_a_target_shows_neither_key_nor_proxy() -> None:
    shown = replace(target("https://a.example"), proxy="http://me:sesame@proxy.example")
    for text in (repr(shown), str(shown), f"{shown}"):
        assert KEY not in text
        assert "sesame" not in text
        assert "https://a.example" in text


# --- a proxy -----------------------------------------------------------------------------------------


async def test_a_configured_proxy_is_asked_for_the_whole_url(sandbox: Sandbox) -> None:
    async with listening(saying(NO_CONTENT)) as proxy:
        to = replace(target(sandbox.url), proxy=f"http://me:sesame@127.0.0.1:{proxy.port}")
        assert await send(to) == Delivered()
    assert proxy.heard.startswith(f"POST {sandbox.url}/api/public/apps/track HTTP/1.1\r\n".encode())
    credentials = base64.b64encode(b"me:sesame")
    assert b"proxy-authorization: basic " + credentials in proxy.heard.replace(
        b"Proxy-Authorization: Basic", b"proxy-authorization: basic"
    )
    assert sandbox.requests == 0


@pytest.mark.parametrize(
    "name", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"]
)
async def test_a_proxy_of_the_environment_is_ignored(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    async with listening(saying(NO_CONTENT)) as proxy:
        monkeypatch.setenv(name, proxy.url)
        assert await send(target(sandbox.url)) == Delivered()
        assert (proxy.connections, sandbox.requests) == (0, 1)


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        ("407 Proxy Authentication Required", Misconfigured),
        ("403 Forbidden", Misconfigured),
        ("502 Bad Gateway", Unavailable),
        ("503 Service Unavailable", Unavailable),
    ],
)
async def test_a_proxy_that_opens_no_tunnel_costs_no_event(
    status: str, meaning: type[Outcome]
) -> None:
    async with listening(saying(http(status, b""))) as proxy:
        to = replace(
            target("https://upstream.invalid"), proxy=f"http://me:sesame@127.0.0.1:{proxy.port}"
        )
        found = await send(to)
    assert isinstance(found, meaning)
    assert "sesame" not in repr(found)
    assert proxy.heard.startswith(b"CONNECT upstream.invalid:443 HTTP/1.1\r\n")
    assert KEY.encode() not in proxy.heard


async def test_a_proxy_that_is_down_is_not_ambiguous(sandbox: Sandbox) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        proxy = f"http://me:sesame@127.0.0.1:{unheard.getsockname()[1]}"
        found = await send(replace(target(sandbox.url), proxy=proxy))
    assert isinstance(found, Unavailable)
    assert not found.ambiguous
    assert "sesame" not in found.why


# --- TLS ---------------------------------------------------------------------------------------------


def https(wire: Wire, certificates: Certificates | None = None) -> Target:
    to = target(f"https://127.0.0.1:{wire.port}")
    return to if certificates is None else replace(to, ca_file=certificates["ca.pem"])


async def test_a_certificate_of_the_configured_authority_is_trusted(
    certificates: Certificates,
) -> None:
    async with listening(saying(NO_CONTENT), certificates.server()) as wire:
        assert await send(https(wire, certificates)) == Delivered()


async def test_a_certificate_of_an_unknown_authority_is_held_before_the_key_is_sent(
    certificates: Certificates,
) -> None:
    async with listening(saying(NO_CONTENT), certificates.server()) as wire:
        unknown = https(wire)
        another = replace(unknown, ca_file=certificates["other.pem"])
        for to in (unknown, another):
            found = await send(to)
            assert isinstance(found, Misconfigured)
            assert "upstream.ca_file" in found.why
        assert wire.heard == b""


async def test_a_self_signed_certificate_is_held(certificates: Certificates) -> None:
    async with listening(saying(NO_CONTENT), certificates.server("other")) as wire:
        assert isinstance(await send(https(wire, certificates)), Misconfigured)
        assert wire.heard == b""


async def test_a_certificate_of_another_name_is_held(certificates: Certificates) -> None:
    async with listening(saying(NO_CONTENT), certificates.server("stranger")) as wire:
        assert isinstance(await send(https(wire, certificates)), Misconfigured)
        assert wire.heard == b""


async def test_a_client_certificate_is_shown_to_an_upstream_that_asks(
    certificates: Certificates,
) -> None:
    async with listening(saying(NO_CONTENT), certificates.server(asks_client=True)) as wire:
        to = https(wire, certificates)
        shown = replace(
            to, client_cert=certificates["client.pem"], client_key=certificates["client.key"]
        )
        assert await send(shown) == Delivered()
        assert isinstance(await send(to), Misconfigured | Unavailable)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ca_file": "missing.pem"},
        {"ca_file": "ca.key"},
        {"client_cert": "missing.pem"},
        {"client_cert": "client.pem", "client_key": "server.key"},
        {"client_cert": "client.pem", "client_key": "missing.key"},
        {"client_cert": "client.key"},
    ],
    ids=str,
)
async def test_tls_files_that_cannot_be_loaded_hold_everything(
    certificates: Certificates, wrong: dict[str, str]
) -> None:
    files = {name: certificates[file] for name, file in wrong.items()}
    to = replace(
        target("https://127.0.0.1:1"),
        ca_file=files.get("ca_file"),
        client_cert=files.get("client_cert"),
        client_key=files.get("client_key"),
    )
    found = await send(to)
    assert isinstance(found, Misconfigured)
    assert "upstream.ca_file" in found.why


async def test_a_certificate_file_that_comes_later_ends_the_hold(
    certificates: Certificates, tmp_path: Path
) -> None:
    late = tmp_path / "late.pem"
    async with listening(saying(NO_CONTENT), certificates.server()) as wire:
        to = replace(https(wire), ca_file=late)
        async with open_upstream(to, SystemClock(), connections=1) as upstream:
            assert isinstance(await upstream.send("track", BODY), Misconfigured)
            late.write_bytes(certificates["ca.pem"].read_bytes())
            assert await upstream.send("track", BODY) == Delivered()


async def test_a_tls_upstream_that_never_greets_is_not_ambiguous() -> None:
    async def converse(
        _wire: Wire, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter
    ) -> None:
        await reader.read(-1)

    async with listening(converse) as wire:
        found = await send(replace(https(wire), connect_timeout_s=0.2))
    assert isinstance(found, Unavailable)
    assert not found.ambiguous


async def test_a_plain_server_where_tls_was_expected_costs_no_event(sandbox: Sandbox) -> None:
    found = await send(target(sandbox.url.replace("http://", "https://")))
    assert isinstance(found, Misconfigured | Unavailable)
    assert sandbox.stored == []


async def test_the_proxy_before_a_tls_upstream_never_sees_the_key(
    certificates: Certificates,
) -> None:
    async def tunnel(
        wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        line = (await wire.request(reader)).split(b"\r\n")[0].decode()
        host, _, port = line.split()[1].rpartition(":")
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pass_on(wire, reader, inner_writer))
                tasks.create_task(pass_on(wire, inner_reader, writer))
        finally:
            inner_writer.close()

    async with (
        listening(saying(NO_CONTENT), certificates.server()) as upstream,
        listening(tunnel) as proxy,
    ):
        assert await send(replace(https(upstream, certificates), proxy=proxy.url)) == Delivered()
    assert proxy.heard.startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % upstream.port)
    assert KEY.encode() in upstream.heard
    assert KEY.encode() not in proxy.heard


async def pass_on(wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        wire.heard += data
        writer.write(data)
        await writer.drain()
    writer.close()
