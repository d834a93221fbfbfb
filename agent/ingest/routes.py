"""What each path does: from a whole request to an event in the outbox and an answer.

Knows no HTTP library. Routes that are not about events (status, control) are handed in by the
daemon as `Mount`s and served beside these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec
import structlog

from agent.clock import Clock
from agent.contract import PLAIN, Terms, read_event
from agent.errors import InvalidEventError, OutboxError
from agent.event import KINDS, Event, Kind
from agent.exchange import REPLAYED, STORED, Answer, Request, refuse
from agent.ingest.destinations import PREFIX, Destinations
from agent.ingest.reply import Handler, Later, Reply
from agent.ingest.turns import Turns
from agent.outbox.records import Appended
from agent.outbox.refusals import refuse_for
from agent.outbox.writer import Writer

Endpoint = Kind | Literal["batch"]
"""What follows /api/public/apps/."""

_APPS = "/api/public/apps/"

_ENDPOINTS: dict[str, Endpoint] = {
    **{_APPS + kind: kind for kind in KINDS},
    f"{_APPS}batch": "batch",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Mount:
    """A handler for one path, or, where *path* ends with a slash, for all below it."""

    path: str
    handler: Handler

    def serves(self, path: str) -> bool:
        return path.startswith(self.path) if self.path.endswith("/") else path == self.path


class Routes:
    """The agent's paths. `answer` never raises for a foreseen failure."""

    def __init__(
        self,
        writer: Writer,
        clock: Clock,
        *,
        terms: Terms = PLAIN,
        mounts: Iterable[Mount] = (),
        destinations: Destinations | None = None,
    ) -> None:
        self._writer = writer
        self._clock = clock
        self.terms = terms
        """How bodies are read; they may change from one request to the next."""
        self._mounts = tuple(mounts)
        self.destinations = destinations or Destinations()
        self._turns = Turns()

    def answer(self, request: Request) -> Reply:
        path, upstream = request.path, None
        if path.startswith(PREFIX):
            destination = self.destinations.of_path(path)
            if isinstance(destination, Answer):
                return destination
            upstream, path = destination
        if request.method == "POST":
            endpoint = _ENDPOINTS.get(path)
            if endpoint is not None:
                return self._take(endpoint, request, upstream)
            if path == _ALIAS:
                return _NO_ALIAS
        if upstream is None:  # what is not about events has one place
            for mount in self._mounts:
                if mount.serves(path):
                    return mount.handler(request)
        return refuse(
            404,
            "AGENT_NOT_FOUND",
            f"Route {request.method}:{request.path[:200]} not found; events go to POST {_APPS}track,"
            " identify, page, screen, group or batch",
        )

    def _take(self, endpoint: Endpoint, request: Request, upstream: str | None) -> Reply:
        """Take events for the *upstream* that the path names; None: for the one that the key means."""
        content_type = request.headers.get("content-type", "")
        if content_type != _JSON and not _is_json(content_type) and not _is_beacon(request):
            return refuse(
                415,
                "FST_ERR_CTP_INVALID_MEDIA_TYPE",
                f"Content-Type: expected application/json, got {content_type[:100]!r}",
            )
        if endpoint == "batch":
            return self._take_batch(request, upstream)
        try:
            event = read_event(
                endpoint, request.body, received_ms=self._clock.wall_ms(), terms=self.terms
            )
        except InvalidEventError as exc:
            return refuse(exc.status, exc.code, str(exc))
        return self._append([event], request, upstream)

    async def _take_batch(self, request: Request, upstream: str | None) -> Answer:
        """Take all events of a batch, or none of them."""
        try:
            events = await self._turns.read(
                request.body, received_ms=self._clock.wall_ms(), terms=self.terms
            )
        except InvalidEventError as exc:
            return refuse(exc.status, exc.code, str(exc))
        except OutboxError as exc:
            return refuse_for(exc)
        if not events:
            return STORED
        reply = self._append(events, request, upstream)
        if isinstance(reply, Answer):
            return reply
        await asyncio.wait([reply.future])
        return reply.answer(reply.future)

    def _append(
        self, events: list[Event], request: Request, upstream: str | None
    ) -> Answer | Later[list[Appended]]:
        destination = self.destinations.of_key(request) if upstream is None else upstream
        if isinstance(destination, Answer):
            return destination
        if destination:
            events = [msgspec.structs.replace(event, upstream=destination) for event in events]
        try:
            committed = self._writer.append(events)
        except OutboxError as exc:
            return refuse_for(exc)
        return Later(committed, partial(_stored, events))


def _stored(events: list[Event], committed: asyncio.Future[list[Appended]]) -> Answer:
    try:
        outcomes = committed.result()
    except OutboxError as exc:
        return refuse_for(exc)
    for event, appended in zip(events, outcomes, strict=True):
        if appended is Appended.CONFLICTING:
            log.warning("event.conflicting", message_id=event.message_id)
    return STORED if Appended.STORED in outcomes else REPLAYED


_ALIAS = f"{_APPS}alias"
_NO_ALIAS = refuse(400, "AGENT_NOT_IMPLEMENTED", "Not yet implemented.")

_JSON = "application/json"


def _is_json(content_type: str) -> bool:
    return _media_type(content_type) == _JSON


def _is_beacon(request: Request) -> bool:
    """Tell whether it may be JSON that a page calls text, as navigator.sendBeacon(url, text) does.

    Any page can send that without asking; but one that is not allowed did not pass the guard.
    """
    content_type = request.headers.get("content-type", "")
    return "origin" in request.headers and _media_type(content_type) == "text/plain"


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()
