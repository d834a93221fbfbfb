"""What an answer means, and what becomes of the event. Pure.

    Response ──classify──▶ Outcome ──settlement──▶ Ack | Retry | Bury | None (unchanged)

| the upstream …                                      | Outcome       | event         | link         |
| --------------------------------------------------- | ------------- | ------------- | ------------ |
| 2xx, empty or a short JSON string                   | Delivered     | Ack           | well         |
| 400, 415, 422 in its own voice; 413, whoever says it | Rejected      | Bury          | well         |
| 500 and other 5xx of its own                        | Failed        | Retry or Bury | suspect      |
| 408, 425, 429, 502-504, 52x, time-out, network      | Unavailable   | unchanged [1] | backs off    |
| 401, 403, 404, 405, 511, 3xx, HTML, anything else   | Misconfigured | unchanged     | held         |

[1] Buried in the end where it meets this event alone, while others are delivered.

What nobody foresaw is held: that loses nothing and is loud.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import assert_never

from agent.outbox.records import Ack, Bury, Head, Retry, Settlement

RETRY_AFTER_MAX_S = 3600.0
"""A longer Retry-After is cut to this: a mistyped one must not silence a machine for days."""

_SHORT_ANSWER_BYTES = 256
"""The documented answer is an empty string; anything long is not the upstream speaking."""

_ANSWER_CHARS = 500
"""How much of an answer is kept on a dead letter."""

_BUSY = frozenset({408, 425, 429, 502, 503, 504})
_CLOUDFLARE_ORIGIN_ERRORS = range(520, 528)
_NETWORK_LOGIN = 511  # RFC 6585, section 6: never from the origin, always from a network in between
_EVENT_AT_FAULT = frozenset({400, 415, 422})


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One HTTP answer. *headers* is case-insensitive; *body* may be cut short."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Delivered:
    """The upstream has the event."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The upstream refuses this event, and would again."""

    status: int
    answer: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The upstream broke on this event, or is broken."""

    status: int
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """Nobody could have delivered anything just now. *ambiguous*: the event may be stored all the same."""

    why: str
    retry_after_s: float | None = None
    ambiguous: bool = False


@dataclass(frozen=True, slots=True)
class Misconfigured:
    """No event will pass until a person mends something."""

    why: str


Outcome = Delivered | Rejected | Failed | Unavailable | Misconfigured


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """When an event that keeps being answered 5xx is set aside.

    After *attempts*, and *after_s* since the first such answer if another event was delivered
    meanwhile. With no such proof it may as well be the upstream, so *unproven_after_s* must pass.
    """

    attempts: int
    after_s: float
    unproven_after_s: float


def classify(response: Response, *, now_ms: int) -> Outcome:
    """Return what an answer means; *now_ms* is for a Retry-After that is a date."""
    status = response.status
    answer = _readable(response.body)
    if 200 <= status < 300:
        return _classify_success(response, answer)
    if 300 <= status < 400:
        location = one_line(response.headers.get("Location", "nowhere"))[:200]
        return Misconfigured(
            f"{status}: redirected to {location}; a captive portal, or upstream.url is not the API"
        )
    if status in _BUSY or status in _CLOUDFLARE_ORIGIN_ERRORS:
        return Unavailable(
            why=f"the upstream answers {status} {answer}".rstrip(),
            retry_after_s=retry_after_s(response.headers.get("Retry-After"), now_ms=now_ms),
        )
    if status >= 500 and status != _NETWORK_LOGIN:
        return Failed(status, answer)
    if status == 413:  # a proxy in between that finds it too large will find it so for ever
        return Rejected(status, answer)
    if status in _EVENT_AT_FAULT and not _is_html(response):
        if re.search(r"\bheaders\b.*\bauthorization\b", answer, re.IGNORECASE):
            return Misconfigured(f"{status}: {answer}; the write key is not sent as it must be")
        return Rejected(status, answer)
    return Misconfigured(_why_held(status, answer.rstrip(".")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """How an event has fared since the agent started: *strikes* in a row over *for_s* seconds.

    *proven* says that another event was delivered since it first failed.
    """

    strikes: int
    for_s: float
    proven: bool


FRESH = Record(strikes=0, for_s=0.0, proven=False)


def settlement(
    head: Head, outcome: Outcome, record: Record, *, now_ms: int, give_up: GiveUp
) -> Settlement | None:
    """Return the one change that an outcome makes to its event; None leaves it as it is."""
    match outcome:
        case Delivered():
            return Ack(head.seq)
        case Rejected(status, answer):
            return Bury(seq=head.seq, reason="rejected", status=status, answer=answer)
        case Failed(status, answer):
            since_ms = now_ms if head.failing_since_ms is None else head.failing_since_ms
            patience_s = give_up.after_s if record.proven else give_up.unproven_after_s
            if head.attempts + 1 >= give_up.attempts and now_ms - since_ms >= patience_s * 1000:
                return Bury(seq=head.seq, reason="gave_up", status=status, answer=answer)
            return Retry(head.seq)
        case Unavailable(why=why):
            # No answer about the event, but if it alone meets this, again and again, it is the event.
            lost = record.proven and record.strikes + 1 >= give_up.attempts
            if lost and record.for_s >= give_up.after_s:
                return Bury(seq=head.seq, reason="gave_up", status=None, answer=why)
            return None
        case Misconfigured():
            return None
        case _:
            assert_never(outcome)


def retry_after_s(value: str | None, *, now_ms: int) -> float | None:
    """Return a Retry-After header in seconds from now, 0 to `RETRY_AFTER_MAX_S`; None if unreadable.

    Both forms of RFC 9110, section 10.2.3: delay-seconds and HTTP-date.
    """
    if value is None:
        return None
    text = value.strip()
    if re.fullmatch(r"[0-9]{1,18}", text):
        wait_s = float(text)
    else:
        try:
            wait_s = parsedate_to_datetime(text).timestamp() - now_ms / 1000
        except (ValueError, OverflowError):
            return None
    return min(max(wait_s, 0.0), RETRY_AFTER_MAX_S)


def _classify_success(response: Response, answer: str) -> Outcome:
    if not response.body.strip() or _is_short_json_string(response.body):
        return Delivered()
    what = "an HTML page" if _is_html(response) else f"something else ({answer[:80]})"
    return Misconfigured(
        f"{response.status} with {what} instead of the API's empty answer;"
        " a captive portal, or upstream.url is not the API"
    )


def _is_short_json_string(body: bytes) -> bool:
    if len(body) > _SHORT_ANSWER_BYTES:
        return False
    try:
        return isinstance(json.loads(body), str)
    except ValueError:
        return False


def _is_html(response: Response) -> bool:
    content_type = response.headers.get("Content-Type", "").lower()
    return "html" in content_type or response.body.lstrip()[:1] == b"<"


def _why_held(status: int, answer: str) -> str:
    match status:
        case 401:
            remedy = "check the write key (upstream.write_key), and that the workspace is active"
        case 403:
            remedy = "the write key or a firewall between here and the upstream forbids it"
        case 404 | 405:
            remedy = "check upstream.url: it must be the server's root, without a path"
        case 511:
            remedy = "a captive portal: log in to the network on this machine"
        case 407:
            remedy = "the proxy wants credentials (upstream.proxy)"
        case _:
            remedy = "not an answer of the API; check upstream.url and what stands in between"
    return f"{status}: {answer or 'no reason given'}; {remedy}"


def _readable(body: bytes) -> str:
    """Return an answer for people: the message of the upstream's JSON, else the text, cut short."""
    text = body.decode("utf-8", "replace").strip()
    if not text:
        return ""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, dict) and isinstance(tree.get("message"), str):
        text = tree["message"]
    return one_line(text)[:_ANSWER_CHARS]


def one_line(text: str) -> str:
    """Return what a stranger wrote as one line that can be printed, stored and sent as JSON."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
