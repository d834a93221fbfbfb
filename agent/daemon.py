"""The daemon: what is made of what, in which order it starts, and how it ends.

    outbox (lock, recovery, migration) ⊃ writer ⊃ forwarder ⊃ salvage, upkeep ⊃ server ⊃ READY

Nesting is shutdown order: the server stops accepting and finishes its answers, the forwarder ends
what is in flight, the writer commits what is queued, checkpoints and closes. Knows no details.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Coroutine, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import structlog

from agent import __version__
from agent.clock import Clock, SystemClock
from agent.config import Loaded
from agent.console.control import PREFIX, Control
from agent.errors import OutboxError
from agent.forward.backoff import Backoff
from agent.forward.disposition import GiveUp
from agent.forward.forwarder import Forwarder, Plan, forwarding
from agent.forward.link import watching
from agent.forward.upstream import Target, Upstream, open_upstream
from agent.ingest.guard import Guard
from agent.ingest.routes import Mount, Routes
from agent.ingest.server import serving
from agent.outbox.reader import Reader, open_own_reader
from agent.outbox.rescue import salvage_damaged
from agent.outbox.upkeep import Retention, keep_up
from agent.outbox.writer import Policy, Writer, open_writer
from agent.settings import Settings
from agent.systemd import Notifier, WatchdogGate, inherited_sockets, watchdog_interval_s

STATUS_INTERVAL_S = 10.0
"""How often the service manager's one-line status is brought up to date."""

_STALL_S = 20.0
"""A writer that has work and commits nothing for so long hangs; commits take milliseconds."""

log = structlog.get_logger()


async def run(loaded: Loaded, environ: MutableMapping[str, str]) -> None:
    """Run the agent until SIGTERM or SIGINT. Raises `AgentError` if it cannot start."""
    settings, clock = loaded.settings, SystemClock()
    notifier = Notifier.from_environ(environ)
    interrupted = asyncio.Event()
    _stop_on_signals(interrupted)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        writer = await enter(open_writer(settings.outbox.path, _policy(settings), clock))
        reader = await enter(open_own_reader(settings.outbox.path, on_damage=writer.suspect))
        # People's searches have a connection of their own: they must not hold up delivery.
        searcher = await enter(open_own_reader(settings.outbox.path, on_damage=writer.suspect))
        unconfigured = loaded.missing()
        forwarder = Forwarder(
            writer=writer,
            reader=reader,
            upstream=None if unconfigured else await enter(_upstream(settings, clock)),
            plan=_plan(settings),
            clock=clock,
            rng=random.Random(),  # noqa: S311  # spreads load, guards nothing
            unconfigured=unconfigured or "",
            paused=(await reader.ledger()).paused,
        )
        await enter(forwarding(forwarder))
        stack.enter_context(watching(forwarder.link_changed))
        await enter(_background(salvage_damaged(writer)))
        await enter(_background(keep_up(writer, clock, _retention(settings))))
        control = Control(
            reader=searcher,
            writer=writer,
            link=forwarder,
            clock=clock,
            upstream=settings.upstream.url,
            max_bytes=int(settings.outbox.max_size),
        )
        addresses = await enter(
            _serving(settings, _routes(settings, writer, clock, control), environ)
        )
        await enter(_background(_report(notifier, reader, forwarder)))
        await enter(_background(_feed_watchdog(notifier, writer, clock, environ)))
        log.info(
            "agent.started",
            version=__version__,
            listening=addresses,
            outbox=str(settings.outbox.path),
            upstream=settings.upstream.url,
            config=str(loaded.file or "defaults"),
        )
        for problem in dict.fromkeys(filter(None, (*loaded.problems, unconfigured))):
            log.error("agent.misconfigured", problem=problem)
        notifier.ready(await _summary(reader, forwarder))
        await interrupted.wait()
        notifier.stopping("finishing what is in flight")
        log.info("agent.stop_requested")
    log.info("agent.stopped")


# --- settings, as each part wants them ---


def _policy(settings: Settings) -> Policy:
    return Policy(
        max_bytes=int(settings.outbox.max_size),
        evicts=settings.outbox.when_full == "drop_oldest",
        remember=settings.outbox.delivered_retention > 0,
    )


def _retention(settings: Settings) -> Retention:
    return Retention(
        max_age_s=settings.outbox.max_age, delivered_s=settings.outbox.delivered_retention
    )


def _plan(settings: Settings) -> Plan:
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
    )


def _upstream(settings: Settings, clock: Clock) -> AbstractAsyncContextManager[Upstream]:
    upstream = settings.upstream
    if upstream.write_key is None:
        raise AssertionError("an upstream without its key counts as not configured")
    target = Target(
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
    return open_upstream(target, clock, connections=settings.forward.concurrency)


def _routes(settings: Settings, writer: Writer, clock: Clock, control: Control) -> Routes:
    return Routes(
        writer,
        clock,
        max_body_bytes=settings.ingest.max_body,
        mounts=(
            Mount(PREFIX, control.answer),
            Mount("/healthz", control.health),
            Mount("/readyz", control.readiness),
        ),
    )


def _serving(
    settings: Settings, routes: Routes, environ: MutableMapping[str, str]
) -> AbstractAsyncContextManager[list[str]]:
    ingest = settings.ingest
    guard = Guard(
        allowed_hosts=frozenset(ingest.allowed_hosts),
        allowed_origins=frozenset(ingest.allowed_origins),
        max_body_bytes=ingest.max_body,
    )
    return serving(
        guard,
        routes.answer,
        host=ingest.host,
        port=ingest.port,
        unix_socket=ingest.unix_socket,
        inherited=inherited_sockets(environ, os.getpid()),
    )


# --- beside the way of an event ---


@asynccontextmanager
async def _background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run *coroutine* while the block runs, then cancel it; its failure ends the block."""
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(coroutine)
        try:
            yield
        finally:
            running.cancel()


async def _report(notifier: Notifier, reader: Reader, forwarder: Forwarder) -> None:
    said = ""
    while True:
        await asyncio.sleep(STATUS_INTERVAL_S)
        summary = await _summary(reader, forwarder)
        if summary != said:
            notifier.status(summary)
            said = summary


async def _summary(reader: Reader, forwarder: Forwarder) -> str:
    flow = forwarder.flow()
    try:
        ledger = await reader.ledger()
    except OutboxError as exc:
        return str(exc)
    counts = f"{ledger.pending} pending, {ledger.delivered} delivered, {ledger.dead} dead"
    return f"{flow.state}: {counts}" + (f"; {flow.reason}" if flow.reason else "")


async def _feed_watchdog(
    notifier: Notifier, writer: Writer, clock: Clock, environ: MutableMapping[str, str]
) -> None:
    interval_s = watchdog_interval_s(environ, os.getpid())
    if interval_s is None:
        return
    gate = WatchdogGate(_STALL_S)
    commits = writer.commits
    while True:
        now_s = clock.monotonic_s()
        if writer.backlogged:
            gate.busy("writer", now_s)
        else:
            gate.idle("writer")
        if writer.commits != commits:
            commits = writer.commits
            gate.beat("writer", now_s)
        stalled = gate.stalled(now_s)
        if stalled is None:
            notifier.watchdog()
        else:
            log.error("watchdog.starved", party=stalled, stall_s=_STALL_S)
        await asyncio.sleep(interval_s)


def _stop_on_signals(interrupted: asyncio.Event) -> None:
    """Stop in order at the first signal; at the second leave at once, for nothing stored can be lost."""

    def stop() -> None:
        if interrupted.is_set():
            os._exit(130)
        interrupted.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
