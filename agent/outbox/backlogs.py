"""How many events are pending for each named upstream: counted at the start, then kept.

To count a million each time somebody asks would take too long. The default upstream has no name, and
its events cost nothing here.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

_COUNTS = """
SELECT upstream, COUNT(*)
  FROM pending
 WHERE upstream <> ''
 GROUP BY upstream
"""

# Of `event`, whose rows are small: in `pending` the name stands behind the body.
_COUNTS_AMONG = """
SELECT event.upstream, COUNT(*)
  FROM (SELECT DISTINCT value AS seq FROM json_each(:seqs)) AS given
 CROSS JOIN pending ON pending.seq = given.seq
 CROSS JOIN event ON event.seq = given.seq
 WHERE event.upstream <> ''
 GROUP BY event.upstream
"""


class Backlogs:
    """The counts, on the write connection. What a transaction changes shows once it is `committed`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.pending: Mapping[str, int] = dict(db.execute(_COUNTS).fetchall())
        """By name, without those that have none; the default upstream is never among them.

        Another mapping after each change, so that other threads may read it.
        """
        self._change: Counter[str] = Counter()
        """What the open transaction adds and takes away."""

    def grow(self, upstreams: Iterable[str]) -> None:
        """Count events that became pending, by their upstreams; the default one's are passed over."""
        self._change.update(name for name in upstreams if name)

    def shrink(self, seqs: Sequence[int]) -> None:
        """Take off those of *seqs* that are pending. To be called before they leave the queue."""
        if self.pending or self._change:
            values = {"seqs": msgspec.json.encode(seqs).decode()}
            self._change.subtract(dict(self._db.execute(_COUNTS_AMONG, values).fetchall()))

    def committed(self) -> None:
        """The transaction holds."""
        if self._change:
            pending = Counter(self.pending)
            pending.update(self._change)
            self.pending = +pending
            self._change = Counter()

    def rolled_back(self) -> None:
        """The transaction never was."""
        self._change = Counter()
