"""What an answer means, and what becomes of the events. Pure.

    Response ──classify──▶ Outcome ──verdict──▶ Ack | Retry | Bury each, Split, None (unchanged)

| the upstream …                                      | Outcome       | event         | link         |
| --------------------------------------------------- | ------------- | ------------- | ------------ |
| 2xx, empty or a short JSON string                   | Delivered     | Ack           | well         |
| 400, 415, 422 in its own voice; 413, whoever says it | Rejected      | Bury          | well         |
| 500 and other 5xx of its own                        | Failed        | Retry or Bury | suspect      |
| 408, 425, 429, 502-504, 52x, time-out, network      | Unavailable   | unchanged [1] | backs off    |
| 401, 403, 404, 405, 511, 3xx, HTML, anything else   | Misconfigured | unchanged     | held         |

[1] Buried in the end where it meets this event alone, while others are delivered.

What would bury a single event, or may be one event's fault, splits a claim of several until that
event stands alone. Until then a claim that failed is sent again as it was.

What nobody foresaw is held: that loses nothing and is loud.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import assert_never

import msgspec

from agent.forward.claims import Claim
from agent.outbox.records import Ack, Bury, Head, Retry, Settlement

RETRY_AFTER_MAX_S = 3600.0
"""A longer Retry-After is cut to this: a mistyped one must not silence a machine for days."""

_SHORT_ANSWER_BYTES = 256
"""The documented answer is an empty string; anything long is not the upstream speaking."""

_ANSWER_CHARS = 500
"""How much of an answer is kept on a dead letter."""

SPLIT_AFTER = 3
"""Failures in a row after which a claim is split while others are delivered; twice as many if not."""

TOO_LARGE = 413

_BUSY = frozenset({408, 425, 429, 502, 503, 504})
_TOO_MUCH = frozenset({429, 503})
_CLOUDFLARE_ORIGIN_ERRORS = range(520, 528)
_AFTER_SENDING = frozenset({502, 504, 520, 524})
"""What a proxy says when it handed the request on, and no answer or an odd one came back."""

_NAMED_ITEM = re.compile(r"\bbody/batch/([0-9]{1,6})\b")
_NETWORK_LOGIN = 511  # RFC 6585, section 6: never from the origin, always from a network in between
_EVENT_AT_FAULT = frozenset({400, 415, 422})


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP answer. *headers* is case-insensitive; *body* may be cut short."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Delivered:
    """The upstream has the event."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The upstream refuses this event, and would again. *at*: the one it names in a batch."""

    status: int
    answer: str
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The upstream broke on this event, or is broken."""

    status: int
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """Nobody could have delivered anything just now.

    *ambiguous*: it may be stored all the same; *too_much*: the upstream is there, and overloaded.
    """

    why: str
    retry_after_s: float | None = None
    ambiguous: bool = False
    too_much: bool = False


@dataclass(frozen=True, slots=True)
class Misconfigured:
    """No event will pass until a person mends something."""

    why: str


Outcome = Delivered | Rejected | Failed | Unavailable | Misconfigured


def error_of(outcome: Outcome) -> str:
    """Return for people what went wrong; empty if nothing did."""
    match outcome:
        case Rejected(status, answer):
            return f"{status}: {answer}"
        case Failed(status, answer):
            return f"the upstream answers {status} {answer}".rstrip()
        case Unavailable(why=why) | Misconfigured(why):
            return why
        case Delivered():
            return ""
        case _:
            assert_never(outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """When an event that keeps being answered 5xx is set aside.

    After *attempts*, and *after_s* since the first such answer in this life of the agent if another
    event was delivered meanwhile. With no such proof it may as well be the upstream, so
    *unproven_after_s* must pass.
    """

    attempts: int
    after_s: float
    unproven_after_s: float


def classify(response: Response, *, now_ms: int, clean: Callable[[str], str] = str) -> Outcome:
    """Return what an answer means; *now_ms* is for a Retry-After that is a date.

    What it says is kept and shown: *clean* masks what must not be, before anything is cut.
    """
    status = response.status
    answer = _readable(response.body, clean)
    if 200 <= status < 300:
        return _classify_success(response, answer)
    if 300 <= status < 400:
        location = clean(one_line(response.headers.get("Location", "nowhere")))[:200]
        return Misconfigured(
            f"{status}: redirected to {location}; a captive portal, or upstream.url is not the API"
        )
    if status in _BUSY or status in _CLOUDFLARE_ORIGIN_ERRORS:
        return Unavailable(
            why=f"the upstream answers {status} {answer}".rstrip(),
            retry_after_s=retry_after_s(response.headers.get("Retry-After"), now_ms=now_ms),
            ambiguous=status in _AFTER_SENDING,
            too_much=status in _TOO_MUCH,
        )
    if status >= 500 and status != _NETWORK_LOGIN:
        return Failed(status, answer)
    if status == TOO_LARGE:  # a proxy in between that finds it too large will find it so for ever
        return Rejected(status, answer)
    if status in _EVENT_AT_FAULT and not _is_html(response):
        if re.search(r"\bheaders\b.*\bauthorization\b", answer, re.IGNORECASE):
            return Misconfigured(f"{status}: {answer}; the write key is not sent as it must be")
        named = _NAMED_ITEM.search(answer)
        return Rejected(status, answer, None if named is None else int(named[1]))
    return Misconfigured(_why_held(status, answer.rstrip(".")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """How a claim has met one kind of failure since the agent started: *strikes* over *for_s* seconds.

    *proven* says that another one was delivered since the first of them.
    """

    strikes: int
    for_s: float
    proven: bool


FRESH = Record(strikes=0, for_s=0.0, proven=False)


@dataclass(frozen=True, slots=True)
class Split:
    """Send the events of a claim in parts; *at* is the index of the one that was named."""

    at: int | None


Verdict = tuple[Settlement, ...] | Split | None


def verdict(claim: Claim, outcome: Outcome, record: Record, *, give_up: GiveUp) -> Verdict:
    """Return what an outcome changes for the events of *claim*; None leaves all as they are."""
    if isinstance(outcome, Delivered):
        return tuple(Ack(head.seq) for head in claim.heads)
    if len(claim.heads) > 1:
        return _verdict_on_several(outcome, record)
    change = _verdict_on_one(claim.heads[0], outcome, record, give_up=give_up)
    return None if change is None else (change,)


def may_be_stored(claim: Claim, outcome: Outcome) -> bool:
    """Return whether the upstream may have stored events of *claim* without saying so.

    A batch that breaks off with a 5xx may have been stored in part; a single event was not.
    """
    match outcome:
        case Unavailable(ambiguous=ambiguous):
            return ambiguous
        case Failed():
            return len(claim.heads) > 1
        case _:
            return False


def is_blamed(outcome: Outcome, record: Record, *, probe: bool) -> bool:
    """Return whether a failure may be the claim's own: then it waits longer each time.

    A failed probe says nothing about what it carried, and what holds the queue nothing at first.
    """
    match outcome:
        case Misconfigured():
            return record.proven
        case Unavailable():
            return record.proven or not probe
        case _:
            return True


def _verdict_on_several(outcome: Outcome, record: Record) -> Split | None:
    strikes = record.strikes + 1
    match outcome:
        case Rejected(at=at):
            return Split(at)
        case Failed():
            patience = SPLIT_AFTER if record.proven else 2 * SPLIT_AFTER
            return Split(None) if strikes >= patience else None
        case Unavailable() | Misconfigured():
            return Split(None) if record.proven and strikes >= SPLIT_AFTER else None
        case Delivered():
            raise AssertionError("delivered is settled before")
        case _:
            assert_never(outcome)


def _verdict_on_one(
    head: Head, outcome: Outcome, record: Record, *, give_up: GiveUp
) -> Settlement | None:
    match outcome:
        case Delivered():
            raise AssertionError("delivered is settled before")
        case Rejected(status, answer):
            return Bury(seq=head.seq, reason="rejected", status=status, answer=answer)
        case Failed(status, answer):
            # By the time since the agent started: the wall clock may jump by a month.
            patience_s = give_up.after_s if record.proven else give_up.unproven_after_s
            if head.attempts + 1 >= give_up.attempts and record.for_s >= patience_s:
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


def _readable(body: bytes, clean: Callable[[str], str]) -> str:
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
    return clean(one_line(text))[:_ANSWER_CHARS]


def one_line(text: str) -> str:
    """Return what a stranger wrote as one line that can be printed, stored and sent as JSON."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
