"""What the daemon had promised by each point of a recording, and whether an outbox keeps it."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import witness
from faults.syscalls import Operation, Received, Sent

_EVENTS = """
SELECT event.message_id,
       event.state,
       COALESCE(pending.body, dead.body)
  FROM event
  LEFT JOIN pending ON pending.seq = event.seq
  LEFT JOIN dead    ON dead.seq = event.seq
"""

_TRACK = b"POST /api/public/apps/track "
_DISCARD = b"POST /api/agent/dead/discard "

BEFORE_ALL = -1
"""The index of what held before the first operation."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(slots=True)
class Promises:
    """By messageId: from which 0-based operation on something holds."""

    posted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The events, as the apps wrote them."""
    acknowledged: dict[str, int] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)
    """The upstream's answer was read: only now may the outbox let the body go."""
    discarded: dict[str, int] = field(default_factory=dict)
    """A person's wish to discard it was read: from now on it may be gone."""
    _sound: set[bytes] = field(default_factory=set)
    """Bodies found in an outbox that say what was posted."""

    def hear(self, request: bytes, point: int) -> None:
        """Take note of what an app or a person asked for, once the *request* is whole."""
        if not (body := _body(request)):
            return
        if request.startswith(_TRACK):
            event = json.loads(body)
            self.posted[event["messageId"]] = event
        elif request.startswith(_DISCARD):
            for message_id in json.loads(body)["messageIds"]:
                self.discarded.setdefault(message_id, point)

    def problems(self, outbox: Path, point: int) -> list[str]:
        """Return what is lost or corrupt in *outbox* after a power cut behind operation *point*."""
        acknowledged = _until(self.acknowledged, point)
        try:
            with closing(_connect(outbox)) as db:
                (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
                events = list(db.execute(_EVENTS)) if tables else []
                flaws = witness.flaws(outbox) if tables else []
        except sqlite3.DatabaseError as exc:
            return [f"corrupt: {exc}"]
        found = [f"corrupt: {flaw}" for flaw in flaws]
        known = {message_id for message_id, _, _ in events}
        if lost := acknowledged - known - _until(self.discarded, point):
            found.append(f"lost: {_some(lost)}")
        settled = {message_id for message_id, state, _ in events if state == "delivered"}
        if early := settled - _until(self.delivered, point):
            found.append(f"lost: delivered without an answer of the upstream: {_some(early)}")
        spoilt = {
            message_id
            for message_id, state, body in events
            if state != "delivered" and not self._is_sound(message_id, body)
        }
        if spoilt:
            found.append(f"corrupt: not what was posted: {_some(spoilt)}")
        return found

    def _is_sound(self, message_id: str, body: bytes | None) -> bool:
        """Return whether *body* is the event that was posted; the agent may only add to it."""
        if body is None:
            return False
        if body not in self._sound:
            try:
                stored = json.loads(body)
            except ValueError:
                return False
            posted = self.posted[message_id]
            if stored["messageId"] != message_id or not posted.items() <= stored.items():
                return False
            self._sound.add(body)
        return True


def _connect(outbox: Path) -> sqlite3.Connection:
    """Open *outbox* after a power cut.

    To read alone where that recovers it, too: who leaves last then does not checkpoint, which
    would take most of the time. Rolling back a journal, or making a database, is writing.
    """
    if not outbox.exists() or outbox.with_name(f"{outbox.name}-journal").exists():
        return sqlite3.connect(outbox)
    return sqlite3.connect(f"{outbox.as_uri()}?mode=ro", uri=True)


def _until(facts: dict[str, int], point: int) -> set[str]:
    return {message_id for message_id, since in facts.items() if since <= point}


def _some(ids: set[str]) -> str:
    return f"{len(ids)} events, such as {min(ids)}"


def promised(operations: Sequence[Operation], *, port: int) -> Promises:
    """Return what a daemon that listens on *port* promised, from what it read and wrote."""
    promises = Promises()
    requests: defaultdict[str, bytes] = defaultdict(bytes)
    """By connection: what was said on it since the last answer."""
    for point, operation in enumerate(operations):
        if not isinstance(operation, Sent | Received):
            continue
        name, data = operation.connection, operation.data
        serves = name.partition("->")[0].endswith(f":{port}")
        if not data:  # closed: another connection may get the same name
            requests.pop(name, None)
        elif serves == isinstance(operation, Received):
            requests[name] += data
            if serves:
                promises.hear(requests[name], point)
        elif data.startswith(b"HTTP/1.1 "):
            request = requests.pop(name, b"")
            if data.startswith(b"HTTP/1.1 204") and request.startswith(_TRACK):
                known = promises.acknowledged if serves else promises.delivered
                known.setdefault(json.loads(_body(request))["messageId"], point)
    return promises


def _body(request: bytes) -> bytes:
    """Return the body, empty while it is not whole."""
    head, _, body = request.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return body if length and len(body) == int(length[1]) else b""
