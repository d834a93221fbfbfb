"""The verbs on dead letters: back to the queue, or gone for good. `Store.settle` and `expire` make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.outbox.store import Store

_MARK_REQUEUED = """
UPDATE event
   SET seq = :new_seq,
       state = 'pending',
       settled_ms = NULL
 WHERE seq = :seq
   AND state = 'dead'
"""

_MOVE_REQUEUED = """
INSERT INTO pending (seq, kind, lane, queued_ms, body, upstream)
SELECT :new_seq, kind, lane, :now_ms, body, upstream
  FROM dead
 WHERE seq = :seq
"""

_DELETE_DEAD = """
DELETE FROM dead
 WHERE seq = :seq
"""

_COUNT_REQUEUED = """
UPDATE ledger
   SET last_seq = :last_seq,
       dead     = dead - :n,
       pending  = pending + :n
"""

_COUNT_DISCARDED_DEAD = """
UPDATE ledger
   SET dead      = dead - :n,
       discarded = discarded + :n
"""


def requeue(store: Store, seqs: Sequence[int], *, now_ms: int) -> int:
    """Put dead letters back, at the end of the queue in the order given; return how many."""
    rows: list[dict[str, Any]] = []
    for event_id, seq in store.ids_of(dict.fromkeys(seqs), "dead"):
        store.last_seq += 1
        store.ids.move(event_id, seq, store.last_seq)
        if not isinstance(event_id, str):
            store.backlogs.grow([event_id[0]])
        rows.append({"seq": seq, "new_seq": store.last_seq, "now_ms": now_ms})
    store.apps.move(store.apps.shares([row["seq"] for row in rows], "dead"), "dead", "pending")
    store.change_each(_MARK_REQUEUED, rows)
    store.change_each(_MOVE_REQUEUED, rows)
    store.change_each(_DELETE_DEAD, rows)
    store.change(_COUNT_REQUEUED, last_seq=store.last_seq, n=len(rows))
    return len(rows)


def discard(store: Store, seqs: Sequence[int]) -> int:
    """Delete dead letters for good; return how many."""
    store.apps.move(store.apps.shares(seqs, "dead"), "dead", "discarded")
    discarded = store.forget(seqs, "dead")
    store.change_each(_DELETE_DEAD, [{"seq": seq} for seq in seqs])
    store.change(_COUNT_DISCARDED_DEAD, n=discarded)
    return discarded
