"""What a seed stands for: how the agent is configured, what apps post, and what goes wrong when.

All of it is drawn before the run, from chance of its own, so that a change in the agent changes no
scenario. Sizes are skewed: most seeds are small, and few of everything meets few of everything.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import time
from typing import Literal

from simulation.virtual_time import World

from agent.forward.budget import Budget, Window
from agent.forward.disposition import GiveUp

URGENT = "urgent"
"""The name of the events that no budget keeps back."""

PERIOD_MIN, OPEN_MIN = 60, 24
"""Windows come every hour, for 24 minutes."""

WINDOWS = tuple(
    Window(time(minute // 60, minute % 60), time(minute // 60, minute % 60 + OPEN_MIN))
    for minute in range(0, 24 * 60, PERIOD_MIN)
)

Nature = Literal["good", "refused", "fails", "cuts", "disliked"]
"""What is about an event itself: fine; refused for ever; answered 500; breaks each connection that
carries it; disliked by a firewall (403)."""

Kind = Literal[
    "unreachable",  # the connection is refused, or the name not found
    "swallowed",  # packets vanish: connecting takes for ever
    "limited",  # 429 or 503 with Retry-After
    "busy",  # 502, 503 or 504 without a word
    "broken",  # 500 for all
    "slow",  # answers take longer, some longer than the time-out
    "cut_before",  # the connection breaks after sending, nothing is stored
    "cut_after",  # the same, but everything is
    "narrow",  # 413 of a proxy for all but small requests
    "gateway",  # 502 or 504 of a gateway that waited for the answer in vain: everything is, too
    "portal",  # a captive portal answers instead
    "revoked",  # 401 for all
    "moved",  # 404 for all
    "unreadable",  # the outbox cannot be read
]

KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]

Deed = Literal[
    "crash", "restart", "suspend", "set_clock", "pause", "flush", "expire", "evict", "requeue"
]

DEEDS: tuple[Deed, ...] = Deed.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How the agent is configured."""

    concurrency: int
    ordered: bool
    batch: int
    """How many events one request may carry."""
    names: bool
    """Whether the upstream says which event of a batch it refuses."""
    base_s: float
    cap_s: float
    hold_probe_s: float
    budget: Budget
    window: int | None
    """How many events the agent holds in memory; None: as many as it is built for."""
    give_up: GiveUp
    timeout_s: float
    connect_timeout_s: float
    remembers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """An event that an app hands in. It is of its *nature* until *until_s*; None: for ever."""

    at_s: float
    number: int
    user: int
    name: str
    size: int
    nature: Nature
    until_s: float | None
    again_s: float | None
    """When the app posts it once more, as if it had not heard the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong from *start_s* to *end_s* (true time), for a *share* of the requests."""

    kind: Kind
    start_s: float
    end_s: float
    share: float
    style: int
    """Chooses among the ways in which it shows."""
    period_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stroke:
    """What happens to the machine at once; *for_s* is how long it is down, asleep or paused."""

    deed: Deed
    at_s: float
    for_s: float
    style: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A seed's whole story. After *calm_s* nothing goes wrong any more."""

    choices: Choices
    posts: tuple[Post, ...]
    faults: tuple[Fault, ...]
    strokes: tuple[Stroke, ...]
    calm_s: float
    commit_s: float
    latency_s: float


def draw(world: World) -> Scenario:
    """Return the scenario of the world's seed."""
    rng = world.rng("scenario")
    cap_s = rng.choice((5.0, 20.0, 60.0, 300.0))
    choices = Choices(
        concurrency=rng.choice((1, 2, 4, 8, 8, 8, 16)),
        ordered=rng.random() < 0.9,
        batch=rng.choice((1, 1, 1, 2, 5, 50)),
        names=rng.random() < 0.5,
        base_s=rng.choice((0.2, 1.0, 1.0, 2.0)),
        cap_s=cap_s,
        hold_probe_s=rng.choice((15.0, 60.0)),
        budget=rng.choice(
            (
                *([Budget()] * 6),
                Budget(windows=WINDOWS),
                Budget(events_per_s=rng.choice((0.5, 2.0, 20.0))),
            )
        ),
        window=rng.choice((None, None, 4, 6, 20)),
        give_up=GiveUp(
            attempts=rng.choice((3, 5, 8)),
            after_s=cap_s * rng.choice((0.0, 2.0, 10.0)),
            unproven_after_s=cap_s * rng.choice((20.0, 40.0)),
        ),
        timeout_s=rng.choice((5.0, 30.0)),
        connect_timeout_s=rng.choice((3.0, 10.0)),
        remembers=rng.random() < 0.9,
    )
    start_s = world.now_s
    span_s = cap_s * rng.uniform(2.0, 12.0)
    end_s = start_s + span_s
    posts = _posts(rng, start_s, span_s)

    def moment_s() -> float:
        """Return when something goes wrong: mostly while there is something to do."""
        if rng.random() < 0.4:
            return start_s + span_s * rng.random()
        return min(rng.choice(posts).at_s + rng.choice((0.1, 1.0, 10.0)) * rng.random(), end_s)

    return Scenario(
        choices=choices,
        posts=posts,
        faults=_faults(rng, moment_s, end_s, span_s),
        strokes=_strokes(rng, moment_s, span_s),
        calm_s=end_s,
        commit_s=rng.choice((0.002, 0.01, 0.1)),
        latency_s=rng.choice((0.02, 0.05, 0.3)),
    )


def _posts(rng: random.Random, start_s: float, span_s: float) -> tuple[Post, ...]:
    users = 1 + int(rng.expovariate(0.2))
    natures: list[Nature] = ["good"] * rng.choice((5, 20, 60))
    natures += rng.sample(["refused", "fails", "cuts", "disliked"], k=rng.randrange(4))
    posts: list[Post] = []
    bursts = 1 + int(rng.expovariate(0.25))
    for _ in range(bursts):
        at_s = start_s + span_s * rng.random() * 0.9
        gap_s = rng.choice((0.0, 0.01, 0.5, 5.0))
        for _ in range(1 + min(120, int(rng.expovariate(0.13)))):
            at_s += gap_s * rng.random()
            nature = rng.choice(natures)
            # Only what is answered about the event can set it aside for good.
            lasts = nature == "refused" or (nature == "fails" and rng.random() < 0.3)
            posts.append(
                Post(
                    at_s=min(at_s, start_s + span_s),
                    number=len(posts),
                    name=URGENT if rng.random() < 0.1 else "e",
                    user=int(users * rng.random() ** 2),
                    size=rng.choice((10, 10, 10, 10, 10, 10, 200, 200, 5000)),
                    nature=nature,
                    until_s=None if lasts else start_s + span_s * rng.random(),
                    again_s=start_s + span_s * rng.random() if rng.random() < 0.05 else None,
                )
            )
    return tuple(posts)


def _faults(
    rng: random.Random, moment_s: Callable[[], float], last_s: float, span_s: float
) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    for _ in range(min(8, int(rng.expovariate(0.4)))):
        kind = rng.choice(KINDS)
        begin_s = moment_s()
        end_s = min(begin_s + span_s * rng.random() ** 2, last_s)
        fault = Fault(
            kind=kind,
            start_s=begin_s,
            end_s=end_s,
            share=rng.choice((1.0, 1.0, 0.5, 0.1)),
            style=rng.randrange(1_000),
            period_s=rng.choice((2.0, 10.0, 60.0)),
        )
        faults += _flaps(rng, fault) if rng.random() < 0.25 else [fault]
    return tuple(faults)


def _flaps(rng: random.Random, fault: Fault) -> list[Fault]:
    """Return *fault* as one that comes and goes."""
    flaps: list[Fault] = []
    at_s = fault.start_s
    pace_s = (fault.end_s - fault.start_s) / rng.choice((3, 10, 30))
    while at_s < fault.end_s and len(flaps) < 60:
        end_s = min(at_s + pace_s * rng.random(), fault.end_s)
        flaps.append(
            Fault(
                kind=fault.kind,
                start_s=at_s,
                end_s=end_s,
                share=fault.share,
                style=fault.style,
                period_s=fault.period_s,
            )
        )
        at_s = end_s + pace_s * rng.random()
    return flaps


def _strokes(
    rng: random.Random, moment_s: Callable[[], float], span_s: float
) -> tuple[Stroke, ...]:
    return tuple(
        Stroke(
            deed=rng.choice((*DEEDS, "crash", "crash")),
            at_s=moment_s(),
            for_s=rng.choice((0.5, 30.0, span_s * rng.random())),
            style=rng.randrange(1_000),
        )
        for _ in range(min(8, int(rng.expovariate(0.4))))
    )
