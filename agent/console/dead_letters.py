"""What a person does with dead letters: put them back, or discard them for good.

The same functions serve the control API, and the command line when no daemon runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from agent.outbox.reader import Reader
from agent.outbox.records import Selection
from agent.outbox.store import Store
from agent.outbox.writer import Writer

_CHUNK = 500
"""Dead letters handled in one transaction, so that events are stored and acked in between."""


async def requeue(reader: Reader, writer: Writer, selection: Selection, *, now_ms: int) -> int:
    """Put the dead letters that *selection* means at the end of the queue; return how many."""

    def verb(seqs: list[int]) -> Callable[[Store], Awaitable[int]]:
        return lambda store: store.requeue(seqs, now_ms=now_ms)

    return await _in_chunks(reader, writer, selection, verb)


async def discard(reader: Reader, writer: Writer, selection: Selection) -> int:
    """Delete the dead letters that *selection* means; return how many."""

    def verb(seqs: list[int]) -> Callable[[Store], Awaitable[int]]:
        return lambda store: store.discard(seqs)

    return await _in_chunks(reader, writer, selection, verb)


async def _in_chunks(
    reader: Reader,
    writer: Writer,
    selection: Selection,
    verb: Callable[[list[int]], Callable[[Store], Awaitable[int]]],
) -> int:
    changed, after = 0, 0
    while letters := await reader.select("dead", selection, after=after, limit=_CHUNK):
        after = letters[-1].seq
        changed += await writer.perform(verb([letter.seq for letter in letters]))
    return changed
