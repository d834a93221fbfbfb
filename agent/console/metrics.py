"""GET /metrics: the numbers of `status` in the text format of Prometheus, by its own library.

Counters are of the outbox, so they go on over restarts; after a damaged outbox was replaced they
begin anew. No label tells of a user, an event or a key; what has the label `app` is there for each app.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from agent.console.apps import AppStatus
from agent.console.status import State, Status

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_COUNTERS = {
    "accepted": "Events that were stored and answered 204.",
    "delivered": "Events that the upstream has taken.",
    "discarded": "Events deleted by a person, or by when_full = drop_oldest.",
    "evicted": "The part of the discarded that drop_oldest took.",
    "duplicates": "Events posted again under a known messageId.",
    "conflicts": "The part of the duplicates whose body differed.",
    "ambiguous": "Events sent again although they may have arrived.",
}

_GAUGES = {
    "events_pending": "Events that wait.",
    "events_dead": "Dead letters.",
    "oldest_pending_age_seconds": "How long the oldest of the waiting events has waited.",
    "requests_in_flight": "Requests to the upstream under way.",
    "requests_limit": "How many there may be now.",
    "parked_users": "Users who wait behind a failing event.",
    "outbox_bytes": "Size of the database.",
    "outbox_wal_bytes": "Size of its write-ahead log.",
    "outbox_max_bytes": "What outbox.max_size lets the database grow to.",
    "outbox_failed": "1 while nothing can be written.",
    "outbox_full": "1 while events are refused for want of room.",
}


def exposition(status: Status) -> bytes:
    """Return *status* as Prometheus reads it."""
    registry = CollectorRegistry()
    registry.register(_Once(status))
    return generate_latest(registry)


_OF_APPS = {
    "pending": "Events of an app that wait.",
    "dead": "Dead letters of an app.",
    "bytes": "What the outbox holds of an app.",
    "max_bytes": "What it may hold of an app that has a quota.",
}


def _of_apps(apps: Iterable[AppStatus]) -> Iterator[Metric]:
    accepted = CounterMetricFamily(
        "tranthor_agent_app_events_accepted", "Events of an app that were stored.", labels=["app"]
    )
    gauges = {
        name: GaugeMetricFamily(f"tranthor_agent_app_{name}", text, labels=["app"])
        for name, text in _OF_APPS.items()
    }
    for app in apps:
        accepted.add_metric([app.name], app.accepted)
        for name, gauge in gauges.items():
            value = getattr(app, name)
            if value is not None:
                gauge.add_metric([app.name], float(value))
    yield from (accepted, *gauges.values())


class _Once(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status, outbox = self._status, self._status.outbox
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(
                f"tranthor_agent_events_{name}", text, value=getattr(status, name)
            )
        values = (
            status.pending,
            status.dead,
            status.oldest_pending_age_s or 0,
            status.in_flight,
            status.limit,
            status.parked_users,
            outbox.bytes,
            outbox.wal_bytes,
            outbox.max_bytes,
            outbox.fault is not None,
            outbox.full is not None,
        )
        for (name, text), value in zip(_GAUGES.items(), values, strict=True):
            yield GaugeMetricFamily(f"tranthor_agent_{name}", text, value=float(value))
        state = GaugeMetricFamily(
            "tranthor_agent_state", "1 for the state in force.", labels=["state"]
        )
        for each in get_args(State):
            state.add_metric([each], float(each == status.state))
        yield state
        yield from _of_apps(status.apps)
        build = GaugeMetricFamily("tranthor_agent_info", "1, with the version.", labels=["version"])
        build.add_metric([status.version], 1)
        yield build
