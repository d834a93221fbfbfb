"""Which apps there are, and what became of the events of each: the table `app`, and its copy in memory.

The counters change in the transactions that change the events, so that a start has none to count. An
event that came from no app costs nothing here, and there is a statement for each app that some came
from, not for each event.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Literal, NamedTuple

import msgspec

from agent.outbox.records import App, app_of

APPS = """
SELECT name, token_digest, created_ms, revoked_ms, accepted, delivered, pending, dead, discarded,
       body_bytes
  FROM app
 ORDER BY name
"""

_PUT = """
INSERT INTO app (name, token_digest, created_ms, revoked_ms, accepted, delivered, pending, dead,
                 discarded, body_bytes)
VALUES (:name, :token_digest, :created_ms, :revoked_ms, :accepted, :delivered, :pending, :dead,
        :discarded, :body_bytes)
    ON CONFLICT (name) DO UPDATE
   SET token_digest = excluded.token_digest,
       created_ms   = excluded.created_ms,
       revoked_ms   = excluded.revoked_ms,
       accepted     = excluded.accepted,
       delivered    = excluded.delivered,
       pending      = excluded.pending,
       dead         = excluded.dead,
       discarded    = excluded.discarded,
       body_bytes   = excluded.body_bytes
"""

# length() of a BLOB reads no page of it. The names are those of `event`.
_SHARES = """
SELECT event.app, COUNT(*), SUM(length(body))
  FROM (SELECT DISTINCT value AS seq FROM json_each(:seqs)) AS given
 CROSS JOIN {held} USING (seq)
 CROSS JOIN event USING (seq)
 WHERE event.app <> ''
 GROUP BY event.app
"""

_SHARES_PENDING = _SHARES.format(held="pending")
_SHARES_DEAD = _SHARES.format(held="dead")

Held = Literal["pending", "dead"]
Gone = Literal["delivered", "discarded"]


class Share(NamedTuple):
    """How much of some events came from one app."""

    app: str
    events: int
    body_bytes: int


def shared(bodies: Iterable[tuple[str, bytes]]) -> list[Share]:
    """Return how much of events given as (app, body) came from each app, but none."""
    found: dict[str, Share] = {}
    for app, body in bodies:
        if app:
            _, events, body_bytes = found.get(app, (app, 0, 0))
            found[app] = Share(app, events + 1, body_bytes + len(body))
    return list(found.values())


class Apps:
    """The apps, on the write connection.

    What a transaction changes holds for itself at once, for others once it is `committed`.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.known: Mapping[str, App] = {app.name: app for app in map(app_of, db.execute(APPS))}
        """By name. Another mapping after each change, so that other threads may read it."""
        self._changed: dict[str, App] = {}

    def get(self, name: str) -> App | None:
        return self._changed.get(name) or self.known.get(name)

    def held_bytes(self, name: str) -> int:
        app = self.get(name)
        return 0 if app is None else app.held_bytes

    def put(self, app: App) -> None:
        """Add *app*, or replace the one of its name."""
        self._db.execute(_PUT, asdict(app))
        self._changed[app.name] = app

    def issue(self, name: str, token_digest: bytes, *, now_ms: int) -> bool:
        """Let *name* be known by a token; return False if it is by another one already."""
        app = self.get(name)
        if app is not None and app.has_token:
            return False
        app = app or App(name=name, token_digest=None, created_ms=now_ms)
        self.put(replace(app, token_digest=token_digest, created_ms=now_ms, revoked_ms=None))
        return True

    def revoke(self, name: str, *, now_ms: int) -> bool:
        """Let the token of *name* be good for nothing; return False if it has none."""
        app = self.get(name)
        if app is None or not app.has_token:
            return False
        self.put(replace(app, revoked_ms=now_ms))
        return True

    def take_in(self, share: Share, state: Held | Gone, *, now_ms: int) -> None:
        """Count new events, which are in *state*; an app that is new begins at *now_ms*."""
        app = self.get(share.app) or App(name=share.app, token_digest=None, created_ms=now_ms)
        app = replace(app, accepted=app.accepted + share.events)
        self.put(_with(app, state, share, +1))

    def holds(self, state: Held) -> bool:
        """Return whether any events that are in *state* came from an app."""
        apps = {**self.known, **self._changed}.values()
        return any(app.pending if state == "pending" else app.dead for app in apps)

    def shares(self, seqs: Sequence[int], state: Held) -> list[Share]:
        """Return from which apps those of *seqs* came that are in *state*, as far as it is known."""
        if not self.holds(state):
            return []
        sql = _SHARES_PENDING if state == "pending" else _SHARES_DEAD
        rows = self._db.execute(sql, {"seqs": msgspec.json.encode(seqs).decode()})
        return [Share(*row) for row in rows]

    def move(self, shares: Iterable[Share], origin: Held, to: Held | Gone) -> None:
        """Count events that went from one state to another."""
        for share in shares:
            app = self.get(share.app)
            if app is not None:
                self.put(_with(_with(app, origin, share, -1), to, share, +1))

    def committed(self) -> None:
        if self._changed:
            self.known = {**self.known, **self._changed}
            self._changed = {}

    def rolled_back(self) -> None:
        self._changed = {}


def _with(app: App, state: Held | Gone, share: Share, sign: int) -> App:
    """Return *app* with the events of *share* counted in *state*, or no more."""
    events, body_bytes = sign * share.events, sign * share.body_bytes
    match state:
        case "pending":
            return replace(
                app, pending=app.pending + events, body_bytes=app.body_bytes + body_bytes
            )
        case "dead":
            return replace(app, dead=app.dead + events, body_bytes=app.body_bytes + body_bytes)
        case "delivered":
            return replace(app, delivered=app.delivered + events)
        case "discarded":
            return replace(app, discarded=app.discarded + events)
