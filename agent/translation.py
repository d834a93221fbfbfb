"""A configuration in the words of each part of the daemon: terms, guard, plan, target, and so on. Pure.

The parts know no `Settings`, and settings know no part; both are known here alone. The daemon asks
at the start, and again for a configuration read anew, so that both go by the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent.config.loaded import Loaded
from agent.contract import Terms
from agent.forward.backoff import Backoff
from agent.forward.budget import Budget, Window
from agent.forward.disposition import GiveUp
from agent.forward.plan import Plan, Target
from agent.ingest.callers import Callers
from agent.ingest.destinations import Destinations
from agent.ingest.guard import Guard
from agent.outbox.records import Policy, Quotas, Retention
from agent.redaction import MACHINE_ID, added_by, refinement
from agent.settings import Settings
from agent.units import time_window


def terms(loaded: Loaded) -> Terms:
    """Return what events are read by: their limits, and what is dropped, hashed or added."""
    settings = loaded.settings
    redact = settings.redact
    agent = added_by(settings.context.agent)
    if loaded.machine_id:
        agent[MACHINE_ID] = loaded.machine_id
    return Terms(
        max_body_bytes=settings.ingest.max_body,
        refine=refinement(drop=redact.drop, hashed=redact.hash, key=redact.key, agent=agent),
    )


def callers(loaded: Loaded) -> Callers:
    """Return who is known without a token, and whether one is required."""
    return Callers(users=loaded.app_users, require_token=loaded.settings.ingest.require_token)


def destinations(
    loaded: Loaded, running: Iterable[str], app_keys: Mapping[str, str]
) -> Destinations:
    """Return where events go among the *running* upstreams; *app_keys* were claimed until now."""
    names = tuple(name for name in running if name)
    # One that the configuration has no more goes on to the next start, and its apps with it.
    kept = {digest: name for digest, name in app_keys.items() if name in names}
    left = {digest: name for digest, name in kept.items() if name not in loaded.app_keys.values()}
    return Destinations(names, {**left, **loaded.app_keys}, loaded.unknown_app_keys)


def policy(settings: Settings, quotas: Quotas) -> Policy:
    """Return what the outbox may hold, of each app as *quotas* say, and what gives way."""
    return Policy(
        max_bytes=int(settings.outbox.max_size),
        evicts=settings.outbox.when_full == "drop_oldest",
        remember=settings.outbox.delivered_retention > 0,
        quotas=quotas,
    )


def guard(loaded: Loaded) -> Guard:
    """Return who may speak to the agent at all."""
    ingest = loaded.settings.ingest
    return Guard(
        allowed_hosts=frozenset(ingest.allowed_hosts),
        allowed_origins=frozenset(ingest.allowed_origins),
        max_body_bytes=ingest.max_body,
        socket_users=loaded.socket_users,
    )


def retention(settings: Settings) -> Retention:
    """Return how long the outbox keeps what."""
    return Retention(
        max_age_s=settings.outbox.max_age, delivered_s=settings.outbox.delivered_retention
    )


def plan(settings: Settings, name: str) -> Plan:
    """Return how to forward to the upstream of that name."""
    forward = settings.forward
    return Plan(
        concurrency=forward.concurrency,
        ordered=forward.order == "per_user",
        backoff=Backoff(base_s=forward.backoff_base, cap_s=forward.backoff_max),
        give_up=GiveUp(
            attempts=forward.max_attempts,
            after_s=forward.give_up_after,
            unproven_after_s=forward.give_up_unproven_after,
        ),
        hold_probe_s=forward.hold_probe,
        batch=forward.batch_events if settings.upstream_of(name).mode == "batch" else 1,
        budget=Budget(
            events_per_s=forward.max_events_per_s,
            bytes_per_s=forward.max_bytes_per_s,
            bytes_per_day=forward.max_bytes_per_day,
            windows=tuple(Window(*time_window(window)) for window in forward.windows),
        ),
        urgent=forward.always,
    )


def target(settings: Settings, name: str) -> Target:
    """Return where and how to send what is for the upstream of that name, which has a key."""
    upstream = settings.upstream_of(name)
    if upstream.write_key is None:
        raise AssertionError("an upstream without its key counts as not configured")
    return Target(
        url=upstream.url,
        authorization=upstream.write_key.authorization,
        bare_key=upstream.write_key.bare,
        connect_timeout_s=upstream.connect_timeout,
        timeout_s=upstream.timeout,
        ca_file=upstream.ca_file,
        client_cert=upstream.client_cert,
        client_key=upstream.client_key,
        proxy=upstream.proxy or None,
    )


def urls(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """Return the URL of each upstream of *names*, for people to see."""
    return {name: settings.upstream_of(name).url for name in names}
