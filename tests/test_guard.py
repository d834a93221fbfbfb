"""Who may talk to the agent, decided from the head alone; and bodies inflated within bounds."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib

import pytest

from agent.exchange import Answer
from agent.ingest.guard import Guard

LIMIT_BYTES = 100_000

TRACK = "/api/public/apps/track"
PORT = "127.0.0.1:7227"
SHOP = "https://shop.example"


def guard(max_body_bytes: int = LIMIT_BYTES) -> Guard:
    return Guard(
        allowed_hosts=frozenset({"till.local", "10.0.0.5"}),
        allowed_origins=frozenset({SHOP, "http://localhost:3000"}),
        max_body_bytes=max_body_bytes,
    )


def message(answer: Answer | bytes | None) -> str:
    assert isinstance(answer, Answer)
    body = json.loads(answer.body)
    assert body["statusCode"] == answer.status
    return str(body["message"])


# --- Host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        PORT,
        "127.0.0.1:80",
        "localhost",
        "localhost:7227",
        "LocalHost:7227",
        "[::1]",
        "[::1]:7227",
        "till.local",
        "till.local:7227",
        "TILL.local",
        "10.0.0.5:7227",
    ],
)
def test_a_host_of_this_machine_passes(host: str) -> None:
    assert guard().judge({"host": host}, TRACK) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        ":7227",
        "evil.example",
        "evil.example:7227",
        "127.0.0.1.evil.example",
        "127.0.0.1.evil.example:7227",
        "localhost.evil.example",
        "evil.example/127.0.0.1",
        "evil.example?localhost",
        "evil.example#localhost",
        "evil.example:127.0.0.1",
        "127.0.0.1@evil.example",
        "localhost@evil.example:7227",
        "localhost:7227@evil.example",
        "127.0.0.1, evil.example",
        "127.0.0.1 evil.example",
        "127.0.0.1:7227:7227",
        "127.0.0.2",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
        "::1",
        "[::]",
        "[::1].evil.example",
        "[::ffff:127.0.0.1]",
        "[::1%25lo]",
        "localhost.",
        "local\u200bhost",
        "sub.till.local",
        "till.local.evil.example",
        "10.0.0.50",
    ],
)
def test_any_other_host_is_refused_with_the_remedy(host: str) -> None:
    refused = guard().judge({"host": host}, TRACK)
    assert refused is not None
    assert (refused.status, refused.close) == (403, True)
    assert message(refused).startswith("Host: ")
    assert "ingest.allowed_hosts" in message(refused)


def test_a_request_without_a_host_is_refused() -> None:
    refused = guard().judge({}, TRACK)
    assert refused is not None
    assert refused.status == 403


def test_a_long_host_is_shown_cut_short() -> None:
    assert len(message(guard().judge({"host": "x" * 100_000}, TRACK))) < 1000


# --- Origin and Sec-Fetch-Site ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": f"http://{PORT}"},
        {"host": "localhost:7227", "origin": "http://localhost:7227"},
        {"host": "[::1]:7227", "origin": "http://[::1]:7227"},
        {"host": "till.local:7227", "origin": "http://till.local:7227"},
        {"origin": SHOP},
        {"origin": SHOP, "sec-fetch-site": "cross-site"},
        {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"},
        {"origin": f"http://{PORT}", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"referer": "https://evil.example/"},
    ],
    ids=str,
)
def test_apps_own_pages_and_allowed_pages_pass(headers: dict[str, str]) -> None:
    assert guard().judge({"host": PORT, **headers}, TRACK) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "file://"},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.1:8080"},
        {"origin": f"https://{PORT}"},
        {"origin": f"http://{PORT}.evil.example"},
        {"origin": f"http://{PORT}/"},
        {"origin": f"http://evil.example, http://{PORT}"},
        {"origin": "http://localhost:7227"},
        {"host": "localhost:7227", "origin": f"http://{PORT}"},
        {"host": "localhost", "origin": "http://localhost:5000"},
        {"origin": "http://shop.example"},
        {"origin": f"{SHOP}:8443"},
        {"origin": f"{SHOP}.evil.example"},
        {"origin": "https://sub.shop.example"},
        {"origin": "chrome-extension://abcdef"},
        {"origin": "https://evil.example", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        # A rebound name: the page and its Host agree, and both are foreign.
        {"host": "evil.example:7227", "origin": "http://evil.example:7227"},
        {"host": "evil.example", "origin": SHOP},
    ],
    ids=str,
)
def test_any_other_page_is_refused(headers: dict[str, str]) -> None:
    refused = guard().judge({"host": PORT, **headers}, TRACK)
    assert refused is not None
    assert (refused.status, refused.close) == (403, True)


def test_the_refusal_of_an_origin_names_it_and_the_remedy() -> None:
    text = message(guard().judge({"host": PORT, "origin": "https://evil.example"}, TRACK))
    assert text.startswith("Origin: 'https://evil.example'")
    assert "ingest.allowed_origins" in text


# --- what an allowed page may read (CORS) ----------------------------------------------------------


def test_an_allowed_page_may_read_the_answer_and_what_it_needs_to_send_again() -> None:
    assert guard().cors({"host": PORT, "origin": SHOP}) == {
        "Access-Control-Allow-Origin": SHOP,
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": "Retry-After, Idempotent-Replayed",
        "Vary": "Origin",
    }


def test_a_preflight_is_granted_the_headers_that_it_asks_for_ten_minutes() -> None:
    granted = guard().cors(
        {
            "host": PORT,
            "origin": SHOP,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,publicwritekey",
        }
    )
    assert granted["Access-Control-Allow-Origin"] == SHOP
    assert granted["Access-Control-Allow-Credentials"] == "true"
    assert granted["Access-Control-Allow-Methods"] == "POST"
    assert granted["Access-Control-Allow-Headers"] == "authorization,content-type,publicwritekey"
    assert granted["Access-Control-Max-Age"] == "600"
    assert "Access-Control-Allow-Private-Network" not in granted


def test_the_preflight_of_chrome_before_142_is_granted_the_local_network() -> None:
    asked = {
        "host": PORT,
        "origin": SHOP,
        "access-control-request-method": "POST",
        "access-control-request-private-network": "true",
    }
    assert guard().cors(asked)["Access-Control-Allow-Private-Network"] == "true"
    assert guard().cors(asked | {"origin": "https://evil.example"}) == {}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": ""},
        {"origin": "null"},
        {"origin": "*"},
        {"origin": "https://evil.example"},
        {"origin": SHOP.upper()},
        {"origin": f"{SHOP}/"},
        {"origin": f"{SHOP}:443"},
        {"origin": f"{SHOP}, {SHOP}"},
        {"origin": f"http://{PORT}"},
    ],
    ids=str,
)
def test_nobody_else_is_granted_anything(headers: dict[str, str]) -> None:
    preflight = {
        "host": PORT,
        "access-control-request-method": "POST",
        "access-control-request-private-network": "true",
    }
    assert guard().cors({"host": PORT, **headers}) == {}
    assert guard().cors(preflight | headers) == {}


# --- the body's announcement -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, None),
        ({"content-length": "0"}, None),
        ({"content-length": str(LIMIT_BYTES)}, None),
        ({"content-length": str(LIMIT_BYTES + 1)}, 413),
        ({"content-length": "9" * 30}, 413),
        ({"content-encoding": "identity"}, None),
        ({"content-encoding": "gzip"}, None),
        ({"content-encoding": "GZip"}, None),
        ({"content-encoding": "x-gzip"}, None),
        ({"content-encoding": "deflate"}, None),
        ({"content-encoding": "br"}, 415),
        ({"content-encoding": "zstd"}, 415),
        ({"content-encoding": "gzip, gzip"}, 415),
        ({"content-encoding": "x" * 10_000}, 415),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_body_is_judged_by_its_announcement(headers: dict[str, str], status: int | None) -> None:
    answer = guard().judge({"host": PORT, **headers}, TRACK)
    assert (answer.status if answer else None) == status
    assert answer is None or answer.close
    assert answer is None or len(answer.body) < 1000


def test_a_stranger_learns_nothing_of_limits() -> None:
    answer = guard().judge({"host": "evil.example", "content-length": str(LIMIT_BYTES + 1)}, TRACK)
    assert answer is not None
    assert answer.status == 403


# --- inflating -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"hello", "identity"),
        (gzip.compress(b"hello", mtime=0), "gzip"),
        (gzip.compress(b"hello", mtime=0), "GZIP"),
        (gzip.compress(b"hello", mtime=0), "x-gzip"),
        (zlib.compress(b"hello"), "deflate"),
    ],
)
def test_a_body_is_returned_without_its_encoding(body: bytes, encoding: str) -> None:
    assert guard().inflate(body, encoding) == b"hello"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        gzip.compress(b"hello", mtime=0)[:-1],
        gzip.compress(b"hello", mtime=0)[:5],
        gzip.compress(b"hello", mtime=0)[:-8] + b"\x00" * 8,
        b"\x1f\x8b" + b"\xff" * 50,
    ],
)
def test_a_body_that_is_not_what_its_header_says_is_refused(body: bytes) -> None:
    refused = guard().inflate(body, "gzip")
    assert isinstance(refused, Answer)
    assert refused.status == 400
    assert message(refused).startswith("body: not valid gzip")


@pytest.mark.parametrize(
    "behind", [gzip.compress(b" world", mtime=0), b"garbage"], ids=["a second member", "garbage"]
)
def test_nothing_behind_the_compressed_data_is_dropped_silently(behind: bytes) -> None:
    inflated = guard().inflate(gzip.compress(b"hello", mtime=0) + behind, "gzip")
    assert isinstance(inflated, Answer) or inflated == b"hello world"


def test_the_limit_is_of_the_inflated_body() -> None:
    assert guard().inflate(gzip.compress(bytes(LIMIT_BYTES)), "gzip") == bytes(LIMIT_BYTES)
    refused = guard().inflate(gzip.compress(bytes(LIMIT_BYTES + 1)), "gzip")
    assert isinstance(refused, Answer)
    assert (refused.status, refused.close) == (413, True)


def test_a_bomb_takes_no_more_memory_than_the_largest_body() -> None:
    bomb = gzip.compress(bytes(1000 * LIMIT_BYTES))
    assert len(bomb) <= LIMIT_BYTES
    tracemalloc.start()
    try:
        refused = guard().inflate(bomb, "gzip")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(refused, Answer)
    assert refused.status == 413
    assert peak_bytes < 5 * LIMIT_BYTES


@pytest.mark.parametrize(
    "path",
    [
        "/api/agent/events",
        "/api/agent/dead/discard",
        "/w/crm/api/agent/pause",
        "/readyz",
        "/metrics",
        "/",
        "/v1",
        "/v1x/track",
    ],
)
def test_an_allowed_origin_may_post_events_and_nothing_else(path: str) -> None:
    origin = "https://kiosk.example"
    allowing = Guard(
        allowed_hosts=frozenset(), allowed_origins=frozenset({origin}), max_body_bytes=1024
    )
    headers = {"host": PORT, "origin": origin}
    assert allowing.judge(headers, TRACK) is None
    assert allowing.judge(headers, "/v1/track") is None
    assert allowing.judge(headers, path) is not None
