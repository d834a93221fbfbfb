"""The verbs that bring back what was salvaged of a damaged database (outbox.rescue).

Each can be repeated: a set whose salvage was cut off is read again from its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from agent.event import digest_of
from agent.outbox.apps import shared
from agent.outbox.ids import Id, id_of
from agent.outbox.records import Ack, App, State, label
from agent.outbox.store import Store

if TYPE_CHECKING:  # loaded only where a damaged database is read: see rescue
    from agent.outbox.salvage import Report, Survivor

_START_ABOVE = """
UPDATE ledger
   SET last_seq = :floor,
       indexed_upto = :floor
 WHERE last_seq < :floor
"""

_FOUND = """
INSERT INTO salvage (name, state, found_ms, floor)
VALUES (:name, 'running', :now_ms, :floor)
    ON CONFLICT DO NOTHING
"""

_UNSALVAGED = """
SELECT name
  FROM salvage
 WHERE state <> 'done'
 ORDER BY found_ms
"""

_HAS_SEQ = """
SELECT 1
  FROM event
 WHERE seq = :seq
"""

_RESTORE_EVENT = """
INSERT INTO event (seq, message_id, digest, state, accepted_ms, settled_ms, upstream, app)
VALUES (:seq, :message_id, :digest, :state, :accepted_ms, :settled_ms, :upstream, :app)
"""

_RESTORE_PENDING = """
INSERT INTO pending (seq, kind, lane, queued_ms, attempts, failing_since_ms, body, upstream)
VALUES (:seq, :kind, :lane, :queued_ms, :attempts, :failing_since_ms, :body, :upstream)
"""

_RESTORE_DEAD = """
INSERT INTO dead (seq, kind, lane, attempts, reason, status, answer, body, upstream)
VALUES (:seq, :kind, :lane, :attempts, :reason, :status, :answer, :body, :upstream)
"""

_COUNT_RESTORED = """
UPDATE ledger
   SET last_seq  = :last_seq,
       accepted  = accepted + :pending + :dead + :delivered,
       pending   = pending + :pending,
       dead      = dead + :dead,
       delivered = delivered + :delivered
"""

_NOTE_RESTORED = """
UPDATE salvage
   SET pending   = pending + :pending,
       dead      = dead + :dead,
       delivered = delivered + :delivered
 WHERE name = :name
"""

_INHERIT = """
UPDATE ledger
   SET accepted   = accepted + :delivered + :discarded,
       delivered  = delivered + :delivered,
       discarded  = discarded + :discarded,
       evicted    = evicted + :evicted,
       duplicates = duplicates + :duplicates,
       conflicts  = conflicts + :conflicts,
       paused     = MAX(paused, :paused),
       paused_upstreams = CASE paused_upstreams WHEN '' THEN :names ELSE paused_upstreams END
"""

_END_SALVAGE = """
UPDATE salvage
   SET state = :state,
       lost  = :lost
 WHERE name = :name
"""

_FLOOR = """
SELECT floor
  FROM salvage
 WHERE name = :name
"""

_IS_PENDING = """
SELECT 1
  FROM pending
 WHERE seq = :seq
"""

_SALVAGED = """
SELECT pending, dead, delivered
  FROM salvage
 WHERE name = :name
"""


def note_sets(store: Store, names: Sequence[str], *, now_ms: int, floor: int) -> list[str]:
    """Remember these damaged sets; return those to salvage, the oldest first.

    Where one is new, so is this database: from now on it gives seqs above *floor*, so that the ones
    of older databases stay free.
    """
    found = store.change_each(
        _FOUND, [{"name": name, "now_ms": now_ms, "floor": floor} for name in names]
    )
    if found > 0:
        store.last_seq = max(store.last_seq, floor)
        store.change(_START_ABOVE, floor=store.last_seq)
    return [name for (name,) in store.fetch(_UNSALVAGED) if name in names]


def put_back_apps(store: Store, apps: Sequence[App]) -> None:
    """Let the tokens be known again that were; one that was given or withdrawn here since stays so.

    Their events are counted as they come back.
    """
    for old in apps:
        new = store.apps.get(old.name)
        if new is None or _is_later(old, new):
            app = new or App(name=old.name, token_digest=None, created_ms=old.created_ms)
            store.apps.put(
                replace(
                    app,
                    token_digest=old.token_digest,
                    created_ms=old.created_ms,
                    revoked_ms=old.revoked_ms,
                )
            )


def _is_later(old: App, new: App) -> bool:
    """Return whether what *old* has of a token was written after what *new* has.

    It can be, where a second database was damaged before the first one was read back.
    """
    if new.token_digest is None or new.created_ms != old.created_ms:
        return new.token_digest is None or new.created_ms < old.created_ms
    return new.revoked_ms is None and old.revoked_ms is not None


def put_back(store: Store, name: str, survivors: Sequence[Survivor]) -> None:
    """Put back the events among *survivors* that are not known here, with the seqs they had."""
    ((floor,),) = store.fetch(_FLOOR, name=name)
    known = store.ids.find([_id(survivor) for survivor in survivors])
    taken: set[int] = set()
    rows: dict[State, list[dict[str, Any]]] = {"pending": [], "dead": [], "delivered": []}
    delivered: list[Ack] = []
    for survivor in survivors:
        seq = known.get(_id(survivor))
        if seq is None:
            row = _row(store, survivor, floor=floor, taken=taken)
            rows[survivor.state].append(row)
            known[_id(survivor)] = row["seq"]
        elif survivor.state == "delivered" and store.fetch(_IS_PENDING, seq=seq):
            # Sent again by its app meanwhile, or read as pending from an older set.
            delivered.append(Ack(seq))
    everything = [row for state in rows.values() for row in state]
    store.change_each(_RESTORE_EVENT, everything)
    store.change_each(_RESTORE_PENDING, rows["pending"])
    store.change_each(_RESTORE_DEAD, rows["dead"])
    store.backlogs.grow(row["upstream"] for row in rows["pending"])
    for state, some in rows.items():
        for share in shared((row["app"], row["body"] or b"") for row in some):
            store.apps.take_in(share, state, now_ms=max(row["accepted_ms"] for row in some))
    store.ids.index((id_of(row["upstream"], row["message_id"]), row["seq"]) for row in everything)
    counts = {state: len(some) for state, some in rows.items()}
    store.change(_COUNT_RESTORED, last_seq=store.last_seq, **counts)
    counts["delivered"] += len(delivered)
    store.change(_NOTE_RESTORED, name=name, **counts)
    # No event goes out before all is read, so none of these has.
    settled_ms = max((survivor.settled_ms or 0 for survivor in survivors), default=0)
    store.settle(delivered, now_ms=settled_ms, remember=True)


def _id(survivor: Survivor) -> Id:
    return id_of(survivor.upstream, survivor.message_id)


def _row(store: Store, survivor: Survivor, *, floor: int, taken: set[int]) -> dict[str, Any]:
    row = asdict(survivor)
    sane = 0 < survivor.seq <= floor and survivor.seq not in taken
    if not sane or store.fetch(_HAS_SEQ, seq=survivor.seq):
        # Damage has changed it: its place in the order is lost, the event is not.
        store.last_seq += 1
        row["seq"] = store.last_seq
    taken.add(row["seq"])
    if survivor.digest is None:
        row["digest"] = digest_of(survivor.body or b"")
    if row["queued_ms"] is None:
        row["queued_ms"] = survivor.accepted_ms
    return row


def end(store: Store, name: str, report: Report) -> dict[str, int]:
    """Take over the old counters, as far as they survived; return what was salvaged and lost."""
    ((pending, dead, delivered),) = store.fetch(_SALVAGED, name=name)
    counts = {"pending": pending, "dead": dead, "delivered": delivered, "lost": report.bodies_lost}
    ledger = report.ledger
    if ledger is not None:
        # What was delivered and forgotten since is in no row.
        forgotten = max(0, ledger.delivered - delivered)
        store.change(
            _INHERIT,
            delivered=forgotten,
            discarded=ledger.discarded,
            evicted=ledger.evicted,
            duplicates=ledger.duplicates,
            conflicts=ledger.conflicts,
            paused=ledger.paused,
            names=" ".join(sorted(map(label, ledger.paused_upstreams))),
        )
        missing = ledger.pending + ledger.dead - report.pending - report.dead
        counts["lost"] = max(counts["lost"], missing)
    store.change(_END_SALVAGE, name=name, state="done", lost=counts["lost"])
    return counts


def give_up(store: Store, name: str) -> None:
    """Remember that the set could not be read to its end; the next start tries again."""
    store.change(_END_SALVAGE, name=name, state="failed", lost=0)
