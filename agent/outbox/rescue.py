"""What becomes of a damaged database: set aside at once, read in the background, never deleted.

    outbox.db, -wal  ──set_aside──▶  outbox.db.damaged-<Unix ms>, -wal
                                            │ survey (agent.outbox.salvage)
    a new outbox.db, taking events  ◀───────┘ put_back, in order of acceptance

Nothing is forwarded until that is done: a user's salvaged events come before what was accepted
since. The table `salvage` remembers each set by its name, so that one is read again if the agent
ends in the middle, and not once it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from agent.errors import OutboxError, OutboxFullError, OutboxUnavailableError
from agent.outbox import aside, restore
from agent.outbox.store import Store
from agent.outbox.writer import Writer

if TYPE_CHECKING:
    from agent.outbox.salvage import Survivor

T = TypeVar("T")

_CHUNK_BYTES = 512 * 1024
_CHUNK_ROWS = 512
"""Bodies and rows restored in one transaction, so that events are stored in between."""

_RETRY_S = 1.0
_RETRIES = 60
"""How long, and how often, an outbox that fails or is full meanwhile is left alone. Not for ever: on
a full disk it is delivery that makes room, and that waits for us."""

log = structlog.get_logger()


async def salvage_damaged(writer: Writer) -> None:
    """Salvage what was set aside, now and whenever it happens, until cancelled."""
    while True:
        await writer.opening.damaged.wait()
        writer.opening.damaged.clear()
        for name in writer.opening.unsalvaged:
            await _salvage(writer, name)


async def _salvage(writer: Writer, name: str) -> None:
    try:
        counts = await _read_back(writer, name)
        aside.mark_salvaged(writer.path, name)
    except Exception:
        # Whatever it was, a bug in the reading of strange bytes, too: the agent has to run on. The
        # set stays where it is, and the next start tries again; to wait here would hold delivery.
        log.exception("outbox.salvage_failed", moved_to=name)
        with suppress(OutboxError):
            await writer.perform(lambda store: restore.give_up(store, name))
    else:
        log.warning("outbox.salvaged", moved_to=name, **counts)
    writer.salvaged(name)


async def _read_back(writer: Writer, name: str) -> dict[str, int]:
    from agent.outbox.salvage import survey  # noqa: PLC0415  # no daemon needs it in good times

    with ExitStack() as stack:
        path = writer.path.with_name(name)
        found = await asyncio.to_thread(stack.enter_context, survey(path))
        # First, for as long as they are not known apps are told to come again.
        await _patiently(writer, partial(restore.put_back_apps, apps=found.report.apps))
        writer.tokens_read(name)
        rows = found.rows()
        while chunk := await asyncio.to_thread(_chunk, rows):
            await _patiently(writer, partial(restore.put_back, name=name, survivors=chunk))
        report = found.report
        counts = await _patiently(writer, partial(restore.end, name=name, report=report))
        return {**counts, "pages": report.pages, "pages_damaged": report.pages_damaged}


async def _patiently(writer: Writer, verb: Callable[[Store], T]) -> T:
    """Run *verb*; an outbox that is full or fails is tried again for a while."""
    for _ in range(_RETRIES):
        try:
            return await writer.perform(verb)
        except (OutboxUnavailableError, OutboxFullError):
            await asyncio.sleep(_RETRY_S)
    return await writer.perform(verb)


def _chunk(rows: Iterator[Survivor]) -> list[Survivor]:
    chunk: list[Survivor] = []
    chunk_bytes = 0
    while chunk_bytes < _CHUNK_BYTES and len(chunk) < _CHUNK_ROWS:
        row = next(rows, None)
        if row is None:
            break
        chunk.append(row)
        chunk_bytes += len(row.body or b"")
    return chunk
