"""The simulated upstream keeps the contract, for batches, too."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from simulation.judge import Judge
from simulation.network import Upstream, Weather
from simulation.scenario import Nature, Post, draw
from simulation.tracked import Attempt, Tracked, carried
from simulation.virtual_time import World

from agent.event import Event
from agent.forward.disposition import Response
from agent.outbox.records import Appended


def body_of(name: str) -> bytes:
    return msgspec.json.encode({"messageId": name, "event": "e", "userId": "u"})


def batch_of(names: Sequence[str]) -> bytes:
    items = b",".join(b'{"type":"track",' + body_of(name)[1:] for name in names)
    return b'{"batch":[%b]}' % items


def answered(natures: Sequence[Nature]) -> tuple[Response, Attempt]:
    """Send a batch of events of these *natures*; return the answer and what was stored."""
    world = World(1)
    judge = Judge(world, draw(world).choices, lambda: None, lambda: None)
    names = [f"m{number}" for number in range(len(natures))]
    for number, nature in enumerate(natures):
        post = Post(
            at_s=0.0,
            number=number,
            user=0,
            name="e",
            size=0,
            nature=nature,
            until_s=None,
            again_s=None,
        )
        judge.books.tracked[names[number]] = Tracked(post=post, message_id=names[number], user="u")
    events = [
        Event(message_id=name, kind="track", lane=1, digest=b"", received_ms=0, body=body_of(name))
        for name in names
    ]
    judge.books.stored(events, [Appended.STORED] * len(events), first_seq=1)
    body = batch_of(names)
    attempt = judge.sent("batch", body)
    response, _ = Upstream(world, Weather(world, ()), judge, names=True).answer(attempt, body)
    return response, attempt


def stored(attempt: Attempt) -> list[str]:
    return [each.message_id for each in attempt.stored]


def test_a_batch_carries_the_bytes_that_were_accepted() -> None:
    assert carried("batch", batch_of(["a", "b"])) == [("a", body_of("a")), ("b", body_of("b"))]
    assert carried("track", body_of("a")) == [("a", body_of("a"))]


def test_a_good_batch_is_stored_in_its_order() -> None:
    response, attempt = answered(["good", "good", "good"])
    assert (response.status, stored(attempt)) == (204, ["m0", "m1", "m2"])


def test_one_refused_event_refuses_its_batch_and_is_named() -> None:
    response, attempt = answered(["good", "refused", "good"])
    assert (response.status, stored(attempt)) == (400, [])
    assert b"body/batch/1 must" in response.body


def test_a_batch_that_fails_is_stored_in_part() -> None:
    response, attempt = answered(["good", "fails", "good"])
    assert (response.status, stored(attempt)) == (500, ["m0"])
