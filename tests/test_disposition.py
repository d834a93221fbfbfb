"""What each answer of the upstream, or of what stands before it, means for the event and the link."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from agent.forward.claims import Claim
from agent.forward.disposition import (
    RETRY_AFTER_MAX_S,
    SPLIT_AFTER,
    Delivered,
    Failed,
    GiveUp,
    Misconfigured,
    Outcome,
    Record,
    Rejected,
    Response,
    Split,
    Unavailable,
    Verdict,
    classify,
    may_be_stored,
    retry_after_s,
    verdict,
)
from agent.outbox.records import Ack, Bury, Head, Retry, Settlement

NOW = datetime(2026, 11, 23, 10, 0, 0, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)

PORTAL = b"<!doctype html><html><head><title>Welcome</title></head><body>Log in</body></html>"


def outcome(status: int, body: bytes = b"", **headers: str) -> Outcome:
    given_as = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return classify(Response(status=status, headers=given_as, body=body), now_ms=NOW_MS)


def api_error(status: int, message: str, code: str = "FST_ERR_VALIDATION") -> bytes:
    return json.dumps(
        {"statusCode": status, "code": code, "error": "Bad Request", "message": message}
    ).encode()


# --- delivered ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204])
@pytest.mark.parametrize("body", [b"", b'""', b'"ok"', b' "" ', b"\r\n"])
def test_a_2xx_with_nothing_or_a_short_json_string_is_delivered(status: int, body: bytes) -> None:
    assert outcome(status, body, Content_Type="application/json") == Delivered()


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (PORTAL, "text/html; charset=utf-8"),
        (PORTAL, "text/plain"),
        (PORTAL, ""),
        (b"\n\n  " + PORTAL, "application/json"),
        (b"<?xml version='1.0'?><WISPAccessGatewayParam/>", "text/xml"),
        (b"Success", "text/plain"),
        (b'{"version":"1.2"}', "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b"true", "application/json"),
        (b'"unterminated', "application/json"),
        (b'"' + b"x" * 1000 + b'"', "application/json"),
        (b"\x00\xff\xfe", "application/octet-stream"),
        (b"[" * 200, "application/json"),
    ],
)
def test_a_2xx_that_says_anything_else_is_not_the_upstream(body: bytes, content_type: str) -> None:
    found = outcome(200, body, Content_Type=content_type)
    assert isinstance(found, Misconfigured)
    assert "captive portal" in found.why


# --- the agent is misconfigured ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308, 399])
def test_any_redirect_is_held_and_says_where_to(status: int) -> None:
    found = outcome(status, Location="https://portal.invalid/login")
    assert isinstance(found, Misconfigured)
    assert "https://portal.invalid/login" in found.why
    assert isinstance(outcome(status), Misconfigured)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "upstream.write_key"),
        (403, "write key"),
        (404, "upstream.url"),
        (405, "upstream.url"),
        (407, "upstream.proxy"),
    ],
)
@pytest.mark.parametrize("body", [b"", PORTAL, b'{"message":"Invalid write key."}'])
def test_what_a_person_must_mend_is_held_with_its_remedy(
    status: int, remedy: str, body: bytes
) -> None:
    found = outcome(status, body)
    assert isinstance(found, Misconfigured)
    assert remedy in found.why


def test_the_upstreams_own_words_are_shown() -> None:
    found = outcome(401, b'{"message":"Invalid write key."}')
    assert isinstance(found, Misconfigured)
    assert "Invalid write key" in found.why


@pytest.mark.parametrize(
    "message",
    [
        "headers must have required property 'authorization'",
        "headers must have required property 'Authorization'",
        "headers/authorization must be string",
    ],
)
def test_a_400_about_the_authorization_header_is_held(message: str) -> None:
    assert isinstance(outcome(400, api_error(400, message)), Misconfigured)


@pytest.mark.parametrize("status", [400, 415, 422])
@pytest.mark.parametrize(
    ("body", "content_type"), [(PORTAL, ""), (b"", "text/html"), (b"  <html>", "text/plain")]
)
def test_a_refusal_in_html_is_not_the_upstreams(
    status: int, body: bytes, content_type: str
) -> None:
    assert isinstance(outcome(status, body, Content_Type=content_type), Misconfigured)


@pytest.mark.parametrize(
    "status",
    [402, 406, 409, 410, 411, 412, 414, 416, 417, 418, 421, 423, 424, 426, 428, 431, 451, 499],
)
@pytest.mark.parametrize("body", [b"", b"nope", b'{"message":"nope"}'])
def test_a_4xx_that_nobody_foresaw_is_held(status: int, body: bytes) -> None:
    assert isinstance(outcome(status, body), Misconfigured)


@pytest.mark.parametrize("status", [100, 101, 102, 103, 199])
def test_a_1xx_is_held(status: int) -> None:
    assert isinstance(outcome(status), Misconfigured)


# --- the event is at fault ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_refusal_in_the_upstreams_voice_is_the_events_fault(status: int) -> None:
    body = api_error(status, "body must have required property 'userId'")
    assert outcome(status, body) == Rejected(status, "body must have required property 'userId'")


@pytest.mark.parametrize("body", [b"", PORTAL, b"request entity too large"])
def test_a_413_is_the_events_fault_whoever_says_it(body: bytes) -> None:
    assert isinstance(outcome(413, body, Content_Type="text/html"), Rejected)


@pytest.mark.parametrize(
    "message",
    [
        "body/headers must be object",
        "body must have required property 'authorization'",
        "body/properties must be object",
    ],
)
def test_a_400_about_the_body_is_the_events_fault(message: str) -> None:
    assert isinstance(outcome(400, api_error(400, message)), Rejected)


# --- waiting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504, *range(520, 528)])
@pytest.mark.parametrize("body", [b"", PORTAL, b'{"message":"busy"}'])
def test_a_busy_or_unreachable_upstream_is_waited_for(status: int, body: bytes) -> None:
    found = outcome(status, body, Retry_After="17")
    assert isinstance(found, Unavailable)
    assert found.retry_after_s == 17
    assert str(status) in found.why


@pytest.mark.parametrize("status", [500, 501, 505, 507, 508, 599])
def test_another_5xx_may_be_the_events_own_fault(status: int) -> None:
    assert outcome(status, api_error(status, "boom")) == Failed(status, "boom")


def test_a_511_of_a_captive_portal_never_costs_an_event() -> None:
    # RFC 6585, section 6: sent by the network in between, never by the origin.
    assert isinstance(outcome(511, PORTAL), Misconfigured | Unavailable)


@settings(max_examples=200, deadline=None)
@given(
    status=st.integers(100, 599),
    body=st.one_of(
        st.binary(max_size=50), st.sampled_from([PORTAL, b"[" * 60_000, b'{"message":'])
    ),
    headers=st.dictionaries(
        st.sampled_from(["Retry-After", "Content-Type", "Location"]), st.text(max_size=20)
    ),
)
def test_every_answer_has_a_meaning_and_only_a_2xx_delivers(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    found = classify(
        Response(status=status, headers=CIMultiDict(headers), body=body), now_ms=NOW_MS
    )
    if isinstance(found, Delivered):
        assert 200 <= status < 300
    if isinstance(found, Rejected):
        assert status in {400, 413, 415, 422}
    if isinstance(found, Failed):
        assert status >= 500


def test_what_is_kept_of_an_answer_is_one_short_printable_line() -> None:
    shown = outcome(500, b"a\x1b[31mb\r\nc\x00\xff" + b"x" * 60_000)
    assert isinstance(shown, Failed)
    assert shown.answer.isprintable()
    assert len(shown.answer) <= 500


# --- Retry-After -------------------------------------------------------------------------------------


def http_date(offset_s: float) -> str:
    return format_datetime(NOW + timedelta(seconds=offset_s), usegmt=True)


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("0", 0.0),
        ("1", 1.0),
        ("120", 120.0),
        (" 120 ", 120.0),
        ("0120", 120.0),
        (str(int(RETRY_AFTER_MAX_S)), RETRY_AFTER_MAX_S),
        (str(int(RETRY_AFTER_MAX_S) + 1), RETRY_AFTER_MAX_S),
        ("999999999999", RETRY_AFTER_MAX_S),
        (http_date(90), 90.0),
        (http_date(0), 0.0),
        (http_date(-90), 0.0),
        (http_date(-(10**9)), 0.0),
        (http_date(10**9), RETRY_AFTER_MAX_S),
        ("Fri, 31 Dec 9999 23:59:59 GMT", RETRY_AFTER_MAX_S),
        # The two obsolete forms, which RFC 9110, section 5.6.7 wants to be read.
        ("Monday, 23-Nov-26 10:01:00 GMT", 60.0),
        ("Mon Nov 23 10:01:00 2026", 60.0),
    ],
)
def test_retry_after_is_read_in_both_forms_and_clamped(value: str, wait_s: float) -> None:
    assert retry_after_s(value, now_ms=NOW_MS) == wait_s


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        " ",
        "soon",
        "-5",
        "+5",
        "5.5",
        "1e3",
        "nan",
        "inf",
        "5, 10",
        "0x10",
        "\u0665",
        "\u00b2",
        "Mon",
        "Mon,",
        "Mon, 99 Nov 2026 10:00:00 GMT",
        "Mon, 23 Nov 2026 25:61:00 GMT",
        "Mon, 23 Nov 99999 10:00:00 GMT",
        "Mon, 23 Nov 2026 10:00:00 +99999999999999",
    ],
)
def test_a_retry_after_that_says_nothing_is_none(value: str | None) -> None:
    assert retry_after_s(value, now_ms=NOW_MS) is None


date_words = st.sampled_from(
    [
        *("Mon,", "Mon", "Monday,", "23", "99", "Nov", "Foo", "2026", "26", "-1", "0"),
        *("10:00:00", "10:00", "25:61:61", ":", "GMT", "-0000", "+9999", "EST", "(", ")", ","),
    ]
)


@settings(max_examples=200, deadline=None)
@given(value=st.one_of(st.text(max_size=30), st.lists(date_words, max_size=7).map(" ".join)))
def test_no_retry_after_raises_or_leaves_its_bounds(value: str) -> None:
    wait_s = retry_after_s(value, now_ms=NOW_MS)
    assert wait_s is None or 0.0 <= wait_s <= RETRY_AFTER_MAX_S


# --- what becomes of the event -----------------------------------------------------------------------

GIVE_UP = GiveUp(attempts=3, after_s=60.0, unproven_after_s=600.0)


def record(proven: bool, *, strikes: int = 0, for_s: float = 0.0) -> Record:
    return Record(strikes=strikes, for_s=for_s, proven=proven)


def head(attempts: int = 0, failing_for_s: float | None = None) -> Head:
    return Head(
        seq=7,
        lane=1,
        message_id="m1",
        kind="track",
        attempts=attempts,
        failing_since_ms=None if failing_for_s is None else NOW_MS - int(failing_for_s * 1000),
        body_bytes=2,
        body=b"{}",
    )


def settlement(
    event: Head, outcome: Outcome, fared: Record, *, give_up: GiveUp
) -> Settlement | None:
    """Return the verdict on an event that was sent alone."""
    found = verdict(Claim.of([event]), outcome, fared, give_up=give_up)
    if found is None:
        return None
    assert isinstance(found, tuple)
    (change,) = found
    return change


@pytest.mark.parametrize("proven", [True, False])
def test_a_delivered_event_is_acknowledged(proven: bool) -> None:
    tried = head(attempts=99, failing_for_s=10**6)
    for event in (head(), tried):
        assert settlement(event, Delivered(), record(proven), give_up=GIVE_UP) == Ack(7)


def test_a_rejected_event_is_buried_at_once_with_the_answer() -> None:
    found = settlement(head(), Rejected(400, "no"), record(False), give_up=GIVE_UP)
    assert found == Bury(seq=7, reason="rejected", status=400, answer="no")


@pytest.mark.parametrize(
    "blameless",
    [Unavailable(why="down"), Unavailable(why="cut", ambiguous=True), Misconfigured("bad key")],
)
@pytest.mark.parametrize("proven", [True, False])
def test_a_fault_of_link_or_configuration_never_touches_the_event(
    blameless: Outcome, proven: bool
) -> None:
    event = head(attempts=10**6, failing_for_s=10**9)
    assert settlement(event, blameless, record(proven), give_up=GIVE_UP) is None


@pytest.mark.parametrize(
    ("attempts", "failing_for_s", "proven", "gives_up"),
    [
        # The attempt just made is not yet in the head's count.
        (0, 0.0, True, False),
        (0, 0.0, False, False),
        (1, 10**9, True, False),
        (2, 59.999, True, False),
        (2, 60.0, True, True),
        (2, 60.0, False, False),
        (2, 599.999, False, False),
        (2, 600.0, False, True),
        (50, 1.0, True, False),
        (50, 599.0, False, False),
        (50, 10**6, True, True),
    ],
)
def test_an_event_is_given_up_after_attempts_and_time_both(
    attempts: int, failing_for_s: float, proven: bool, gives_up: bool
) -> None:
    # What the wall clock says of it means nothing: it may have jumped by a month.
    for jump_s in (-(10**7), 0, 10**7):
        assert_given_up(head(attempts, failing_for_s + jump_s), failing_for_s, proven, gives_up)


def assert_given_up(event: Head, failing_for_s: float, proven: bool, gives_up: bool) -> None:
    found = settlement(
        event,
        Failed(500, "boom"),
        record(proven, for_s=failing_for_s),
        give_up=GIVE_UP,
    )
    wanted = Bury(seq=7, reason="gave_up", status=500, answer="boom") if gives_up else Retry(7)
    assert found == wanted


def test_patience_of_zero_gives_up_on_attempts_alone() -> None:
    impatient = GiveUp(attempts=1, after_s=0.0, unproven_after_s=0.0)
    found = settlement(head(), Failed(500, ""), record(False), give_up=impatient)
    assert isinstance(found, Bury)


@pytest.mark.parametrize(
    ("strikes", "for_s", "proven", "buried"),
    [
        (GIVE_UP.attempts - 1, GIVE_UP.after_s, True, True),
        (GIVE_UP.attempts - 2, GIVE_UP.after_s, True, False),
        (GIVE_UP.attempts - 1, GIVE_UP.after_s - 1, True, False),
        (10_000, 10 * GIVE_UP.unproven_after_s, False, False),
    ],
)
def test_only_an_event_that_alone_meets_no_answer_is_given_up(
    strikes: int, for_s: float, proven: bool, buried: bool
) -> None:
    found = settlement(
        head(),
        Unavailable(why="no answer in time", ambiguous=True),
        record(proven, strikes=strikes, for_s=for_s),
        give_up=GIVE_UP,
    )
    assert isinstance(found, Bury) is buried


def test_a_redirect_is_told_in_words_that_can_be_printed_and_sent() -> None:
    stranger = Response(
        status=302, headers={"Location": "http://p.example/caf\udce9\x1b[2J\n"}, body=b""
    )
    found = classify(stranger, now_ms=NOW_MS)
    assert isinstance(found, Misconfigured)
    assert found.why.isprintable()
    assert found.why.encode()


# --- what becomes of a batch -------------------------------------------------------------------------


def batch(events: int = 3) -> Claim:
    return Claim.of([msgspec.structs.replace(head(), seq=seq) for seq in range(1, events + 1)])


def verdict_on_batch(met: Outcome, *, strikes: int = 0, proven: bool = True) -> Verdict:
    fared = record(proven, strikes=strikes, for_s=10**9)
    return verdict(batch(), met, fared, give_up=GIVE_UP)


def test_a_delivered_batch_is_acknowledged_whole() -> None:
    assert verdict_on_batch(Delivered()) == (Ack(1), Ack(2), Ack(3))


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_refused_batch_is_split_and_no_event_is_buried_for_another(status: int) -> None:
    assert verdict_on_batch(Rejected(status, "no")) == Split(None)


def test_the_event_that_the_upstream_names_is_where_a_batch_is_split() -> None:
    answer = api_error(400, "body/batch/2 must have required property 'event'")
    assert verdict_on_batch(outcome(400, answer)) == Split(2)


@pytest.mark.parametrize(
    "failure",
    [Failed(500, "boom"), Unavailable(why="cut", ambiguous=True), Misconfigured("403")],
)
def test_a_batch_that_fails_is_sent_again_as_it_was_until_others_pass_and_it_does_not(
    failure: Outcome,
) -> None:
    assert verdict_on_batch(failure, strikes=0) is None
    assert verdict_on_batch(failure, strikes=SPLIT_AFTER - 2) is None
    assert verdict_on_batch(failure, strikes=SPLIT_AFTER - 1) == Split(None)


@pytest.mark.parametrize("failure", [Unavailable(why="cut"), Misconfigured("401")])
def test_an_outage_never_splits_a_batch(failure: Outcome) -> None:
    assert verdict_on_batch(failure, strikes=10**6, proven=False) is None


def test_a_batch_that_alone_keeps_breaking_the_upstream_is_split_in_the_end() -> None:
    failed = Failed(500, "boom")
    assert verdict_on_batch(failed, strikes=2 * SPLIT_AFTER - 2, proven=False) is None
    assert verdict_on_batch(failed, strikes=2 * SPLIT_AFTER - 1, proven=False) == Split(None)


@pytest.mark.parametrize(
    ("met", "alone", "together"),
    [
        (Delivered(), False, False),
        (Rejected(400, "no"), False, False),
        (Failed(500, "boom"), False, True),
        (Unavailable(why="refused"), False, False),
        (Unavailable(why="cut", ambiguous=True), True, True),
        (Misconfigured("401"), False, False),
    ],
)
def test_what_may_be_stored_without_an_answer_is_known(
    met: Outcome, alone: bool, together: bool
) -> None:
    assert may_be_stored(batch(1), met) is alone
    assert may_be_stored(batch(3), met) is together


@pytest.mark.parametrize(
    ("status", "ambiguous", "too_much"),
    [
        (429, False, True),
        (503, False, True),
        (502, True, False),
        (504, True, False),
        (524, True, False),
        (521, False, False),
        (408, False, False),
    ],
)
def test_a_proxys_answer_tells_whether_the_request_went_through_and_whether_it_is_too_much(
    status: int, ambiguous: bool, too_much: bool
) -> None:
    met = outcome(status)
    assert isinstance(met, Unavailable)
    assert (met.ambiguous, met.too_much) == (ambiguous, too_much)
