"""Over real sockets, into a real outbox: every answer, every deadline, every bound of the listener."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import sqlite3
import stat
import threading
import zlib
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from agent.contract import Terms, read_event
from agent.errors import AgentError, OutboxOverloadedError
from agent.exchange import Answer, Request
from agent.ingest.callers import Callers
from agent.ingest.guard import Guard
from agent.ingest.reply import Handler, Reply
from agent.ingest.routes import Routes
from agent.ingest.server import serving
from agent.ingest.turns import WAITING_BYTES, Turns
from agent.outbox.intake import QUEUE_EVENTS
from agent.outbox.records import Policy
from agent.outbox.store import Store
from agent.outbox.writer import Writer, open_writer

TRACK = "/api/public/apps/track"
BATCH = "/api/public/apps/batch"
LIMIT_BYTES = 400_000
DEADLINE_S = 10.0

SILENCE_S = 0.2
"""Long enough for an answer that must not come yet to come."""


class FakeClock:
    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        return self.now_ms / 1000


def guard(max_body_bytes: int = LIMIT_BYTES) -> Guard:
    return Guard(
        allowed_hosts=frozenset(),
        allowed_origins=frozenset({"https://shop.example"}),
        max_body_bytes=max_body_bytes,
    )


def track(message_id: str = "m1", **fields: object) -> bytes:
    return json.dumps({"event": "Sold", "userId": "u1", "messageId": message_id} | fields).encode()


def batch(*items: object) -> bytes:
    return json.dumps({"batch": items}).encode()


def request_head(*lines: str, host: str = "127.0.0.1", body_bytes: int | None = None) -> bytes:
    head = [f"POST {TRACK} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *lines]
    if body_bytes is not None:
        head.append(f"Content-Length: {body_bytes}")
    return ("\r\n".join(head) + "\r\n\r\n").encode()


class Ingest:
    """The listener with all behind it, and an app that talks to it."""

    def __init__(self, path: Path, writer: Writer, clock: FakeClock) -> None:
        self.writer = writer
        self.clock = clock
        self.port = 0
        self.session: aiohttp.ClientSession
        self._path = path
        self.routes = Routes(writer, clock, terms=Terms(max_body_bytes=LIMIT_BYTES))
        self._begun = asyncio.Event()
        self._requests = 0

    def handle(self, request: Request) -> Reply:
        reply = self.routes.answer(request)
        self._requests += 1
        self._begun.set()
        return reply

    async def begun(self, requests: int) -> None:
        """Wait until so many requests have come, and stand before the outbox."""
        async with asyncio.timeout(DEADLINE_S):
            while self._requests < requests:
                self._begun.clear()
                await self._begun.wait()

    async def post(
        self, body: bytes, path: str = TRACK, method: str = "POST", **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, body and headers; names of headers are written with underscores."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(
            method,
            f"http://127.0.0.1:{self.port}{path}",
            data=io.BytesIO(body),
            headers={"Content-Type": "application/json", **given},
        ) as response:
            text = await response.read()
            return response.status, json.loads(text) if text else None, dict(response.headers)

    async def raw(self, sent: bytes) -> bytes:
        """Send bytes as they are; return what comes back until the connection is closed."""
        async with asyncio.timeout(DEADLINE_S), self.connection() as (reader, writer):
            writer.write(sent)
            return await reader.read()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def stored(self) -> list[dict[str, Any]]:
        """Return the bodies that are committed, as another process would see them."""
        db = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)
        try:
            return [
                json.loads(body) for (body,) in db.execute("SELECT body FROM pending ORDER BY seq")
            ]
        finally:
            db.close()

    @asynccontextmanager
    async def writer_held(self) -> AsyncIterator[None]:
        """Keep the writer in a transaction while the block runs: what comes in queues up."""
        loop = asyncio.get_running_loop()
        held, release = asyncio.Event(), threading.Event()

        def hold(_: Store) -> None:
            loop.call_soon_threadsafe(held.set)
            release.wait()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.writer.perform(hold))
            await held.wait()
            try:
                yield
            finally:
                release.set()


@asynccontextmanager
async def running(tmp_path: Path, *, max_bytes: int = 2**30) -> AsyncIterator[Ingest]:
    path = tmp_path / "outbox.db"
    clock = FakeClock()
    policy = Policy(max_bytes=max_bytes, evicts=False, remember=True)
    async with AsyncExitStack() as stack:
        writer = await stack.enter_async_context(open_writer(path, policy, clock))
        ingest = Ingest(path, writer, clock)
        (url,) = await stack.enter_async_context(
            serving(guard(), ingest.handle, host="127.0.0.1", port=0)
        )
        ingest.port = int(url.rpartition(":")[2])
        ingest.session = await stack.enter_async_context(
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=DEADLINE_S),
                connector=aiohttp.TCPConnector(limit=0),
            )
        )
        yield ingest


@pytest.fixture
async def ingest(tmp_path: Path) -> AsyncIterator[Ingest]:
    async with running(tmp_path) as ingest:
        yield ingest


def assert_refused(answer: tuple[int, Any, dict[str, str]], status: int, code: str) -> str:
    got, body, headers = answer
    assert got == status
    assert set(body) == {"statusCode", "code", "error", "message"}
    assert (body["statusCode"], body["code"]) == (status, code)
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    return str(body["message"])


# --- storing ---------------------------------------------------------------------------------------


async def test_a_204_is_empty_and_the_event_is_committed(ingest: Ingest) -> None:
    status, body, headers = await ingest.post(track(timestamp="2026-11-23T10:00:00Z"))
    assert ingest.stored() == [json.loads(track(timestamp="2026-11-23T10:00:00Z"))]
    assert (status, body) == (204, None)
    assert "Idempotent-Replayed" not in headers
    assert "Content-Type" not in headers


async def test_no_answer_comes_before_the_commit(ingest: Ingest) -> None:
    async with asyncio.TaskGroup() as tasks, ingest.writer_held():
        post = tasks.create_task(ingest.post(track()))
        await ingest.begun(1)
        answered, _ = await asyncio.wait([post], timeout=SILENCE_S)
        assert not answered
        assert ingest.stored() == []
    assert post.result()[0] == 204
    assert len(ingest.stored()) == 1


async def test_the_same_message_id_is_stored_once_and_says_so(ingest: Ingest) -> None:
    await ingest.post(track())
    ingest.clock.now_ms += 60_000
    status, body, headers = await ingest.post(track())
    assert (status, body, headers["Idempotent-Replayed"]) == (204, None, "true")
    assert [event["timestamp"] for event in ingest.stored()] == ["2023-11-14T22:13:20.000Z"]


async def test_the_first_body_of_a_message_id_wins(ingest: Ingest) -> None:
    await ingest.post(track(event="First"))
    status, _, headers = await ingest.post(track(event="Second"))
    assert (status, headers["Idempotent-Replayed"]) == (204, "true")
    assert [event["event"] for event in ingest.stored()] == ["First"]


async def test_one_id_posted_many_times_at_once_is_stored_once(ingest: Ingest) -> None:
    async with asyncio.TaskGroup() as tasks:
        posts = [tasks.create_task(ingest.post(track())) for _ in range(20)]
    assert {post.result()[0] for post in posts} == {204}
    replayed = [post for post in posts if "Idempotent-Replayed" in post.result()[2]]
    assert len(replayed) == 19
    assert len(ingest.stored()) == 1


async def test_a_batch_is_stored_in_one_transaction(ingest: Ingest) -> None:
    items = [{"type": "page", "userId": f"u{n}", "messageId": f"m{n}"} for n in range(300)]
    before = ingest.writer.commits
    status, body, headers = await ingest.post(batch(*items), path=BATCH)
    assert (status, body) == (204, None)
    assert "Idempotent-Replayed" not in headers
    assert [event["messageId"] for event in ingest.stored()] == [f"m{n}" for n in range(300)]
    assert ingest.writer.commits == before + 1


async def test_one_bad_item_keeps_the_whole_batch_out(ingest: Ingest) -> None:
    good = {"type": "page", "userId": "u", "messageId": "m1"}
    answer = await ingest.post(batch(*[good] * 200, {**good, "userId": ""}), path=BATCH)
    message = assert_refused(answer, 400, "FST_ERR_VALIDATION")
    assert message == "batch[200].userId: must not be empty"
    assert ingest.stored() == []


async def test_of_a_batch_only_what_is_new_is_stored(ingest: Ingest) -> None:
    items = [{"type": "page", "userId": "u", "messageId": f"m{n}"} for n in range(3)]
    await ingest.post(batch(items[1]), path=BATCH)
    _, _, headers = await ingest.post(batch(items[0], items[0], *items), path=BATCH)
    assert "Idempotent-Replayed" not in headers
    assert [event["messageId"] for event in ingest.stored()] == ["m1", "m0", "m2"]
    _, _, headers = await ingest.post(batch(*items), path=BATCH)
    assert headers["Idempotent-Replayed"] == "true"


async def test_a_batch_without_events_is_a_204(ingest: Ingest) -> None:
    assert (await ingest.post(batch(), path=BATCH))[0] == 204
    assert ingest.stored() == []


async def test_a_batch_of_more_than_may_wait_is_stored_when_nothing_else_does(
    ingest: Ingest,
) -> None:
    count = QUEUE_EVENTS + 1
    items = [{"type": "page", "userId": "u", "messageId": f"m{n}"} for n in range(count)]
    assert (await ingest.post(batch(*items), path=BATCH))[0] == 204
    assert len(ingest.stored()) == count


async def test_a_batch_whose_app_may_post_no_more_when_it_was_read_is_refused(
    ingest: Ingest,
) -> None:
    item = {"type": "page", "userId": "u", "messageId": "m"}
    headers = {"content-type": "application/json"}
    asked = Request(method="POST", path=BATCH, query={}, headers=headers, body=batch(item))
    reply = ingest.routes.answer(asked)
    assert isinstance(reply, Coroutine)
    ingest.routes.callers = Callers(require_token=True)
    assert (await reply).status == 401
    assert ingest.stored() == []


async def test_the_conflicts_of_a_batch_are_one_line_in_the_log(ingest: Ingest) -> None:
    items = [{"type": "page", "userId": "u", "messageId": f"m{n}"} for n in range(3)]
    await ingest.post(batch(*items), path=BATCH)
    with capture_logs() as logs:
        await ingest.post(batch(items[0], *({**it, "name": "x"} for it in items[1:])), path=BATCH)
    assert [(line["event"], line["message_id"], line["events"]) for line in logs] == [
        ("event.conflicting", "m1", 2)
    ]


async def test_a_batch_that_does_not_fit_into_the_outbox_is_refused_whole(tmp_path: Path) -> None:
    async with running(tmp_path, max_bytes=200_000) as ingest:
        items = [
            {"type": "page", "userId": "u", "messageId": f"m{n}", "name": "x" * 100}
            for n in range(1_000)
        ]
        answer = await ingest.post(batch(*items), path=BATCH)
        assert "outbox.max_size" in assert_refused(answer, 507, "AGENT_OUTBOX_FULL")
        assert ingest.stored() == []


async def test_others_have_turns_while_a_large_batch_is_read() -> None:
    body = batch(*[{"type": "page", "userId": "u", "messageId": "m"}] * 5_000)
    turns = 0
    async with asyncio.TaskGroup() as tasks:
        read = tasks.create_task(Turns().read(body, received_ms=0, terms=Terms()))
        while not read.done():
            turns += 1
            await asyncio.sleep(0)
    assert len(read.result()) == 5_000
    assert turns > 20


async def test_batches_that_are_too_many_to_wait_are_a_503() -> None:
    turns, terms = Turns(), Terms()
    body = batch(*[{"type": "page", "userId": "u", "messageId": "m"}] * 1_000)
    huge = body + b" " * (WAITING_BYTES // 2 - len(body))
    async with asyncio.TaskGroup() as tasks:
        reads = [tasks.create_task(turns.read(huge, received_ms=0, terms=terms)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OutboxOverloadedError, match="wait to be read"):
            await turns.read(body, received_ms=0, terms=terms)
    assert [len(read.result()) for read in reads] == [1_000, 1_000]
    assert len(await turns.read(body, received_ms=0, terms=terms)) == 1_000


async def test_alias_is_answered_as_the_upstream_does(ingest: Ingest) -> None:
    answer = await ingest.post(b"{}", path="/api/public/apps/alias")
    assert assert_refused(answer, 400, "AGENT_NOT_IMPLEMENTED") == "Not yet implemented."


async def test_posts_at_once_share_their_commits(ingest: Ingest) -> None:
    async with asyncio.TaskGroup() as tasks, ingest.writer_held():
        before = ingest.writer.commits
        posts = [tasks.create_task(ingest.post(track(f"m{n}"))) for n in range(64)]
        await ingest.begun(64)
    assert [post.result()[0] for post in posts] == [204] * 64
    assert len(ingest.stored()) == 64
    # One is the transaction that held the writer, one the group's; a third if one came late.
    assert ingest.writer.commits - before <= 3


async def test_a_connection_is_kept_for_the_next_post(ingest: Ingest) -> None:
    sent = b"".join(
        request_head(*close, body_bytes=len(track(name))) + track(name)
        for name, close in (("m1", []), ("m2", []), ("m3", ["Connection: close"]))
    )
    answered = await ingest.raw(sent)
    assert answered.count(b"HTTP/1.1 204 No Content\r\n") == 3
    assert [event["messageId"] for event in ingest.stored()] == ["m1", "m2", "m3"]


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "application/json;charset=UTF-8", "Application/JSON"],
)
async def test_json_is_known_by_any_spelling(ingest: Ingest, content_type: str) -> None:
    status, _, _ = await ingest.post(track(), Content_Type=content_type)
    assert status == 204


@pytest.mark.parametrize(
    ("compress", "encoding"),
    [(gzip.compress, "gzip"), (gzip.compress, "x-gzip"), (zlib.compress, "deflate")],
)
async def test_a_compressed_body_is_stored_plain(
    ingest: Ingest, compress: Any, encoding: str
) -> None:
    status, _, _ = await ingest.post(compress(track()), Content_Encoding=encoding)
    assert status == 204
    assert ingest.stored()[0]["messageId"] == "m1"


async def test_an_allowed_page_may_post(ingest: Ingest) -> None:
    status, _, _ = await ingest.post(track(), Origin="https://shop.example")
    assert status == 204


# --- refusing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (track(properties=[]), "properties: expected object, got array"),
        (track(userId=None), "userId: required"),
        (b"not json", "body: "),
        (b"", "body: "),
        (b"[" * 150_000, "body: nested deeper"),
    ],
)
async def test_a_bad_event_is_a_400_that_names_the_field(
    ingest: Ingest, body: bytes, message: str
) -> None:
    answer = await ingest.post(body)
    assert assert_refused(answer, 400, "FST_ERR_VALIDATION").startswith(message)
    assert answer[1]["error"] == "Bad Request"
    assert ingest.stored() == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", TRACK),
        ("PUT", TRACK),
        ("OPTIONS", TRACK),
        ("POST", f"{TRACK}/"),
        ("POST", "/"),
        ("POST", "/api/public/apps/track/../nothing"),
        ("GET", "/" + "x" * 2000),
    ],
)
async def test_an_unknown_route_is_a_404_that_names_the_right_one(
    ingest: Ingest, method: str, path: str
) -> None:
    answer = await ingest.post(track(), path=path, method=method)
    message = assert_refused(answer, 404, "AGENT_NOT_FOUND")
    assert "POST /api/public/apps/track" in message
    assert len(message) < 500
    assert ingest.stored() == []


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "application", ""],
)
async def test_another_content_type_is_a_415(ingest: Ingest, content_type: str) -> None:
    answer = await ingest.post(track(), Content_Type=content_type)
    message = assert_refused(answer, 415, "FST_ERR_CTP_INVALID_MEDIA_TYPE")
    assert message.startswith("Content-Type: expected application/json")
    assert ingest.stored() == []


@pytest.mark.parametrize("content_type", ["text/plain", "Text/Plain;charset=UTF-8"])
async def test_the_text_of_an_allowed_page_is_read_as_json(
    ingest: Ingest, content_type: str
) -> None:
    page = {"Origin": "https://shop.example", "Content_Type": content_type}
    assert (await ingest.post(track(), **page))[0] == 204
    assert [event["messageId"] for event in ingest.stored()] == ["m1"]

    answer = await ingest.post(b"hello", **page)
    assert assert_refused(answer, 400, "FST_ERR_VALIDATION").startswith("body: ")


@pytest.mark.parametrize(
    "content_type",
    ["text/html", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""],
)
async def test_what_else_an_allowed_page_may_send_is_a_415(
    ingest: Ingest, content_type: str
) -> None:
    answer = await ingest.post(track(), Origin="https://shop.example", Content_Type=content_type)
    assert_refused(answer, 415, "FST_ERR_CTP_INVALID_MEDIA_TYPE")
    assert ingest.stored() == []


async def test_an_unknown_encoding_is_a_415(ingest: Ingest) -> None:
    answer = await ingest.post(track(), Content_Encoding="br")
    assert assert_refused(answer, 415, "AGENT_UNSUPPORTED_ENCODING").startswith("Content-Encoding")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_that_is_not_gzip_is_a_400(ingest: Ingest, encoding: str) -> None:
    answer = await ingest.post(track(), Content_Encoding=encoding)
    assert assert_refused(answer, 400, "AGENT_BAD_ENCODING").startswith("body: not valid")


async def test_a_foreign_page_is_a_403(ingest: Ingest) -> None:
    answer = await ingest.post(track(), Origin="https://evil.example")
    assert assert_refused(answer, 403, "AGENT_FORBIDDEN").startswith("Origin: ")
    assert ingest.stored() == []


async def test_an_announced_body_over_the_limit_is_a_413_at_once(ingest: Ingest) -> None:
    async with asyncio.timeout(DEADLINE_S), ingest.connection() as (reader, writer):
        writer.write(request_head(body_bytes=LIMIT_BYTES + 1))
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")


async def test_a_chunked_body_over_the_limit_is_a_413(ingest: Ingest) -> None:
    async with asyncio.timeout(DEADLINE_S), ingest.connection() as (reader, writer):
        writer.write(request_head("Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(LIMIT_BYTES // 0x10000 + 1):
            writer.write(chunk)
        # The end of the body is never sent: an answer means that reading was given up.
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in (await reader.readuntil(b"\r\n\r\n")).lower()
    assert ingest.stored() == []


async def test_a_chunked_body_within_the_limit_is_stored(ingest: Ingest) -> None:
    body = track()
    sent = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (5, body[:5], len(body) - 5, body[5:])
    head = request_head("Transfer-Encoding: chunked", "Connection: close")
    assert (await ingest.raw(head + sent)).startswith(b"HTTP/1.1 204 ")
    assert len(ingest.stored()) == 1


async def test_a_bomb_is_a_413(ingest: Ingest) -> None:
    bomb = gzip.compress(bytes(500 * LIMIT_BYTES))
    assert len(bomb) < LIMIT_BYTES
    answer = await ingest.post(bomb, Content_Encoding="gzip")
    assert_refused(answer, 413, "FST_ERR_CTP_BODY_TOO_LARGE")


@pytest.mark.parametrize(
    "head",
    [
        request_head(host="evil.example", body_bytes=1000),
        request_head("Expect: 100-continue", host="evil.example", body_bytes=1000),
        request_head("Transfer-Encoding: chunked", host="evil.example"),
        request_head("Origin: https://evil.example", body_bytes=1000),
        request_head(host="evil.example", body_bytes=10 * LIMIT_BYTES),
        b"POST %b HTTP/1.0\r\nContent-Length: 1000\r\n\r\n" % TRACK.encode(),
    ],
    ids=["Host", "Host, expecting", "Host, chunked", "Origin", "Host, huge", "no Host"],
)
async def test_a_stranger_is_refused_before_the_body_is_read(ingest: Ingest, head: bytes) -> None:
    async with asyncio.timeout(DEADLINE_S), ingest.connection() as (reader, writer):
        writer.write(head)
        assert b" 403 Forbidden" in await reader.readline()


@pytest.mark.parametrize(
    "sent",
    [
        request_head("Host: evil.example", body_bytes=len(track())) + track(),
        request_head("Content-Length: 5", body_bytes=len(track())) + track(),
        request_head("Transfer-Encoding: chunked", body_bytes=len(track())) + track(),
        b"POST http://evil.example%b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % TRACK.encode(),
        b"GET evil HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n" * 10_000 + b"x",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX : y\r\n\r\n",
        request_head("Transfer-Encoding: chunked") + b"zz\r\n",
    ],
    ids=[
        "two hosts",
        "two lengths",
        "length and chunked",
        "absolute target",
        "relative target",
        "TLS",
        "blank lines",
        "huge header",
        "space before the colon",
        "bad chunk",
    ],
)
async def test_a_malformed_request_stores_nothing_and_is_closed(
    ingest: Ingest, sent: bytes
) -> None:
    answered = await ingest.raw(sent)
    assert b" 204 " not in answered
    assert answered == b"" or answered.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert ingest.stored() == []
    assert (await ingest.post(track()))[0] == 204


async def test_expect_100_continue_is_answered_before_the_body(ingest: Ingest) -> None:
    async with asyncio.timeout(DEADLINE_S), ingest.connection() as (reader, writer):
        writer.write(request_head("Expect: 100-continue", body_bytes=len(track())))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(track())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")


async def test_an_app_that_leaves_in_the_middle_of_a_body_stores_nothing(ingest: Ingest) -> None:
    async with ingest.connection() as (_, writer):
        writer.write(request_head(body_bytes=len(track())) + track()[:-1])
        await writer.drain()
    assert (await ingest.post(track("m2")))[0] == 204
    assert [event["messageId"] for event in ingest.stored()] == ["m2"]


async def test_an_app_that_leaves_before_the_commit_has_its_event_stored(ingest: Ingest) -> None:
    with capture_logs() as logs:
        async with ingest.writer_held(), ingest.connection() as (_, writer):
            writer.write(request_head(body_bytes=len(track())) + track())
            await ingest.begun(1)
            writer.transport.abort()
        assert (await ingest.post(track()))[2]["Idempotent-Replayed"] == "true"
    assert logs == []


# --- the outbox's own trouble ----------------------------------------------------------------------


def assert_retry_after(answer: tuple[int, Any, dict[str, str]]) -> None:
    assert answer[2]["Retry-After"].isdecimal()
    assert int(answer[2]["Retry-After"]) >= 1


async def test_a_full_outbox_is_a_507_that_says_when_to_retry(tmp_path: Path) -> None:
    async with running(tmp_path, max_bytes=200_000) as ingest:
        for n in range(30):
            answer = await ingest.post(track(f"m{n}", properties={"x": "y" * 10_000}))
            if answer[0] != 204:
                break
        assert "outbox.max_size" in assert_refused(answer, 507, "AGENT_OUTBOX_FULL")
        assert_retry_after(answer)
        assert len(ingest.stored()) == n


async def test_an_overloaded_writer_is_a_503_that_says_when_to_retry(ingest: Ingest) -> None:
    async with ingest.writer_held():
        events = [read_event("track", track(f"m{n}"), received_ms=0) for n in range(QUEUE_EVENTS)]
        full = ingest.writer.append(events)
        answer = await ingest.post(track("one more"))
    assert_refused(answer, 503, "AGENT_OVERLOADED")
    assert_retry_after(answer)
    assert len(await full) == QUEUE_EVENTS
    assert (await ingest.post(track("one more")))[0] == 204


async def test_a_broken_database_is_a_503_that_says_when_to_retry(ingest: Ingest) -> None:
    def fail(_: Store) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(AgentError):
        await ingest.writer.perform(fail)
    answer = await ingest.post(track())
    assert "same messageId" in assert_refused(answer, 503, "AGENT_OUTBOX_UNAVAILABLE")
    assert_retry_after(answer)


# --- deadlines -------------------------------------------------------------------------------------

STALL_S = 15.0


async def until_closed(ingest: Ingest, sent: bytes, drip: bytes) -> tuple[float, bytes]:
    """Send, then nothing more, or *drip* again and again; return when the agent hung up, and its words."""
    loop = asyncio.get_running_loop()
    answered = b""
    async with ingest.connection() as (reader, writer):
        writer.write(sent)
        begun_s = loop.time()
        while loop.time() < begun_s + STALL_S + 5:
            try:
                async with asyncio.timeout(0.2 + 0.1 * random.random()):
                    said = await reader.read(10_000)
                answered += said
                if not said:
                    break
            except TimeoutError:
                writer.write(drip)
            except ConnectionError:
                break
        return loop.time() - begun_s, answered


async def test_a_stalled_connection_is_closed_within_15_s_at_every_stage(ingest: Ingest) -> None:
    """The one slow test here: all stages at once, so that they cost one deadline."""
    body = request_head(body_bytes=1000) + track()
    stranger = request_head(host="evil.example", body_bytes=100_000)
    post = request_head(body_bytes=len(track())) + track()
    stages: dict[str, tuple[bytes, bytes]] = {
        "connected": (b"", b""),
        "in the request line": (b"POST /api", b""),
        "in the headers": (request_head()[:-2], b""),
        "in the headers, a byte at a time": (request_head()[:-2], b"x"),
        "in the headers, a header at a time": (request_head()[:-2], b"x: y\r\n"),
        "in blank lines": (b"", b"\r\n"),
        "in the body": (body, b""),
        "in the body, a byte at a time": (body, b" "),
        "before the body": (request_head(body_bytes=1000), b""),
        "in a chunked body": (request_head("Transfer-Encoding: chunked") + b"5\r\n{", b""),
        "in a chunk size": (request_head("Transfer-Encoding: chunked") + b"5", b""),
        "after 100 Continue": (request_head("Expect: 100-continue", body_bytes=1000), b""),
        "refused, body to come": (stranger, b""),
        "refused, body a byte at a time": (stranger, b" "),
        "idle after an answer": (post, b""),
        "in the next headers": (post + request_head()[:-2], b""),
        "in the next headers, a byte at a time": (post + request_head()[:-2], b"x"),
    }
    async with asyncio.TaskGroup() as tasks:
        closings = {
            stage: tasks.create_task(until_closed(ingest, sent, drip))
            for stage, (sent, drip) in stages.items()
        }
    closed = {stage: closing.result() for stage, closing in closings.items()}
    late = {stage: wait_s for stage, (wait_s, _) in closed.items() if wait_s > STALL_S}
    assert not late
    told = {stage for stage, (_, answered) in closed.items() if b"AGENT_BODY_TIMEOUT" in answered}
    assert told >= {"in the body", "before the body", "in a chunked body", "after 100 Continue"}
    assert closed["connected"][1] == b""
    assert ingest.stored() == [json.loads(track()) | {"timestamp": "2023-11-14T22:13:20.000Z"}]


# --- the listener's life ---------------------------------------------------------------------------


async def never(_: Request) -> Answer:
    raise AssertionError("no request was to come")


async def test_a_bug_behind_the_routes_is_a_500_and_not_the_end() -> None:
    async def bug(_: Request) -> Answer:
        raise ZeroDivisionError

    async with asyncio.timeout(DEADLINE_S), listening(bug) as url:
        for _ in range(2):
            async with aiohttp.request("GET", url) as response:
                assert response.status == 500
                assert (await response.json())["code"] == "AGENT_BUG"


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[str]:
    async with serving(guard(), handler, host="127.0.0.1", port=0) as (url,):
        yield url


async def test_a_taken_port_is_an_error_that_names_it() -> None:
    async with listening(never) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(AgentError, match=f"127.0.0.1:{port}: already in use"):
            async with serving(guard(), never, host="127.0.0.1", port=port):
                pass


async def test_a_unix_socket_answers_and_is_closed_to_others(tmp_path: Path) -> None:
    async def answer(_: Request) -> Answer:
        return Answer(status=204)

    path = tmp_path / "agent.sock"
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(guard(), answer, host="127.0.0.1", port=0, unix_socket=str(path)) as addresses,
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
    ):
        assert str(path) in addresses
        assert not stat.S_IMODE(path.stat().st_mode) & 0o007
        async with session.post("http://localhost/") as response:
            assert response.status == 204


async def test_an_answer_in_flight_is_finished_when_the_listener_stops() -> None:
    begun, finish = asyncio.Event(), asyncio.Event()

    async def answer(_: Request) -> Answer:
        begun.set()
        await finish.wait()
        return Answer(status=204)

    async def post(url: str) -> int:
        async with aiohttp.request("POST", url) as response:
            return response.status

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        async with listening(answer) as url:
            posted = tasks.create_task(post(url))
            await begun.wait()
            # Only once the listener is being closed.
            asyncio.get_running_loop().call_later(SILENCE_S, finish.set)
        with pytest.raises(aiohttp.ClientConnectorError):
            await post(url)
    assert posted.result() == 204
