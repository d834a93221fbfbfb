"""The control API under /api/agent/, /healthz, /readyz and /metrics: what the daemon tells and obeys.

Plain requests in, plain answers out; `agent.daemon` mounts it on the listener, behind the guard.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol, TypeVar

import msgspec

from agent.clock import Clock
from agent.console import apps, dead_letters
from agent.console.messages import (
    AppsPage,
    DeadRequest,
    Discarded,
    EventQuery,
    EventsPage,
    EventsQuery,
    Health,
    NewToken,
    OldToken,
    Requeued,
    SteeringQuery,
)
from agent.console.receipts import (
    WAIT_MAX_S,
    receipt_view,
    unknown,
    view,
    wait_s,
)
from agent.console.status import Standing, Status, collect
from agent.errors import OutboxError, OutboxUnavailableError
from agent.exchange import Answer, Request, answer_json, refuse
from agent.flow import Flow, Wait
from agent.outbox import pauses
from agent.outbox.reader import Reader
from agent.outbox.records import Quotas, Receipt, Selection, label, unlabel
from agent.outbox.refusals import RETRY_UNAVAILABLE_S, refuse_for
from agent.outbox.search import receipt_of
from agent.outbox.writer import Writer

PREFIX = "/api/agent/"


class _UnknownUpstreamError(Exception):
    """A request names an upstream that there is not."""


class Link(Protocol):
    """What one of the daemon's forwarders obeys."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def flush(self) -> None: ...
    def flow(self) -> Flow: ...
    def wait_of(self, seq: int, lane: int) -> Wait: ...


class Control:
    """Answers for the daemon. `answer` never raises for a foreseen failure."""

    def __init__(
        self,
        *,
        reader: Reader,
        writer: Writer,
        links: Mapping[str, Link],
        clock: Clock,
        urls: Mapping[str, str],
        max_bytes: int,
        quotas: Quotas | None = None,
    ) -> None:
        """*links* and *urls* are by the names of the upstreams."""
        self._reader = reader
        self._writer = writer
        self._links = links
        self._clock = clock
        self._urls = urls
        self._max_bytes = max_bytes
        self._quotas = quotas or Quotas()
        self.config_problem: str | None = None
        """Why a configuration read anew was refused; None while the last one is in force."""
        self._document: Answer | None = None
        # One search at a time: others wait here, not in the reader's thread, where none can end.
        self._searching = asyncio.Lock()

    def adopt(self, *, urls: Mapping[str, str], max_bytes: int, quotas: Quotas) -> None:
        """Tell these from now on."""
        self._urls, self._max_bytes, self._quotas = urls, max_bytes, quotas

    async def answer(self, request: Request) -> Answer:
        """Answer one request below `PREFIX`."""
        try:
            return await self._route(request)
        except msgspec.ValidationError as exc:
            return refuse(400, "AGENT_BAD_REQUEST", str(exc))
        except msgspec.DecodeError as exc:
            return refuse(400, "AGENT_BAD_REQUEST", f"body: {exc}")
        except _UnknownUpstreamError as exc:
            return refuse(404, "AGENT_UNKNOWN_UPSTREAM", str(exc))
        except OutboxError as exc:
            return refuse_for(exc)
        except apps.AppTokenError as exc:
            return refuse(409, "AGENT_APP_TOKEN", str(exc))

    async def health(self, request: Request) -> Answer:
        """GET /healthz: the process answers."""
        return answer_json(Health("ok")) if request.method == "GET" else _not_found(request)

    async def readiness(self, request: Request) -> Answer:
        """GET /readyz: events are accepted now; 503 says why not."""
        if request.method != "GET":
            return _not_found(request)
        if why := self._writer.fault or self._writer.full:
            return refuse(503, "AGENT_NOT_READY", why, retry_after_s=RETRY_UNAVAILABLE_S)
        return answer_json(Health("ready"))

    async def metrics(self, request: Request) -> Answer:
        """GET /metrics: the numbers of `status`, for Prometheus."""
        if request.method != "GET":
            return _not_found(request)
        # A MiB of library that most machines never want.
        from agent.console.metrics import CONTENT_TYPE, exposition  # noqa: PLC0415

        try:
            status = await self.collected()
        except OutboxError as exc:
            return refuse_for(exc)
        return Answer(status=200, body=exposition(status), content_type=CONTENT_TYPE)

    async def _route(self, request: Request) -> Answer:
        path = request.path.removeprefix(PREFIX)
        if request.method == "POST" and not _may_steer(request):
            return refuse(
                415,
                "AGENT_UNSUPPORTED_MEDIA_TYPE",
                "Content-Type: expected application/json, as no form can send it",
            )
        match request.method, path:
            case "GET", "openapi.json":
                return self._described()
            case "GET", "status":
                return await self._status()
            case "GET", "events":
                return await self._events(request)
            case "GET", _ if path.startswith("events/"):
                return await self._event(request, path.removeprefix("events/"))
            case "POST", "pause" | "resume" | "flush":
                return await self._steer(path, self._upstream(request))
            case "POST", "dead/requeue":
                return await self._requeue(request)
            case "POST", "dead/discard":
                return await self._discard(request)
            case _, "apps" | "apps/add" | "apps/revoke":
                return await self._of_apps(path, request)
            case _:
                return _not_found(request)

    def _upstream(self, request: Request) -> str | None:
        """Return the one that `upstream` in the query names; None for all."""
        text = _query(request, SteeringQuery).upstream
        if text is not None and unlabel(text) not in self._links:
            known = ", ".join(sorted(map(label, self._links)))
            raise _UnknownUpstreamError(
                f"upstream: {text[:100]!r} is not configured; there are {known}"
            )
        return None if text is None else unlabel(text)

    async def _steer(self, verb: str, upstream: str | None) -> Answer:
        links = self._links.values() if upstream is None else [self._links[upstream]]
        match verb:
            case "pause":
                for link in links:
                    link.pause()  # first: it must work on a disk that is full or fails
                await self._writer.perform(lambda store: pauses.pause(store, upstream))
            case "resume":
                known = tuple(self._links)
                await self._writer.perform(
                    lambda store: pauses.resume(store, upstream, known=known)
                )
                for link in links:
                    link.resume()
            case _:
                for link in links:
                    link.flush()
        return await self._status()

    async def _status(self) -> Answer:
        return answer_json(await self.collected())

    async def collected(self) -> Status:
        """Return what `status` tells. Raises `OutboxError`."""
        return await collect(
            self._reader,
            now_ms=self._clock.wall_ms(),
            upstreams={
                name: Standing(self._urls[name], link.flow()) for name, link in self._links.items()
            },
            waiting=self._writer.waiting,
            max_bytes=self._max_bytes,
            full=self._writer.full,
            fault=self._writer.fault,
            config_problem=self.config_problem,
            quotas=self._quotas,
        )

    def _described(self) -> Answer:
        if self._document is None:
            # Most machines never want it.
            from agent.console.openapi import document  # noqa: PLC0415

            self._document = answer_json(document(map(label, self._links)))
        return self._document

    async def _events(self, request: Request) -> Answer:
        query = _query(request, EventsQuery)
        async with self._searching:
            found = await self._reader.select(
                query.state, query, after=query.after, limit=query.limit
            )
        return answer_json(
            EventsPage(
                events=[view(receipt) for receipt in found],
                next_after=found[-1].seq if len(found) == query.limit else None,
            )
        )

    async def _event(self, request: Request, message_id: str) -> Answer:
        query = _query(request, EventQuery)
        upstream = None if query.upstream is None else unlabel(query.upstream)
        waited_s = _wait_s(query.wait)
        if isinstance(waited_s, Answer):
            return waited_s
        rescuing = self._writer.rescuing  # before the look: it may be over right behind that
        known = await self._settled(message_id, upstream, waited_s)
        receipt = receipt_of(known, upstream)
        if receipt is None:
            if rescuing or self._writer.rescuing:
                raise OutboxUnavailableError(
                    f"messageId {message_id[:200]!r} is not known yet: the events of a damaged outbox"
                    " are still read back"
                )
            return answer_json(unknown(message_id), status=404)
        wait = self._wait_of(receipt) if receipt.state == "pending" else None
        return answer_json(receipt_view(receipt, wait, known))

    async def _settled(
        self, message_id: str, upstream: str | None, waited_s: float
    ) -> list[Receipt]:
        """Return the receipts of one id, once that of *upstream* is settled or *waited_s* are over."""
        if waited_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(waited_s):
                    await self._wait_until_settled(message_id, upstream)
        return await self._reader.receipts(message_id)

    async def _wait_until_settled(self, message_id: str, upstream: str | None) -> None:
        waiters = self._writer.waiters
        seq = await self._pending_seq(message_id, upstream)
        while seq is not None and not waiters.over:
            with waiters.watch(seq) as told:
                if await self._pending_seq(message_id, upstream) == seq:
                    await told.wait()
            seq = await self._pending_seq(message_id, upstream)

    async def _pending_seq(self, message_id: str, upstream: str | None) -> int | None:
        receipt = await self._reader.receipt(message_id, upstream)
        return receipt.seq if receipt is not None and receipt.state == "pending" else None

    def _wait_of(self, receipt: Receipt) -> Wait:
        link = self._links.get(receipt.upstream)
        if link is None or receipt.lane is None:
            gone = f"the configuration has no [upstreams.{receipt.upstream}] any more"
            return Wait(waits_for="upstream", reason=gone)
        return link.wait_of(receipt.seq, receipt.lane)

    async def _requeue(self, request: Request) -> Answer:
        selection = _selected(request)
        if isinstance(selection, Answer):
            return selection
        requeued = await dead_letters.requeue(
            self._reader, self._writer, selection, now_ms=self._clock.wall_ms()
        )
        return answer_json(Requeued(requeued))

    async def _discard(self, request: Request) -> Answer:
        selection = _selected(request)
        if isinstance(selection, Answer):
            return selection
        discarded = await dead_letters.discard(self._reader, self._writer, selection)
        return answer_json(Discarded(discarded))

    async def _of_apps(self, path: str, request: Request) -> Answer:
        now_ms = self._clock.wall_ms()
        match request.method, path:
            case "GET", "apps":
                pass
            case "POST", "apps/add" | "apps/revoke" if refusal := self._refuse_stranger(request):
                return refusal
            case "POST", "apps/add":
                new = msgspec.json.decode(request.body, type=NewToken)
                digest = bytes.fromhex(new.token_sha256)
                await apps.add(self._writer, new.name, digest, now_ms=now_ms)
            case "POST", "apps/revoke":
                old = msgspec.json.decode(request.body, type=OldToken)
                await apps.revoke(self._writer, old.name, now_ms=now_ms)
            case _:
                return _not_found(request)
        return answer_json(AppsPage((await self.collected()).apps))

    def _refuse_stranger(self, request: Request) -> Answer | None:
        """Return the refusal of whoever may not read the files of the outbox.

        Any program on the machine reaches us; if each could give itself a token, none would tell anything.
        """
        sent = request.headers.get("authorization", "")
        if hmac.compare_digest(sent.encode(), f"Bearer {self._writer.operator_key}".encode()):
            return None
        return refuse(
            401,
            "AGENT_NOT_AN_OPERATOR",
            "Authorization: tokens are given out and revoked by who may read the files of the outbox:"
            " use `tranthor-agent app`, as the agent's user, a member of its group, or root",
        )


def _selected(request: Request) -> Selection | Answer:
    tree = msgspec.json.decode(request.body or b"{}")
    if isinstance(tree, dict):  # to JSON 164.0 is the same as 164
        tree = {name: _whole(value) for name, value in tree.items()}
    selection = msgspec.convert(tree, DeadRequest)
    if selection == DeadRequest():
        return refuse(
            400,
            "AGENT_BAD_REQUEST",
            'say which dead letters: "messageIds", "upstream", "app", "event", "user", "text", "reason",'
            ' "acceptedBeforeMs", "acceptedAfterMs", or "all": true',
        )
    return selection


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Q = TypeVar("_Q", bound=msgspec.Struct)


def _query(request: Request, query: type[_Q]) -> _Q:
    """Return the query as *query*. Raises `msgspec.ValidationError`.

    Not by `strict=False`, to which the text null is nothing.
    """
    given = {
        name: int(text) if name in _NUMBERS and _INTEGER.fullmatch(text) else text
        for name, text in request.query.items()
    }
    return msgspec.convert(given, query)


_NUMBERS = frozenset({"limit", "after", "acceptedBeforeMs", "acceptedAfterMs"})
_INTEGER = re.compile(r"-?[0-9]{1,40}", re.ASCII)


def _wait_s(text: str) -> float | Answer:
    try:
        waited_s = wait_s(text)
    except ValueError as exc:
        return refuse(400, "AGENT_BAD_REQUEST", f"wait: {text[:40]!r}: {exc}")
    if waited_s > WAIT_MAX_S:
        return refuse(
            400,
            "AGENT_BAD_REQUEST",
            f"wait: {text[:40]!r} is over the limit of {WAIT_MAX_S:.0f} s; ask again when it is over",
        )
    return waited_s


_FORM_TYPES = frozenset({"text/plain", "application/x-www-form-urlencoded", "multipart/form-data"})
"""What a web page can send without asking first (Fetch standard, CORS-safelisted request-header)."""


def _may_steer(request: Request) -> bool:
    content_type = request.headers.get("content-type", "").partition(";")[0]
    return content_type.strip().lower() not in _FORM_TYPES


def _not_found(request: Request) -> Answer:
    return refuse(404, "AGENT_NOT_FOUND", f"Route {request.method}:{request.path[:200]} not found")
