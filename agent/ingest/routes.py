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
from agent.contract import PLAIN, Terms, read_event
from agent.errors import InvalidEventError, OutboxError
from agent.event import Event
from agent.exchange import Answer, Request, refuse
from agent.ingest.callers import Callers
from agent.ingest.destinations import PREFIX, Destinations
from agent.ingest.dialect import APPS, ENDPOINTS, Dialect, Endpoint, media_type
from agent.ingest.reply import Handler, Later, Reply
from agent.ingest.turns import Turns
from agent.outbox.records import Appended
from agent.outbox.refusals import refuse_for
from agent.outbox.writer import Writer

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
        callers: Callers | None = None,
    ) -> None:
        self._writer = writer
        self._clock = clock
        self.terms = terms
        """How bodies are read; they may change from one request to the next."""
        self._mounts = tuple(mounts)
        self.destinations = destinations or Destinations()
        self.callers = callers or Callers()
        self._turns = Turns()

    def answer(self, request: Request) -> Reply:
        path, upstream = request.path, None
        if path.startswith(PREFIX):
            destination = self.destinations.of_path(path)
            if isinstance(destination, Answer):
                return destination
            upstream, path = destination
        if request.method == "POST":
            found = ENDPOINTS.get(path)
            if found is not None:
                return self._take(*found, request, upstream)
        if upstream is None:  # what is not about events has one place
            for mount in self._mounts:
                if mount.serves(path):
                    return mount.handler(request)
        return refuse(
            404,
            "AGENT_NOT_FOUND",
            f"Route {request.method}:{request.path[:200]} not found; events go to POST {APPS}track,"
            " identify, page, screen, group or batch, or to /v1/ as Segment's SDKs send them",
        )

    def _take(
        self, dialect: Dialect, endpoint: Endpoint, request: Request, upstream: str | None
    ) -> Reply:
        """Take events for the *upstream* that the path names; None: for the one that the key means."""
        if endpoint == "alias":
            return _NO_ALIAS
        post = _Post(dialect, request, upstream, dialect.key_of(request))
        app = self._app_of(post)
        if isinstance(app, Answer):
            return app
        content_type = request.headers.get("content-type", "")
        if content_type != _JSON and not dialect.reads(content_type) and not _is_beacon(request):
            return refuse(
                415,
                "FST_ERR_CTP_INVALID_MEDIA_TYPE",
                f"Content-Type: expected application/json, got {content_type[:100]!r}",
            )
        if endpoint == "batch":
            return self._take_batch(post)
        terms = dialect.terms(self.terms)
        try:
            event = read_event(
                endpoint, request.body, received_ms=self._clock.wall_ms(), terms=terms
            )
        except InvalidEventError as exc:
            return refuse(exc.status, exc.code, str(exc))
        return self._append([event], post, app)

    async def _take_batch(self, post: _Post) -> Answer:
        """Take all events of a batch, or none of them."""
        try:
            events = await self._turns.read(
                post.request.body,
                received_ms=self._clock.wall_ms(),
                terms=post.dialect.terms(self.terms),
            )
        except InvalidEventError as exc:
            return refuse(exc.status, exc.code, str(exc))
        except OutboxError as exc:
            return refuse_for(exc)
        # Once more: it may have waited for its turn while a token was revoked.
        app = self._app_of(post)
        if isinstance(app, Answer):
            return app
        if not events:
            return post.dialect.stored
        reply = self._append(events, post, app)
        if isinstance(reply, Answer):
            return reply
        await asyncio.wait([reply.future])
        return reply.answer(reply.future)

    def _app_of(self, post: _Post) -> str | Answer:
        apps = self._writer.apps if post.key else None  # without a key there is no token to look up
        return self.callers.app_of(post.key, post.request.peer, apps)

    def _append(self, events: list[Event], post: _Post, app: str) -> Answer | Later[list[Appended]]:
        upstream = post.upstream
        destination = self.destinations.of_key(post.key) if upstream is None else upstream
        if isinstance(destination, Answer):
            return destination
        if destination or app:
            events = [
                msgspec.structs.replace(event, upstream=destination, app=app) for event in events
            ]
        try:
            committed = self._writer.append(events)
        except OutboxError as exc:
            return refuse_for(exc)
        return Later(committed, partial(_stored, events, post.dialect))


class _Post(msgspec.Struct, frozen=True):
    """A request with events. *key* is the write key or token that it carries.

    That is found once, for it may stand anywhere in a body of megabytes.
    """

    dialect: Dialect
    request: Request
    upstream: str | None
    key: str


def _stored(
    events: list[Event], dialect: Dialect, committed: asyncio.Future[list[Appended]]
) -> Answer:
    try:
        outcomes = committed.result()
    except OutboxError as exc:
        return refuse_for(exc)
    if Appended.CONFLICTING in outcomes:
        # One line for a request: a batch may have tens of thousands, and all others would wait.
        first = events[outcomes.index(Appended.CONFLICTING)]
        log.warning(
            "event.conflicting",
            message_id=first.message_id,
            events=outcomes.count(Appended.CONFLICTING),
        )
    return dialect.stored if Appended.STORED in outcomes else dialect.replayed


_NO_ALIAS = refuse(400, "AGENT_NOT_IMPLEMENTED", "Not yet implemented.")

_JSON = "application/json"
"""What nearly every app says: it need not be taken apart."""


def _is_beacon(request: Request) -> bool:
    """Tell whether it may be JSON that a page calls text, as navigator.sendBeacon(url, text) does.

    Any page can send that without asking; but one that is not allowed did not pass the guard.
    """
    content_type = request.headers.get("content-type", "")
    return "origin" in request.headers and media_type(content_type) == "text/plain"
