"""What is sent together, and how it is parted when the upstream refuses the whole. Pure.

A claim is made once and keeps its members: whoever has stored it and could not say so may know it
again by them. It shares no user with another claim, so the order of each user is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from agent.outbox.records import Head


class Claim(msgspec.Struct, frozen=True):
    """Events of one request, each user's in order. *key* names it as long as it fails."""

    heads: tuple[Head, ...]
    key: int

    @classmethod
    def of(cls, heads: list[Head]) -> Claim:
        return cls(tuple(heads), heads[0].seq)

    def holds(self, seq: int) -> bool:
        return any(head.seq == seq for head in self.heads)

    def without(self, gone: Collection[Head]) -> Claim:
        """Return the claim of those that are left; it may hold none."""
        left = tuple(head for head in self.heads if head not in gone)
        return msgspec.structs.replace(self, heads=left)

    def tried(self, now_ms: int) -> Claim:
        """Return the claim of one event as the outbox has that once a failed attempt is recorded."""
        (head,) = self.heads
        since_ms = now_ms if head.failing_since_ms is None else head.failing_since_ms
        tried = msgspec.structs.replace(head, attempts=head.attempts + 1, failing_since_ms=since_ms)
        return msgspec.structs.replace(self, heads=(tried,))


def part(
    claim: Claim, lane_of: Callable[[Head], int], *, at: int | None
) -> tuple[list[Claim], list[Head]]:
    """Part a refused claim of several: return what to send next, and what has to wait behind that.

    Where the answer names the event *at* that index, it goes first and alone; if events of its user
    come before it, those do. Otherwise it is halved. What waits is of users in the first part.
    """
    users: dict[int, list[Head]] = {}
    for head in claim.heads:
        users.setdefault(lane_of(head), []).append(head)
    if at is not None and at < len(claim.heads):
        suspect = claim.heads[at]
        own = users.pop(lane_of(suspect))
        first, behind = _before_or_at(own, own.index(suspect))
        rest = [head for head in claim.heads if lane_of(head) in users]
        return [Claim.of(heads) for heads in (first, rest) if heads], behind
    if len(users) == 1:
        middle = len(claim.heads) // 2
        return [Claim.of(list(claim.heads[:middle]))], list(claim.heads[middle:])
    return [Claim.of(half) for half in _halves(list(users.values()))], []


def _before_or_at(own: list[Head], suspect: int) -> tuple[list[Head], list[Head]]:
    cut = suspect or 1
    return own[:cut], own[cut:]


def _halves(users: list[list[Head]]) -> tuple[list[Head], list[Head]]:
    """Part whole users, at about half of the bytes: it may be the size that was refused."""
    whole = sum(head.body_bytes for own in users for head in own)
    first: list[Head] = list(users[0])
    cut = 1
    while cut < len(users) - 1 and 2 * sum(head.body_bytes for head in first) < whole:
        first += users[cut]
        cut += 1
    return first, [head for own in users[cut:] for head in own]
