"""What each path does: from a whole request to an event in the outbox and an answer.

Knows no HTTP library. Routes that are not about events (status, control) are handed in by the
daemon as `Mount`s and served beside these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from agent.clock import Clock
from agent.errors import InvalidEventError, OutboxError
from agent.event import parse_track
from agent.exchange import REPLAYED, STORED, Answer, Handler, Request, refuse
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
        max_body_bytes: int,
        mounts: Iterable[Mount] = (),
    ) -> None:
        self._writer = writer
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._mounts = tuple(mounts)

    async def answer(self, request: Request) -> Answer:
        if request.method == "POST" and request.path == "/api/public/apps/track":
            return await self._track(request)
        for mount in self._mounts:
            if mount.serves(request.path):
                return await mount.handler(request)
        return refuse(
            404,
            "AGENT_NOT_FOUND",
            f"Route {request.method}:{request.path[:200]} not found;"
            " events go to POST /api/public/apps/track",
        )

    async def _track(self, request: Request) -> Answer:
        if not _is_json(request.headers.get("Content-Type", "")):
            return refuse(
                415,
                "FST_ERR_CTP_INVALID_MEDIA_TYPE",
                f"Content-Type: expected application/json,"
                f" got {request.headers.get('Content-Type', '')[:100]!r}",
            )
        try:
            event = parse_track(
                request.body,
                received_ms=self._clock.wall_ms(),
                max_body_bytes=self._max_body_bytes,
            )
        except InvalidEventError as exc:
            return refuse(exc.status, exc.code, str(exc))
        try:
            (appended,) = await self._writer.append([event])
        except OutboxError as exc:
            return refuse_for(exc)
        match appended:
            case Appended.STORED:
                return STORED
            case Appended.REPLAYED:
                return REPLAYED
            case Appended.CONFLICTING:
                log.warning("event.conflicting", message_id=event.message_id)
                return REPLAYED


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"
