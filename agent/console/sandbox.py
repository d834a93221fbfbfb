"""A stand-in for the upstream: the contract, a list of what arrived, and faults on demand.

Owns a small HTTP server, what it holds in memory, and the faults that make it misbehave. What a
sound server would answer is decided in `agent.console.sandbox_contract`; nothing here is shared
with the agent, so that the agent can be tested against it. It keeps everything until told to
forget and dedupes nothing, as the upstream does.

Called by the `sandbox` and `demo` commands and by tests. In one process:

    sandbox = Sandbox()
    async with sandbox.serving() as url:
        sandbox.fault = Fault(mode="status", status=503, times=2)
        await sandbox.wait_for(lambda s: len(s.stored) == 1)

or over HTTP, under `/sandbox/`:

    POST, DELETE /sandbox/fault                     the fields of `Fault` as JSON; back to normal
    GET /sandbox/events?since=N&limit=N; DELETE     stored bodies from the 0-based N on; forget all
    GET /sandbox/stats                              the fields of `Stats`

Leaving `serving` and entering it again with the same port is the truest unreachable server: in
between connections are refused, and what was stored stays.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import assert_never

import msgspec
from aiohttp import web

from agent.console import sandbox_contract as contract
from agent.console.sandbox_faults import (
    FAULT_MODES,
    Fault,
    error_response,
    faulty_response,
    json_response,
)

__all__ = [
    "DEFAULT_WRITE_KEY",
    "FAULT_MODES",
    "Arrival",
    "Fault",
    "Sandbox",
    "Stats",
    "run_sandbox",
]

DEFAULT_WRITE_KEY = "sandbox-key"

# Seconds that an idle connection is kept; the upstream's own value.
KEEP_ALIVE_S = 72.0

# Seconds that running handlers get at shutdown. None needs more than to notice it.
SHUTDOWN_GRACE_S = 1.0

# Events in one answer of GET /sandbox/events, unless asked for more.
EVENTS_LIMIT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One event that came in, or one POST in which no event could be told.

    The events of a batch share *request*, a 1-based number, and *path*. *user* is the userId, or
    else the anonymousId; *kind* the type that the upstream would store. *at_s* is monotonic.
    *status* is None where the connection was cut or stalled. Of the headers only what gives no
    key away is kept: the *scheme* before the key, and whether the two carried the right one.
    """

    request: int
    path: str
    message_id: str
    user: str
    kind: str
    body: bytes
    at_s: float
    stored: bool
    status: int | None
    content_type: str
    scheme: str
    authorized: bool
    public_write_key: bool


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start or the last `Sandbox.clear`.

    *requests* counts every one outside `/sandbox/`, also those never answered. *answers* is by
    status, or "cut". *unique* counts the messageIds stored, *duplicates* the rows beyond them.
    """

    requests: int
    stored: int
    unique: int
    duplicates: int
    answers: dict[str, int]
    fault: Fault


class Sandbox:
    """The stand-in server. Read *arrivals* and *stored* freely, but change neither.

    *arrivals* has everything that came in, *stored* what the upstream would hold, duplicates
    included; both in order of arrival. *requests* counts also what left neither. *url* is the
    server's root, empty before the first `serving`.
    """

    def __init__(self, write_key: str = DEFAULT_WRITE_KEY) -> None:
        self.arrivals: list[Arrival] = []
        self.stored: list[Arrival] = []
        self.requests = 0
        self.url = ""
        self._write_key = write_key
        self._fault = Fault(mode="ok")
        self._hits_left: int | None = None
        self._message_ids: set[str] = set()
        self._answers: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()

    @property
    def fault(self) -> Fault:
        """The fault in force; set it to change what happens to requests from now on."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._fault = fault
        self._hits_left = fault.times
        self._notify()

    def stats(self) -> Stats:
        """Return the counts so far."""
        return Stats(
            requests=self.requests,
            stored=len(self.stored),
            unique=len(self._message_ids),
            duplicates=len(self.stored) - len(self._message_ids),
            answers=dict(self._answers),
            fault=self._fault,
        )

    def clear(self) -> None:
        """Forget what arrived and start counting anew. The fault stays."""
        self.arrivals.clear()
        self.stored.clear()
        self._message_ids.clear()
        self._answers.clear()
        self.requests = 0
        self._notify()

    async def wait_for(self, condition: Callable[[Sandbox], bool], timeout_s: float = 5.0) -> None:
        """Return as soon as *condition* holds; it is asked again after every change.

        TimeoutError says what had arrived by then. An event is stored before it is answered.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not condition(self):
                    await self._changed.wait()
        except TimeoutError as exc:
            raise TimeoutError(f"not true within {timeout_s} s; {self.stats()}") from exc

    @asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
        """Serve inside the block, and give it the root URL. Port 0 takes a free one.

        OSError: the address cannot be bound.
        """
        self._stopping = asyncio.Event()
        runner = web.AppRunner(
            self._application(),
            access_log=None,
            auto_decompress=False,  # the upstream does not; gzip has to reach the JSON parser
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=0,  # what is refused early is cut off, not read to the end
            shutdown_timeout=SHUTDOWN_GRACE_S,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            bound = runner.addresses[0][1]
            self.url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
            yield self.url
        finally:
            self._stopping.set()
            await runner.cleanup()

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=contract.BODY_LIMIT_BYTES)
        app.router.add_post("/sandbox/fault", self._set_fault)
        app.router.add_delete("/sandbox/fault", self._end_fault)
        app.router.add_get("/sandbox/events", self._list_events)
        app.router.add_delete("/sandbox/events", self._forget_events)
        app.router.add_get("/sandbox/stats", self._show_stats)
        app.router.add_route("*", "/{path:.*}", self._serve)
        return app

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        exchange = _Exchange(
            request=request,
            number=self.requests,
            at_s=asyncio.get_running_loop().time(),
        )
        self._notify()
        if self._fault.mode == "down" and self._fault.match is None:
            self._strike(b"")
            return self._cut(exchange)
        try:
            # Refused on its announcement: the body of an oversized request is never read.
            too_large = (request.content_length or 0) > contract.BODY_LIMIT_BYTES
            body = b"" if too_large else await request.read()
        except web.HTTPRequestEntityTooLarge:
            too_large, body = True, b""
        except ConnectionResetError:  # the client left in the middle of its body
            return self._cut(exchange)
        if too_large:
            response = self._answer(exchange, contract.too_large(), body)
            response.force_close()
            return response
        return await self._misbehave(exchange, self._strike(body), body)

    def _strike(self, body: bytes) -> Fault:
        """Return the fault that hits a request with this body, and count the hit."""
        fault = self._fault
        if fault.match is not None and fault.match.encode() not in body:
            return Fault(mode="ok")
        if self._hits_left is not None:
            self._hits_left -= 1
            if self._hits_left == 0:
                self.fault = Fault(mode="ok")
        return fault

    async def _misbehave(self, exchange: _Exchange, fault: Fault, body: bytes) -> web.Response:
        verdict = self._judge(exchange.request, body)
        match fault.mode:
            case "ok":
                return self._answer(exchange, verdict, body)
            case "slow":
                if await self._stopped_within(fault, default_s=1.0):
                    self._record(exchange, verdict, body)
                    return self._cut(exchange)
                return self._answer(exchange, verdict, body)
            case "stall":
                self._record(exchange, verdict, body)
                if await self._stopped_within(fault, default_s=3600.0):
                    return self._cut(exchange)
                return self._counted(error_response(504, "The sandbox stalled."))
            case "cut_before" | "cut_after" | "down":
                stored = fault.mode == "cut_after" and verdict.status == 204
                self._record(exchange, verdict, body, stored=stored)
                return self._cut(exchange)
            case "status" | "html" | "redirect":
                response = faulty_response(fault)
                self._record(exchange, verdict, body, status=response.status)
                return self._counted(response)
            case _:
                assert_never(fault.mode)

    def _judge(self, request: web.Request, body: bytes) -> contract.Verdict:
        if request.method == "POST":
            return contract.judge(
                request.path,
                content_type=request.content_type,
                authorization=request.headers.get("Authorization"),
                body=body,
                write_key=self._write_key,
            )
        if request.method == "GET" and request.path == "/api":
            return contract.Verdict(status=200, payload={"version": "sandbox"})
        if request.method == "OPTIONS" and request.path.startswith(contract.PREFIX):
            return contract.Verdict(status=204)
        return contract.not_found(request.method, request.path)

    def _answer(self, exchange: _Exchange, verdict: contract.Verdict, body: bytes) -> web.Response:
        stored = verdict.status == 204
        self._record(exchange, verdict, body, status=verdict.status, stored=stored)
        # Any web page may post, as upstream; /sandbox/ itself has no such header.
        headers = {"Access-Control-Allow-Origin": "*"}
        if exchange.request.method == "OPTIONS":
            headers["Access-Control-Allow-Methods"] = "GET, POST"
            headers["Access-Control-Allow-Headers"] = "authorization, content-type, publicwritekey"
        if verdict.payload is None:
            response = web.Response(status=verdict.status, headers=headers)
        else:
            response = json_response(verdict.payload, status=verdict.status, headers=headers)
        return self._counted(response)

    def _record(
        self,
        exchange: _Exchange,
        verdict: contract.Verdict,
        body: bytes,
        *,
        status: int | None = None,
        stored: bool = False,
    ) -> None:
        request = exchange.request
        if request.method != "POST":
            return
        authorization = request.headers.get("Authorization")
        scheme, space, _key = (authorization or "").partition(" ")
        found = verdict.found
        if not found and verdict.status != 204:
            found = (contract.Found(message_id="", user="", kind="", body=body),)
        for event in found:
            arrival = Arrival(
                request=exchange.number,
                path=request.path,
                message_id=event.message_id,
                user=event.user,
                kind=event.kind,
                body=event.body,
                at_s=exchange.at_s,
                stored=stored,
                status=status,
                content_type=request.content_type,
                scheme=scheme if space else "",  # without a space, that word is the key
                authorized=contract.is_authorized(authorization, self._write_key),
                public_write_key=request.headers.get("PublicWriteKey") == self._write_key,
            )
            self.arrivals.append(arrival)
            if stored:
                self.stored.append(arrival)
                self._message_ids.add(arrival.message_id)
        self._notify()

    def _counted(self, response: web.Response) -> web.Response:
        self._answers[str(response.status)] += 1
        self._notify()
        return response

    def _cut(self, exchange: _Exchange) -> web.Response:
        self._answers["cut"] += 1
        self._notify()
        transport = exchange.request.transport
        if transport is not None:
            transport.abort()
        # The server needs an answer from its handler; this one meets a closed connection.
        return web.Response(status=503)

    async def _stopped_within(self, fault: Fault, *, default_s: float) -> bool:
        """Return False after the fault's delay, or True as soon as the server is stopping."""
        try:
            async with asyncio.timeout(default_s if fault.delay_s is None else fault.delay_s):
                return await self._stopping.wait()
        except TimeoutError:
            return False

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _set_fault(self, request: web.Request) -> web.Response:
        try:
            self.fault = msgspec.json.decode(await request.read(), type=Fault)
        except msgspec.DecodeError as exc:
            return error_response(400, f"{exc}; the modes are {', '.join(FAULT_MODES)}")
        return json_response(self._fault)

    async def _end_fault(self, _request: web.Request) -> web.Response:
        self.fault = Fault(mode="ok")
        return web.Response(status=204)

    async def _list_events(self, request: web.Request) -> web.Response:
        since = request.query.get("since", "0")
        limit = request.query.get("limit", str(EVENTS_LIMIT))
        if not (since.isdecimal() and limit.isdecimal()):
            return error_response(
                400, f"since={since} and limit={limit} must be numbers, 0 or more"
            )
        bodies = [event.body for event in self.stored[int(since) : int(since) + int(limit)]]
        return web.Response(body=b"[" + b",\n".join(bodies) + b"]", content_type="application/json")

    async def _forget_events(self, _request: web.Request) -> web.Response:
        self.clear()
        return web.Response(status=204)

    async def _show_stats(self, _request: web.Request) -> web.Response:
        return json_response(self.stats())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """One request with its 1-based number and its monotonic instant of arrival."""

    request: web.Request
    number: int
    at_s: float


async def run_sandbox(
    host: str, port: int, write_key: str, announce: Callable[[str], None]
) -> None:
    """Serve until cancelled; *announce* gets each line that a person should see.

    OSError: the address cannot be bound.
    """
    key = write_key if write_key == DEFAULT_WRITE_KEY else "the one given"
    async with Sandbox(write_key).serving(host, port) as url:
        announce(f"Sandbox upstream on {url}, write key: {key}")
        announce(f"  what arrived:  curl {url}/sandbox/events      counts: {url}/sandbox/stats")
        announce(
            f"""  make it fail:  curl {url}/sandbox/fault -d '{{"mode":"status","status":503}}'"""
        )
        announce(f"  and recover:   curl -X DELETE {url}/sandbox/fault")
        announce(f"  modes: {', '.join(FAULT_MODES)}")
        await asyncio.get_running_loop().create_future()
