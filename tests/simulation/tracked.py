"""What the judge knows of each event and each request; and which events a request carries."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from simulation.scenario import Post

from agent.forward.disposition import Outcome
from agent.outbox.records import State


@dataclass(slots=True, eq=False)
class Tracked:
    """An event as the judge knows it. *state* is that of the last commit; None: not accepted yet."""

    post: Post
    message_id: str
    user: str
    body: bytes = b""
    seq: int = 0
    queued_s: float = 0.0
    state: State | None = None
    discarded: bool = False
    closed: bool = False
    """Whether nothing later of its user need wait for it: stored, refused, set aside or withdrawn."""
    left_s: float = 0.0
    """When it expired or was evicted, on the monotonic clock."""
    storings: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    not_before_s: float = 0.0
    """Until when its own backoff runs, on the monotonic clock."""
    failures: list[tuple[float, type[Outcome]]] = field(default_factory=list)
    """When and how it failed since it was queued last."""

    def attempts_since_queued(self) -> list[Attempt]:
        """Return the attempts but for those from before it was queued anew."""
        return [each for each in self.attempts if each.sent_s >= self.queued_s]

    def is_of_its_nature(self, now_s: float) -> bool:
        return self.post.until_s is None or now_s < self.post.until_s


@dataclass(slots=True, eq=False)
class Attempt:
    """One request, with the events it carries; *stored* are those the upstream took from it."""

    number: int
    life: int
    sent_s: float
    events: tuple[Tracked, ...]
    batched: bool
    outcome: Outcome | None = None
    wait_s: float | None = None
    """How long nothing would pass, as the upstream's Retry-After told."""
    stored: list[Tracked] = field(default_factory=list)


class _Named(msgspec.Struct, rename="camel"):
    message_id: str


class _Batch(msgspec.Struct):
    batch: list[msgspec.Raw]


_TRACK = b'{"type":"track",'


def carried(endpoint: str, body: bytes) -> list[tuple[str, bytes]]:
    """Return (messageId, bytes) of each event of a request; of a batch, as if it had gone alone."""
    if endpoint != "batch":
        return [(msgspec.json.decode(body, type=_Named).message_id, body)]
    items = [bytes(item) for item in msgspec.json.decode(body, type=_Batch).batch]
    return [
        (msgspec.json.decode(item, type=_Named).message_id, b"{" + item.removeprefix(_TRACK))
        for item in items
    ]
