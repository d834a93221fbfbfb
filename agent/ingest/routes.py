"""What each path does: from a whole request to an event in the outbox and an answer.

Knows no HTTP library. Routes that are not about events (status, control) are handed in by the
daemon as `Mount`s and served beside these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog

from agent.clock import Clock
from agent.errors import InvalidEventError, OutboxError
from agent.event import parse_track
from agent.exchange import REPLAYED, STORED, Answer, Request, refuse
from agent.ingest.destinations import PREFIX, Destinations
from agent.ingest.reply import Handler, Later, Reply
from agent.outbox.records import Appended
from agent.outbox.refusals import refuse_for
from agent.outbox.writer import Writer

_TRACK = "/api/public/apps/track"

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
        max_body_bytes: int,
        mounts: Iterable[Mount] = (),
        destinations: Destinations | None = None,
    ) -> None:
        self._writer = writer
        self._clock = clock
        self.max_body_bytes = max_body_bytes
        """The largest body that is read as an event; it may change from one request to the next."""
        self._mounts = tuple(mounts)
        self.destinations = destinations or Destinations()

    def answer(self, request: Request) -> Reply:
        path, upstream = request.path, None
        if path.startswith(PREFIX):
            destination = self.destinations.of_path(path)
            if isinstance(destination, Answer):
                return destination
            upstream, path = destination
        if request.method == "POST" and path == _TRACK:
            return self._track(request, upstream)
        if upstream is None:  # what is not about events has one place
            for mount in self._mounts:
                if mount.serves(path):
                    return mount.handler(request)
        return refuse(
            404,
            "AGENT_NOT_FOUND",
            f"Route {request.method}:{request.path[:200]} not found; events go to POST {_TRACK}",
        )

    def _track(self, request: Request, upstream: str | None) -> Reply:
        """Take an event for the *upstream* that the path names; None: for the one that its key means."""
        content_type = request.headers.get("content-type", "")
        if content_type != _JSON and not _is_json(content_type):
            return refuse(
                415,
                "FST_ERR_CTP_INVALID_MEDIA_TYPE",
                f"Content-Type: expected application/json, got {content_type[:100]!r}",
            )
        try:
            event = parse_track(
                request.body,
                received_ms=self._clock.wall_ms(),
                max_body_bytes=self.max_body_bytes,
            )
        except InvalidEventError as exc:
            return refuse(exc.status, exc.code, str(exc))
        destination = self.destinations.of_key(request) if upstream is None else upstream
        if isinstance(destination, Answer):
            return destination
        if destination:
            event = msgspec.structs.replace(event, upstream=destination)
        try:
            committed = self._writer.append([event])
        except OutboxError as exc:
            return refuse_for(exc)
        return Later(committed, partial(_stored, event.message_id))


def _stored(message_id: str, committed: asyncio.Future[list[Appended]]) -> Answer:
    try:
        (appended,) = committed.result()
    except OutboxError as exc:
        return refuse_for(exc)
    match appended:
        case Appended.STORED:
            return STORED
        case Appended.REPLAYED:
            return REPLAYED
        case Appended.CONFLICTING:
            log.warning("event.conflicting", message_id=message_id)
            return REPLAYED


_JSON = "application/json"


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == _JSON
