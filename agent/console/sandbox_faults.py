"""Faults of the sandbox: which there are, what they mean, and what they answer.

Owns the vocabulary and the answers that a fault makes up; when a fault strikes, and what it does
to the connection, is `agent.console.sandbox`, its only caller.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec
from aiohttp import web

from agent.console import sandbox_contract as contract

CAPTIVE_PORTAL = (
    "<!doctype html><html><head><title>Welcome</title></head>"
    "<body><h1>Guest network</h1><p>Accept the terms to go online.</p></body></html>"
)

FaultMode = Literal[
    "ok", "status", "stall", "slow", "cut_before", "cut_after", "html", "redirect", "down"
]
FAULT_MODES: tuple[str, ...] = get_args(FaultMode)


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong, with which requests (GET /api included), and how many times.

    ==========  ============================================================= ======
    mode        a request that it hits                                        stored
    ==========  ============================================================= ======
    ok          is answered as the contract says                              yes
    status      is answered *status* (503), *retry_after*, *body*             no
    stall       waits *delay_s* (3600), then is answered 504                  no
    slow        waits *delay_s* (1), then goes on as the contract says        yes
    cut_before  loses its connection                                          no
    cut_after   loses its connection instead of the answer                    yes
    html        is answered 200 with the page of a captive portal             no
    redirect    is answered *status* (302) with *location*                    no
    down        loses its connection unread; with *match*, as cut_before      no
    ==========  ============================================================= ======

    *retry_after* is the raw header, seconds or an HTTP-date. *body* is sent as JSON; without it an
    error status has a body in the upstream's shape. After *times* hits (None: never) the mode is ok
    again. *match* limits it to requests whose body holds that text.
    """

    mode: FaultMode
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] | None = None
    retry_after: str | int | None = None
    body: Any = None
    location: str = "http://portal.invalid/login"
    delay_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    times: Annotated[int, msgspec.Meta(ge=1)] | None = None
    match: str | None = None


def faulty_response(fault: Fault) -> web.Response:
    """Return the made-up answer of the modes status, html and redirect."""
    if fault.mode == "html":
        return web.Response(text=CAPTIVE_PORTAL, content_type="text/html")
    if fault.mode == "redirect":
        return web.Response(status=fault.status or 302, headers={"Location": fault.location})
    status = fault.status or 503
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    if fault.body is not None:
        return json_response(fault.body, status=status, headers=headers)
    if status < 400:
        return web.Response(status=status, headers=headers)
    return error_response(status, f"The sandbox was told to answer {status}.", headers)


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """Return an error in the upstream's shape."""
    return json_response(contract.error_payload(status, message), status=status, headers=headers)


def json_response(
    value: object, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """Return *value* as JSON."""
    return web.Response(
        status=status,
        headers=headers,
        body=msgspec.json.encode(value),
        content_type="application/json",
    )
