"""What a person does with dead letters: put them back, or discard them for good.

The same functions serve the control API, and the command line when no daemon runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from agent.outbox import letters
from agent.outbox.reader import Reader
from agent.outbox.records import Selection
from agent.outbox.store import Store
from agent.outbox.writer import Writer

_CHUNK = 500
"""Dead letters handled in one transaction, so that events are stored and acked in between."""

_PAGE = 50
"""Dead letters read at once: they come with their bodies, of up to 5 MiB each."""


async def requeue(reader: Reader, writer: Writer, selection: Selection, *, now_ms: int) -> int:
    """Put the dead letters that *selection* means at the end of the queue; return how many."""
    return await _in_chunks(
        reader,
        writer,
        selection,
        lambda seqs: partial(letters.requeue, seqs=seqs, now_ms=now_ms),
    )


async def discard(reader: Reader, writer: Writer, selection: Selection) -> int:
    """Delete the dead letters that *selection* means; return how many."""
    return await _in_chunks(
        reader, writer, selection, lambda seqs: partial(letters.discard, seqs=seqs)
    )


async def _in_chunks(
    reader: Reader,
    writer: Writer,
    selection: Selection,
    verb: Callable[[list[int]], Callable[[Store], int]],
) -> int:
    # All are chosen before the first is changed: one that is requeued, refused again and so dead
    # again meanwhile would otherwise be met again, without end.
    seqs = await _chosen(reader, selection)
    changed = 0
    for start in range(0, len(seqs), _CHUNK):
        changed += await writer.perform(verb(seqs[start : start + _CHUNK]))
    return changed


async def _chosen(reader: Reader, selection: Selection) -> list[int]:
    seqs: list[int] = []
    while letters := await reader.select(
        "dead", selection, after=seqs[-1] if seqs else 0, limit=_PAGE
    ):
        seqs += [letter.seq for letter in letters]
    return seqs
