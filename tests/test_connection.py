"""Over real sockets: order, backpressure, deadlines and closing; handlers and the clock are the test's."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import uvloop
from structlog.testing import capture_logs

from agent.errors import AgentError
from agent.exchange import STORED, Answer, Request
from agent.ingest.connection import Connection, Deadlines, Shared
from agent.ingest.guard import Guard
from agent.ingest.reply import Handler, Later, Reply
from agent.ingest.server import serving
from agent.ingest.wire import STORED_PLAIN

LOOPS = {"uvloop": uvloop.new_event_loop}
"""Beside asyncio's own: transports differ."""

DEADLINE_S = 10.0
SILENCE_S = 0.3
"""Long enough for what must not happen to happen; a slow machine only hides it."""

GUARD = Guard(allowed_hosts=frozenset(), allowed_origins=frozenset(), max_body_bytes=100_000)
HUGE_BYTES = 30_000_000
"""More than the kernel takes in for a client that does not read."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def get(path: str, *lines: str, version: str = "1.1") -> bytes:
    head = [f"GET {path} HTTP/{version}", "Host: 127.0.0.1", *lines]
    return ("\r\n".join(head) + "\r\n\r\n").encode()


def post(body: bytes, *lines: str, host: str = "127.0.0.1", length: int | None = None) -> bytes:
    head = ["POST / HTTP/1.1", f"Host: {host}", *lines]
    head.append(f"Content-Length: {len(body) if length is None else length}")
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body


def said(text: str) -> bytes:
    """Return the whole response of `echo`."""
    return (
        "HTTP/1.1 200 OK\r\nServer: tranthor-agent\r\n"
        "Content-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}"
    ).encode()


def echo(request: Request) -> Answer:
    return Answer(status=200, body=request.path.encode())


class Desk:
    """A handler whose answers the test gives, when it wants."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, asyncio.Future[Answer]]] = []

    def handle(self, request: Request) -> Reply:
        future = asyncio.get_running_loop().create_future()
        self.asked.append((request.path, future))
        return Later(future, asyncio.Future.result)


class Watched(Connection):
    """Tells how much has come, so that a test need not guess."""

    received_bytes = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.received_bytes += len(data)


class Site:
    """Connections without the server that looks after them: the test looks, at a time of its own."""

    def __init__(self, shared: Shared, port: int) -> None:
        self.shared = shared
        self.port = port

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Streams]:
        """Yield streams to a connection that the site knows of."""
        before = len(self.shared.connections)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        await until(lambda: len(self.shared.connections) > before)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def received(self, least_bytes: int) -> None:
        """Wait until the one connection has got so much."""
        await until(lambda: self.received_bytes >= least_bytes)

    @property
    def received_bytes(self) -> int:
        (connection,) = self.shared.connections
        assert isinstance(connection, Watched)
        return connection.received_bytes

    def look(self, after_s: float) -> None:
        """Do what the server would *after_s* from now."""
        for connection in tuple(self.shared.connections):
            connection.look(self.shared.loop.time() + after_s)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # the kernel and the transport tell nobody
            await asyncio.sleep(0.005)


@asynccontextmanager
async def site(handler: Handler, guard: Guard = GUARD) -> AsyncIterator[Site]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        shared = Shared(guard=guard, handler=handler, deadlines=Deadlines(), tasks=tasks, loop=loop)
        server = await loop.create_server(lambda: Watched(shared), "127.0.0.1", 0)
        try:
            yield Site(shared, server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for connection in tuple(shared.connections):
                connection.abort()
            await until(lambda: not shared.connections)


# --- order and backpressure ------------------------------------------------------------------------


async def test_requests_sent_at_once_are_answered_in_their_order() -> None:
    async with site(echo) as here, here.connected() as (reader, writer):
        writer.write(b"".join(get(f"/{n}") for n in range(1000)) + get("/", "Connection: close"))
        answered = await reader.read()
    bodies = [each.rpartition(b"\r\n\r\n/")[2] for each in answered.split(b"HTTP/1.1 200 OK")]
    assert bodies == [b"", *(b"%d" % n for n in range(1000)), b""]


async def test_the_next_request_waits_for_the_answer_before_it() -> None:
    desk = Desk()
    async with site(desk.handle) as here, here.connected() as (reader, writer):
        writer.write(get("/1") + get("/2"))
        await until(lambda: len(desk.asked) == 1)
        writer.write(get("/3"))
        await asyncio.sleep(SILENCE_S)
        assert [path for path, _ in desk.asked] == ["/1"]
        for n in range(3):
            await until(lambda n=n: len(desk.asked) > n)  # type: ignore[misc]
            desk.asked[n][1].set_result(STORED)
            assert await reader.readexactly(len(STORED_PLAIN)) == STORED_PLAIN
        writer.write(get("/4"))
        await until(lambda: len(desk.asked) == 4)
        assert [path for path, _ in desk.asked] == ["/1", "/2", "/3", "/4"]


async def test_no_more_is_read_while_an_answer_is_awaited() -> None:
    desk = Desk()
    long = get("/", "X: " + "x" * 30_000)
    async with site(desk.handle) as here, here.connected() as (_, writer):
        writer.write(get("/"))
        await until(lambda: len(desk.asked) == 1)
        writer.write(long * (HUGE_BYTES // len(long)))
        await here.received(1000)
        await asyncio.sleep(SILENCE_S)
        assert here.received_bytes < 1_000_000


async def test_no_more_is_asked_while_answers_are_not_read() -> None:
    asked = 0

    def answer(_: Request) -> Answer:
        nonlocal asked
        asked += 1
        return Answer(status=200, body=bytes(HUGE_BYTES))

    async with site(answer) as here, here.connected() as (_, writer):
        writer.write(get("/") * 5)
        await until(lambda: asked > 0)
        await asyncio.sleep(SILENCE_S)
        assert asked == 1


async def test_a_large_answer_arrives_whole_and_the_next_one_after_it() -> None:
    def answer(request: Request) -> Answer:
        return Answer(status=200, body=bytes(HUGE_BYTES if request.path == "/huge" else 1))

    async with site(answer) as here, here.connected() as (reader, writer):
        writer.write(get("/huge") + get("/", "Connection: close"))
        answered = await reader.read()
    assert answered.count(b"HTTP/1.1 200 OK") == 2
    assert len(answered.replace(b"\0", b"")) == len(answered) - HUGE_BYTES - 1


# --- deadlines -------------------------------------------------------------------------------------

IDLE_S, BODY_S, WRITE_S, LINGER_S = 12.0, 10.0, 10.0, 2.0
CHUNKED = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "patience_s", "status"),
    [
        (b"", IDLE_S, b""),
        (b"\r\n\r\n", IDLE_S, b""),
        (b"GET / HT", IDLE_S, b"HTTP/1.1 408 "),
        (get("/")[:-2], IDLE_S, b"HTTP/1.1 408 "),
        (post(b"12345", length=6), BODY_S, b"HTTP/1.1 408 "),
        (CHUNKED + b"5\r\n12", BODY_S, b"HTTP/1.1 408 "),
    ],
    ids=["nothing", "blank lines", "half a line", "half a head", "half a body", "half a chunk"],
)
async def test_a_client_that_stalls_is_cut_off_and_told(
    sent: bytes, patience_s: float, status: bytes
) -> None:
    async with site(echo) as here, here.connected() as (reader, writer):
        writer.write(sent)
        await here.received(len(sent))
        here.look(patience_s - 1)
        await asyncio.sleep(0)
        assert not reader.at_eof()
        here.look(patience_s + 1)
        answered = await reader.read()
        assert answered.startswith(status)
        assert bool(answered) == bool(status)
    assert here.shared.reading.body_bytes == 0


async def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    async with (
        site(lambda _: Answer(status=200, body=bytes(HUGE_BYTES))) as here,
        here.connected() as (_, writer),
    ):
        writer.write(get("/"))
        await here.received(1)
        here.look(WRITE_S - 1)
        assert here.shared.connections
        here.look(WRITE_S + 1)
        await until(lambda: not here.shared.connections)


async def test_a_client_that_was_refused_may_read_it_but_not_stay() -> None:
    async with site(echo) as here, here.connected() as (reader, writer):
        writer.write(post(b"", host="evil.example", length=90_000))
        assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
        writer.write(bytes(90_000))  # dropped, without a reset
        await writer.drain()
        here.look(LINGER_S - 1)
        assert here.shared.connections
        here.look(LINGER_S + 1)
        await until(lambda: not here.shared.connections)


async def test_an_answer_that_takes_long_is_waited_for() -> None:
    desk = Desk()
    async with site(desk.handle) as here, here.connected() as (reader, writer):
        writer.write(get("/"))
        await until(lambda: len(desk.asked) == 1)
        here.look(100.0)
        desk.asked[0][1].set_result(STORED)
        assert await reader.readexactly(len(STORED_PLAIN)) == STORED_PLAIN


# --- closing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "keeps"),
    [
        (get("/a", version="1.0"), False),
        (get("/a", "Connection: keep-alive", version="1.0"), True),
        (get("/a"), True),
        (get("/a", "Connection: close"), False),
    ],
    ids=["1.0", "1.0 kept", "1.1", "1.1 closed"],
)
async def test_the_connection_is_kept_as_the_client_asked(
    request_bytes: bytes, keeps: bool
) -> None:
    async with site(echo) as here, here.connected() as (reader, writer):
        writer.write(request_bytes)
        head = await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(2) == b"/a"
        assert (b"\r\nConnection: close\r\n" in head) is not keeps
        if keeps:
            writer.write(get("/next", "Connection: close"))
            assert (await reader.read()).endswith(b"\r\n\r\n/next")
        else:
            assert await reader.read() == b""


async def test_a_client_that_is_done_sending_gets_its_answer() -> None:
    desk = Desk()
    async with site(desk.handle) as here, here.connected() as (reader, writer):
        writer.write(get("/"))
        writer.write_eof()
        await until(lambda: len(desk.asked) == 1)
        await asyncio.sleep(SILENCE_S)
        desk.asked[0][1].set_result(STORED)
        assert await reader.read() == STORED_PLAIN


async def test_a_client_that_leaves_before_its_answer_troubles_nobody() -> None:
    desk = Desk()
    with capture_logs() as logs:
        async with site(desk.handle) as here:
            async with here.connected() as (_, writer):
                writer.write(get("/1") + get("/2"))
                await until(lambda: len(desk.asked) == 1)
            desk.asked[0][1].set_result(STORED)
            # What was sent is done, as a client may leave that only wants to be rid of it.
            await until(lambda: len(desk.asked) == 2)
            desk.asked[1][1].set_result(STORED)
            await until(lambda: not here.shared.connections)
    assert logs == []


class BrokenGuard(Guard):
    def judge(self, headers: object, path: str) -> Answer | None:
        raise ZeroDivisionError


@pytest.mark.parametrize("way", ["while it is read", "at once", "later", "in a task"])
async def test_a_bug_is_a_500_and_logged_once_without_the_request(way: str) -> None:
    async def fail() -> Answer:
        raise ZeroDivisionError

    def handle(_: Request) -> Reply:
        if way == "in a task":
            return fail()
        if way == "at once":
            raise ZeroDivisionError
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        future.set_exception(ZeroDivisionError())
        return Later(future, asyncio.Future.result)

    guard = BrokenGuard(**asdict(GUARD)) if way == "while it is read" else GUARD
    with capture_logs() as logs:
        async with site(handle, guard) as here, here.connected() as (reader, writer):
            writer.write(post(b"secret", "X: secret", "Connection: close"))
            answered = await reader.read()
    assert answered.startswith(b"HTTP/1.1 500 ")
    assert json.loads(answered.partition(b"\r\n\r\n")[2])["code"] == "AGENT_BUG"
    (logged,) = logs
    assert logged["event"] == "request.failed"
    assert isinstance(logged["exc_info"], ZeroDivisionError)
    assert "secret" not in str(logged)


# --- the server ------------------------------------------------------------------------------------


async def test_stopping_closes_idle_connections_and_cuts_what_takes_too_long() -> None:
    cancelled = asyncio.Event()
    begun = asyncio.Event()

    async def never(_: Request) -> Answer:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    brief = Deadlines(stop_s=SILENCE_S)
    async with asyncio.timeout(DEADLINE_S):
        async with serving(GUARD, never, host="127.0.0.1", port=0, deadlines=brief) as (url,):
            port = int(url.rpartition(":")[2])
            idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
            busy, busy_writer = await asyncio.open_connection("127.0.0.1", port)
            busy_writer.write(get("/"))
            await begun.wait()
        assert cancelled.is_set()
        assert await idle.read() == b""
        assert await busy.read() == b""
        idle_writer.transport.abort()
        busy_writer.transport.abort()


async def test_a_body_half_sent_may_be_finished_while_stopping() -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        asyncio.TaskGroup() as tasks,
        serving(GUARD, echo, host="127.0.0.1", port=0) as (url,),
    ):
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b"", "Expect: 100-continue", length=5))
        await reader.readuntil(b"\r\n\r\n")

        async def finish() -> bytes:
            await asyncio.sleep(SILENCE_S)  # until the server is stopping
            writer.write(b"hello")
            return await reader.read()

        finishing = tasks.create_task(finish())
        finishing.add_done_callback(lambda _: writer.close())
    assert finishing.result().startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in finishing.result()


async def test_sockets_handed_in_are_listened_on_and_a_path_stays(tmp_path: Path) -> None:
    path = tmp_path / "given.sock"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(path))
        given = [tcp, unix]
        async with (
            asyncio.timeout(DEADLINE_S),
            serving(GUARD, echo, host="", port=0, inherited=given) as (url, shown),
        ):
            assert shown == str(path)
            for reader, writer in (
                await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])),
                await asyncio.open_unix_connection(str(path)),
            ):
                writer.write(get("/a", "Connection: close"))
                assert (await reader.read()).endswith(b"/a")
                writer.close()
                await writer.wait_closed()
    assert path.is_socket()


async def test_a_path_of_a_dead_agent_is_taken_over_and_of_a_living_one_not(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(GUARD, echo, host="127.0.0.1", port=0, unix_socket=str(path)):
        with pytest.raises(AgentError, match="another agent listens on it"):
            async with serving(GUARD, echo, host="127.0.0.1", port=0, unix_socket=str(path)):
                pass
        assert path.stat().st_mode & 0o777 == 0o660


async def test_a_path_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    path.write_text("precious")
    with pytest.raises(AgentError, match="something else is there"):
        async with serving(GUARD, echo, host="127.0.0.1", port=0, unix_socket=str(path)):
            pass
    assert path.read_text() == "precious"


async def test_an_ipv6_address_is_shown_as_a_url() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with serving(GUARD, echo, host="::1", port=0) as (url,):
        assert url.startswith("http://[::1]:")
