"""Bytes to requests and answers to bytes, however the bytes are cut: no socket, no clock."""

from __future__ import annotations

import json

import pytest

from agent.exchange import REPLAYED, STORED, Answer, Request, answer_json, refuse
from agent.ingest.guard import Guard
from agent.ingest.wire import (
    CLOSING,
    ENDED,
    IDLE,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_TARGET_BYTES,
    PLAIN,
    READING_BYTES,
    Exchange,
    Framing,
    Reader,
    Reading,
)

LIMIT_BYTES = 1000
SHOP = "https://shop.example"

WHOLE = 1_000_000
STEPS = [WHOLE, 7, 1]
"""How many bytes the socket hands over at once."""

in_any_pieces = pytest.mark.parametrize("step", STEPS, ids=["whole", "in sevens", "one by one"])


def new_reader(reading: Reading | None = None) -> Reader:
    guard = Guard(
        allowed_hosts=frozenset(), allowed_origins=frozenset({SHOP}), max_body_bytes=LIMIT_BYTES
    )
    return Reader(guard, reading or Reading())


def feed(reader: Reader, sent: bytes, step: int = WHOLE) -> None:
    for i in range(0, len(sent), step):
        reader.feed(sent[i : i + step])


def read(sent: bytes, step: int = WHOLE) -> list[Exchange | bytes]:
    reader = new_reader()
    feed(reader, sent, step)
    return list(reader.ready)


def asked(exchange: Exchange | bytes) -> Request:
    assert isinstance(exchange, Exchange)
    assert isinstance(exchange.asked, Request)
    return exchange.asked


def refused(exchange: Exchange | bytes) -> Answer:
    assert isinstance(exchange, Exchange)
    assert isinstance(exchange.asked, Answer)
    assert exchange.framing.closes or exchange.asked.close
    return exchange.asked


def head(*lines: str, start: str = "POST /t HTTP/1.1", host: str | None = "127.0.0.1") -> bytes:
    named = [] if host is None else [f"Host: {host}"]
    return "\r\n".join([start, *named, *lines, "", ""]).encode("latin-1")


# --- requests --------------------------------------------------------------------------------------


@in_any_pieces
def test_a_request_is_read_whole(step: int) -> None:
    sent = head("Content-Length: 5", "X-Twice: a", "x-TWICE: b", start="POST /a%20b?c=d HTTP/1.1")
    (exchange,) = read(sent + b"hello", step)
    assert asked(exchange) == Request(
        method="POST",
        path="/a b",
        query={"c": "d"},
        headers={"host": "127.0.0.1", "content-length": "5", "x-twice": "a, b"},
        body=b"hello",
    )


@in_any_pieces
def test_requests_in_one_stream_are_read_in_their_order(step: int) -> None:
    sent = b"".join(
        head(f"Content-Length: {n}", start=f"POST /{n} HTTP/1.1") + b"x" * n for n in range(20)
    )
    assert [(asked(each).path, len(asked(each).body)) for each in read(sent, step)] == [
        (f"/{n}", n) for n in range(20)
    ]


@in_any_pieces
def test_a_chunked_body_is_joined_and_its_trailers_change_nothing(step: int) -> None:
    sent = head("Transfer-Encoding: Chunked")
    sent += b"2;ext=1\r\nab\r\n3\r\ncde\r\n0\r\nHost: evil.example\r\nX: y\r\n\r\n"
    (exchange,) = read(sent, step)
    assert asked(exchange).body == b"abcde"
    assert asked(exchange).headers["host"] == "127.0.0.1"
    assert "x" not in asked(exchange).headers


@in_any_pieces
def test_an_offer_of_another_protocol_is_ignored_and_the_body_kept(step: int) -> None:
    """As Java's HttpClient makes it with its first request."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAAEAA", "Upgrade: h2c")
    sent = head(*offer, "Content-Length: 2") + b"ab" + head(start="GET /next HTTP/1.1")
    first, second = read(sent, step)
    assert asked(first).body == b"ab"
    assert asked(second).path == "/next"


def test_many_offers_at_once_are_read_one_after_the_other() -> None:
    offering = head("Connection: Upgrade", "Upgrade: h2c", "Content-Length: 2") + b"ab"
    assert [asked(each).body for each in read(offering * 3000)] == [b"ab"] * 3000


def test_an_offer_does_not_hide_what_is_refused() -> None:
    offer = ("Connection: Upgrade", "Upgrade: websocket")
    (exchange,) = read(head(*offer, host="evil.example"))
    assert refused(exchange).status == 403
    (exchange,) = read(head(*offer, f"Content-Length: {LIMIT_BYTES + 1}"))
    assert refused(exchange).status == 413


@in_any_pieces
def test_the_body_is_asked_for_after_the_head_was_judged(step: int) -> None:
    expecting = ("Expect: 100-continue", "Content-Length: 5")
    assert read(head(*expecting), step) == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    (answer,) = read(head(*expecting, host="evil.example"), step)
    assert refused(answer).status == 403


def test_http_1_0_expects_nothing() -> None:
    assert read(head("Expect: 100-continue", "Content-Length: 5", start="POST / HTTP/1.0")) == []


@pytest.mark.parametrize(
    ("start", "line", "keeps"),
    [
        ("GET / HTTP/1.1", "X: y", True),
        ("GET / HTTP/1.1", "Connection: close", False),
        ("GET / HTTP/1.1", "Connection: X, Close", False),
        ("GET / HTTP/1.0", "X: y", False),
        ("GET / HTTP/1.0", "Connection: keep-alive", True),
    ],
)
def test_the_client_says_whether_the_connection_is_kept(start: str, line: str, keeps: bool) -> None:
    reader = new_reader()
    reader.feed(head(line, start=start) + head(start="GET /next HTTP/1.1"))
    assert len(reader.ready) == (2 if keeps else 1)
    assert reader.stage is (IDLE if keeps else ENDED)
    assert isinstance(first := reader.ready[0], Exchange)
    assert first.framing.closes is not keeps


def test_a_head_request_is_a_get_without_the_body() -> None:
    (exchange,) = read(head(start="HEAD /healthz HTTP/1.1"))
    assert asked(exchange).method == "GET"
    assert isinstance(exchange, Exchange)
    sent = exchange.framing.encode(answer_json({"status": "ok"}))
    assert sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Length: 15\r\n" in sent
    assert sent.endswith(b"\r\n\r\n")


def test_a_preflight_is_answered_with_what_is_allowed() -> None:
    (exchange,) = read(
        head(
            f"Origin: {SHOP}",
            "Access-Control-Request-Method: POST",
            start="OPTIONS /api/public/apps/track HTTP/1.1",
        )
    )
    assert isinstance(exchange, Exchange)
    assert exchange.asked == Answer(status=204)
    sent = exchange.framing.encode(Answer(status=204))
    assert f"\r\nAccess-Control-Allow-Origin: {SHOP}\r\n".encode() in sent


def test_an_allowed_page_may_read_why_it_was_refused() -> None:
    start = "POST /api/public/apps/track HTTP/1.1"
    (exchange,) = read(head(f"Origin: {SHOP}", f"Content-Length: {LIMIT_BYTES + 1}", start=start))
    assert refused(exchange).status == 413
    assert isinstance(exchange, Exchange)
    assert exchange.framing.cors["Access-Control-Allow-Origin"] == SHOP


@pytest.mark.parametrize(
    "lines",
    [[f"Origin: {SHOP}"], ["Access-Control-Request-Method: POST"]],
    ids=["not asking for a method", "of no page"],
)
def test_options_without_a_preflight_are_for_the_routes(lines: list[str]) -> None:
    (exchange,) = read(head(*lines, start="OPTIONS /api/public/apps/track HTTP/1.1"))
    assert asked(exchange).method == "OPTIONS"


@pytest.mark.parametrize("answer", [answer_json({}), refuse(400, "X", "y")], ids=["200", "400"])
def test_what_has_a_body_is_of_no_use_to_a_page_that_may_not_read_it(answer: Answer) -> None:
    sent = PLAIN.encode(answer)
    assert b"\r\nX-Content-Type-Options: nosniff\r\n" in sent
    assert b"; frame-ancestors 'none'\r\n" in sent
    assert b"\r\nCross-Origin-Resource-Policy: same-origin\r\n" in sent
    assert b"\r\nCache-Control: no-store\r\n" in sent


def test_the_first_of_a_repeated_parameter_counts() -> None:
    (exchange,) = read(head(start="GET /?a=1&b=&a=2 HTTP/1.1"))
    assert asked(exchange).query == {"a": "1", "b": ""}


# --- what could be read in two ways ----------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"

AMBIGUOUS: dict[str, bytes] = {
    "length and coding": head("Content-Length: 5", CHUNKED) + b"0\r\n\r\n",
    "coding and length": head(CHUNKED, "Content-Length: 5") + b"0\r\n\r\n",
    "two lengths": head("Content-Length: 5", "Content-Length: 6") + b"hello!",
    "the same length twice": head("Content-Length: 5", "Content-Length: 5") + b"hello",
    "a list of lengths": head("Content-Length: 5, 5") + b"hello",
    "a signed length": head("Content-Length: +5") + b"hello",
    "a negative length": head("Content-Length: -5") + b"hello",
    "a length in hex": head("Content-Length: 0x5") + b"hello",
    "an empty length": head("Content-Length: ") + b"hello",
    "a spaced length": head("Content-Length: 5 5") + b"hello",
    "an endless length": head("Content-Length: " + "9" * 30) + b"hello",
    "chunked twice": head(CHUNKED, CHUNKED) + b"0\r\n\r\n",
    "chunked and more": head("Transfer-Encoding: chunked, gzip") + b"0\r\n\r\n",
    "more and chunked": head("Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "identity, then chunked": head("Transfer-Encoding: identity", CHUNKED) + b"0\r\n\r\n",
    "an unknown coding": head("Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "a coding with a vertical tab": head("Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n",
    "a coding in HTTP/1.0": head(CHUNKED, start="POST / HTTP/1.0") + b"0\r\n\r\n",
    "a coding in HTTP/1.0, kept": (
        head(CHUNKED, "Connection: keep-alive", start="POST / HTTP/1.0") + b"0\r\n\r\n"
    ),
    "two hosts": head("Host: 127.0.0.1"),
    "two origins": head(f"Origin: {SHOP}", f"Origin: {SHOP}"),
    "two fetch sites": head("Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"),
    "two content types": head("Content-Type: application/json", "Content-Type: text/plain"),
    "a folded header": head("X: a\r\n b"),
    "a folded coding": head("X: a\r\n Transfer-Encoding: chunked"),
    "a space before the first header": b"GET / HTTP/1.1\r\n Host: 127.0.0.1\r\n\r\n",
    "a space before the colon": head("Content-Length : 5") + b"hello",
    "a header without a name": head(": a"),
    "a header without a colon": head("Content-Length"),
    "a bare LF after the start": b"GET / HTTP/1.1\nHost: 127.0.0.1\r\n\r\n",
    "a bare LF after a header": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\nX: y\r\n\r\n",
    "a bare LF at the end": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\n",
    "a bare CR in a header": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\rX: y\r\n\r\n",
    "a NUL in a header": head("X: a\0b"),
    "a control character in a header": head("X: a\x01b"),
    "a bare LF after a chunk size": head(CHUNKED) + b"2\nab\r\n0\r\n\r\n",
    "a bare LF after a chunk": head(CHUNKED) + b"2\r\nab\n0\r\n\r\n",
    "a bare LF in a chunk extension": head(CHUNKED) + b"2;a\nab\r\n0\r\n\r\n",
    "a space after a chunk size": head(CHUNKED) + b"2 \r\nab\r\n0\r\n\r\n",
    "a signed chunk size": head(CHUNKED) + b"+2\r\nab\r\n0\r\n\r\n",
    "a prefixed chunk size": head(CHUNKED) + b"0x2\r\nab\r\n0\r\n\r\n",
    "an endless chunk size": head(CHUNKED) + b"10000000000000002\r\nab\r\n0\r\n\r\n",
    "a longer chunk than said": head(CHUNKED) + b"2\r\nabc\r\n0\r\n\r\n",
    "a length in the trailers": head(CHUNKED) + b"0\r\nContent-Length: 5\r\n\r\nhello",
    "an absolute target": head(start="POST http://evil.example/t HTTP/1.1"),
    "a target without a slash": head(start="GET t HTTP/1.1"),
    "a target with a fragment": head(start="GET /t#x HTTP/1.1"),
    "a target with a space": head(start="GET /t x HTTP/1.1"),
    "a target of raw bytes": head(start="GET /\xe9 HTTP/1.1"),
    "the target *": head(start="OPTIONS * HTTP/1.1"),
    "CONNECT": head(start="CONNECT 127.0.0.1:80 HTTP/1.1"),
    "CONNECT with a length": head("Content-Length: 5", start="CONNECT 127.0.0.1:80 HTTP/1.1"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": head(start="GET / HTTP/1.2"),
    "HTTP/2.0": head(start="GET / HTTP/2.0"),
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a method in lower case": head(start="get / HTTP/1.1"),
    "an unknown method": head(start="BREW / HTTP/1.1"),
    "a tab for a space": head(start="GET\t/ HTTP/1.1"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@in_any_pieces
@pytest.mark.parametrize("sent", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_could_be_read_in_two_ways_is_refused_with_all_behind_it(
    sent: bytes, step: int
) -> None:
    (exchange,) = read(sent + head(start="GET /smuggled HTTP/1.1"), step)
    answer = refused(exchange)
    assert answer.status in {400, 403}
    assert json.loads(answer.body)["statusCode"] == answer.status
    assert b"evil" not in answer.body


# --- bounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([f"X{n}: y" for n in range(MAX_HEADERS - 1)], None),
        ([f"X{n}: y" for n in range(MAX_HEADERS)], 431),
        (["X: y"] * MAX_HEADERS, 431),
        (["X: " + "y" * (MAX_HEAD_BYTES - 100)], None),
        (["X: " + "y" * MAX_HEAD_BYTES], 431),
        ([f"X{n}: " + "y" * 1000 for n in range(MAX_HEAD_BYTES // 1000 + 1)], 431),
    ],
    ids=["99 lines", "100 lines", "one name", "almost too long", "one value", "many values"],
)
@pytest.mark.parametrize("step", [WHOLE, 1000])
def test_headers_are_bounded(lines: list[str], status: int | None, step: int) -> None:
    (exchange,) = read(head(*lines), step)
    if status is None:
        assert asked(exchange).path == "/t"
    else:
        assert refused(exchange).status == status


@pytest.mark.parametrize(("excess", "status"), [(0, None), (1, 431)])
@pytest.mark.parametrize("before", [b"", head()], ids=["alone", "behind another"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_head_is_bounded_to_the_byte_wherever_it_begins(
    excess: int, status: int | None, before: bytes, chunks: int
) -> None:
    counted = len("/t") + len("host") + len("127.0.0.1") + len("x")
    sent = before + head("X: " + "y" * (MAX_HEAD_BYTES - counted + excess))
    *_, exchange = read(sent, len(sent) // chunks + 1)
    if status is None:
        assert asked(exchange).headers.keys() == {"host", "x"}
    else:
        assert refused(exchange).status == status


@pytest.mark.parametrize(("excess", "status"), [(0, None), (1, 414)])
def test_the_target_is_bounded(excess: int, status: int | None) -> None:
    target = "/" + "x" * (MAX_TARGET_BYTES - 1 + excess)
    (exchange,) = read(head(start=f"GET {target} HTTP/1.1"))
    if status is None:
        assert asked(exchange).path == target
    else:
        assert refused(exchange).status == status


@pytest.mark.parametrize(
    "begun",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"GET / HTTP/1.1\r\n",
        head(CHUNKED) + b"2\r\nab\r\n0\r\nX: ",
        head(CHUNKED) + b"2;",
    ],
    ids=["a header's value", "a header's name", "a trailer's value", "a chunk's extension"],
)
def test_what_never_ends_is_not_kept(begun: bytes) -> None:
    reader = new_reader()
    reader.feed(begun)
    fed_bytes = 0
    while not reader.ready:
        reader.feed(b"x" * 1000)
        fed_bytes += 1000
        assert fed_bytes < 2 * MAX_HEAD_BYTES
    (exchange,) = reader.ready
    assert refused(exchange).status == 431


@in_any_pieces
def test_a_body_is_refused_by_what_it_says_and_by_what_comes(step: int) -> None:
    (exchange,) = read(head(f"Content-Length: {LIMIT_BYTES + 1}"), step)
    assert refused(exchange).status == 413
    (exchange,) = read(head(CHUNKED) + b"FFFF\r\n" + b"x" * (LIMIT_BYTES + 1), step)
    assert refused(exchange).status == 413


def test_bodies_half_read_on_all_connections_are_bounded_together() -> None:
    reading = Reading()
    reader = new_reader(reading)
    reading.body_bytes = READING_BYTES
    reader.feed(head("Content-Length: 5") + b"hell")
    (exchange,) = reader.ready
    assert refused(exchange).status == 503
    assert refused(exchange).headers == {"Retry-After": "1"}
    assert reading.body_bytes == READING_BYTES


@pytest.mark.parametrize("rest", [b"o", b""], ids=["read whole", "left in the middle"])
def test_what_was_half_read_is_given_back(rest: bytes) -> None:
    reading = Reading()
    reader = new_reader(reading)
    reader.feed(head("Content-Length: 5") + b"hell")
    assert reading.body_bytes == 4
    reader.feed(rest)
    reader.close()
    assert reading.body_bytes == 0


def test_a_bug_in_a_judgement_is_handed_out_and_ends() -> None:
    class BrokenGuard(Guard):
        def judge(self, headers: object, path: str) -> Answer | None:
            raise ZeroDivisionError

    reader = Reader(
        BrokenGuard(allowed_hosts=frozenset(), allowed_origins=frozenset(), max_body_bytes=1),
        Reading(),
    )
    reader.feed(head())
    (exchange,) = reader.ready
    assert isinstance(exchange, Exchange)
    assert isinstance(exchange.asked, ZeroDivisionError)
    assert exchange.framing.closes
    assert reader.stage is ENDED


# --- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framing", "answer", "sent"),
    [
        (PLAIN, STORED, b"HTTP/1.1 204 No Content\r\nServer: tranthor-agent\r\n\r\n"),
        (
            CLOSING,
            STORED,
            b"HTTP/1.1 204 No Content\r\nServer: tranthor-agent\r\nConnection: close\r\n\r\n",
        ),
        (
            Framing(http_1_0=True),
            REPLAYED,
            (
                b"HTTP/1.1 204 No Content\r\nServer: tranthor-agent\r\n"
                b"Idempotent-Replayed: true\r\nConnection: keep-alive\r\n\r\n"
            ),
        ),
        (
            PLAIN,
            Answer(status=200),
            b"HTTP/1.1 200 OK\r\nServer: tranthor-agent\r\nContent-Length: 0\r\n\r\n",
        ),
    ],
    ids=["stored", "stored, closing", "replayed, HTTP/1.0", "empty"],
)
def test_an_answer_is_these_bytes(framing: Framing, answer: Answer, sent: bytes) -> None:
    assert framing.encode(answer) == sent


def test_an_answer_that_closes_says_so() -> None:
    sent = PLAIN.encode(refuse(403, "X", "no", close=True))
    assert sent.count(b"\r\nConnection: close\r\n") == 1
