"""The daemon: what is made of what, in which order it starts, what may change, and how it ends.

    outbox (lock, recovery, migration) ⊃ writer ⊃ forwarder ⊃ salvage, upkeep ⊃ server ⊃ READY

Nesting is shutdown order: the server stops accepting and finishes its answers, the forwarder ends
what is in flight, the writer commits what is queued, checkpoints and closes. Knows no details.
`_Parts` hands a configuration read anew to all whom it concerns.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    MutableMapping,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from agent import __version__, translation
from agent.clock import Clock, SystemClock
from agent.config.loaded import Loaded
from agent.config.loading import files_beside, refresh
from agent.console.apps import quotas
from agent.console.control import PREFIX, Control
from agent.errors import ConfigError, OutboxError
from agent.forward.forwarder import Forwarder, forwarding
from agent.forward.link import watching
from agent.forward.succession import Succession, succession
from agent.forward.tally import open_tally
from agent.forward.upstream import tls_fault
from agent.ingest.guard import Guard
from agent.ingest.routes import Mount, Routes
from agent.ingest.server import serving
from agent.outbox.access import open_own_reader
from agent.outbox.files import tally_of
from agent.outbox.records import Ledger, Retention
from agent.outbox.rescue import salvage_damaged
from agent.outbox.upkeep import keep_up
from agent.outbox.writer import Writer, open_writer
from agent.rereading import LOOK_S, Rereading, stamps
from agent.settings import Settings
from agent.systemd import Notifier, WatchdogGate, inherited_sockets, watchdog_interval_s

STATUS_INTERVAL_S = 10.0
"""How often the service manager's one-line status is brought up to date."""

_STALL_S = 20.0
"""A writer that has work and commits nothing for so long hangs; commits take milliseconds."""

log = structlog.get_logger()


async def run(
    loaded: Loaded, environ: MutableMapping[str, str], log_as: Callable[[Settings], None]
) -> None:
    """Run the agent until SIGTERM or SIGINT. Raises `AgentError` if it cannot start.

    *log_as* makes the logs what settings say, and must know their secrets before anybody else.
    """
    noticed = stamps(files_beside(loaded, environ))
    loaded = refresh(loaded, environ)  # what changed before the stamps, at the latest
    settings, clock = loaded.settings, SystemClock()
    log_as(settings)
    if loaded.unhashable is not None:
        raise ConfigError(f"{loaded.unhashable}; no event is taken that could not be hashed")
    notifier = Notifier.from_environ(environ)
    interrupted, told = asyncio.Event(), asyncio.Event()
    _obey_signals(interrupted, told)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        writer = await enter(
            open_writer(settings.outbox.path, translation.policy(settings, quotas(settings)), clock)
        )
        # People's searches have a connection of their own: they must not hold up delivery.
        searcher = await enter(open_own_reader(settings.outbox.path, on_damage=writer.suspect))
        ledger = await searcher.ledger()

        async def look() -> None:
            await rereading.look()

        branches = {
            name: await enter(_branch(name, loaded, writer, ledger, clock, look))
            for name in ("", *settings.upstreams)
        }
        forwarders = {name: branch.forwarder for name, branch in branches.items()}
        control = Control(
            reader=searcher,
            writer=writer,
            links=forwarders,
            clock=clock,
            urls=translation.urls(settings, forwarders),
            max_bytes=int(settings.outbox.max_size),
            quotas=quotas(settings),
        )
        parts = _Parts(
            settings=settings,
            log_as=log_as,
            writer=writer,
            branches=branches,
            control=control,
            guard=translation.guard(loaded),
            routes=_routes(loaded, writer, clock, control),
            app_keys=loaded.app_keys,
        )
        rereading = Rereading(loaded, noticed, environ, parts)
        await enter(_forwarding_each(forwarders.values()))
        stack.enter_context(watching(parts.link_changed))
        await enter(_background(salvage_damaged(writer)))
        await enter(_background(keep_up(writer, clock, parts.retention)))
        addresses = await enter(_serving(settings, parts.guard, parts.routes, environ))
        await enter(_background(_follow(rereading, told, notifier, clock, control)))
        await enter(_background(_report(notifier, control)))
        await enter(_background(_feed_watchdog(notifier, writer, clock, environ)))
        _say_started(loaded, addresses)
        notifier.ready(await _summary(control))
        await interrupted.wait()
        notifier.stopping("finishing what is in flight")
        writer.waiters.end()  # who waits for an event is told how it stands
        log.info("agent.stop_requested")
    log.info("agent.stopped")


def _say_started(loaded: Loaded, addresses: list[str]) -> None:
    settings = loaded.settings
    log.info(
        "agent.started",
        version=__version__,
        listening=addresses,
        outbox=str(settings.outbox.path),
        upstream=settings.upstream.url,
        upstreams={name: upstream.url for name, upstream in settings.upstreams.items()},
        config=str(loaded.file or "defaults"),
    )
    missing = map(loaded.missing, ("", *settings.upstreams))
    for problem in dict.fromkeys(filter(None, (*loaded.problems, *missing))):
        log.error("agent.misconfigured", problem=problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branch:
    """What there is for one upstream: who forwards, and what to."""

    forwarder: Forwarder
    upstream: Succession

    async def adopt(self, loaded: Loaded, name: str) -> None:
        """Go by *loaded* from now on: what was held is tried at once."""
        settings, unconfigured = loaded.settings, loaded.missing(name)
        plan = translation.plan(settings, name)
        if unconfigured:
            self.forwarder.adopt(None, plan, unconfigured)
        else:
            # Anew even where no key changed: what the files of TLS hold may have.
            await self.upstream.take_over(
                translation.target(settings, name), connections=settings.forward.concurrency
            )
            self.forwarder.adopt(self.upstream, plan)


@asynccontextmanager
async def _branch(
    name: str,
    loaded: Loaded,
    writer: Writer,
    ledger: Ledger,
    clock: Clock,
    look: Callable[[], Awaitable[None]],
) -> AsyncIterator[_Branch]:
    """Open what is for the upstream of that name; *look* is called before a held queue is probed."""
    settings, unconfigured = loaded.settings, loaded.missing(name)
    async with (
        succession(clock, look) as upstream,
        # Of its own, so that one that reads past a backlog keeps no other waiting.
        open_own_reader(settings.outbox.path, on_damage=writer.suspect) as reader,
    ):
        if not unconfigured:
            await upstream.take_over(
                translation.target(settings, name), connections=settings.forward.concurrency
            )
        with open_tally(tally_of(settings.outbox.path, name)) as tally:
            forwarder = Forwarder(
                writer=writer,
                reader=reader,
                upstream=None if unconfigured else upstream,
                plan=translation.plan(settings, name),
                tally=tally,
                clock=clock,
                rng=random.Random(),  # noqa: S311  # spreads load, guards nothing
                unconfigured=unconfigured or "",
                paused=ledger.pauses(name),
                name=name,
            )
            yield _Branch(forwarder=forwarder, upstream=upstream)


@dataclass(slots=True, kw_only=True)
class _Parts:
    """What goes by the configuration, and the *settings* that it goes by."""

    settings: Settings
    log_as: Callable[[Settings], None]
    writer: Writer
    branches: Mapping[str, _Branch]
    control: Control
    guard: Guard
    routes: Routes
    app_keys: Mapping[str, str]

    def fault(self, settings: Settings) -> str | None:
        faults = (
            tls_fault(translation.target(settings, name))
            for name in ("", *settings.upstreams)
            if settings.upstream_of(name).write_key is not None
        )
        return next(filter(None, faults), None)

    async def adopt(self, loaded: Loaded) -> None:
        self.settings = settings = loaded.settings
        self.log_as(settings)  # first: it masks the new key
        self.writer.adopt(translation.policy(settings, quotas(settings)))
        self.guard.adopt(translation.guard(loaded))
        self.routes.terms = translation.terms(loaded)
        self.routes.callers = translation.callers(loaded)
        self.routes.destinations = translation.destinations(loaded, self.branches, self.app_keys)
        self.app_keys = loaded.app_keys
        self.control.adopt(
            urls=translation.urls(settings, self.branches),
            max_bytes=int(settings.outbox.max_size),
            quotas=quotas(settings),
        )
        for name, branch in self.branches.items():
            await branch.adopt(loaded, name)

    def link_changed(self) -> None:
        for branch in self.branches.values():
            branch.forwarder.link_changed()

    def note(self, problem: str | None) -> None:
        self.control.config_problem = problem

    def retention(self) -> Retention:
        return translation.retention(self.settings)


# --- what is made of settings ---


def _routes(loaded: Loaded, writer: Writer, clock: Clock, control: Control) -> Routes:
    return Routes(
        writer,
        clock,
        terms=translation.terms(loaded),
        callers=translation.callers(loaded),
        destinations=translation.destinations(loaded, ("", *loaded.settings.upstreams), {}),
        mounts=(
            Mount(PREFIX, control.answer),
            Mount("/healthz", control.health),
            Mount("/readyz", control.readiness),
            Mount("/metrics", control.metrics),
        ),
    )


def _serving(
    settings: Settings, guard: Guard, routes: Routes, environ: MutableMapping[str, str]
) -> AbstractAsyncContextManager[list[str]]:
    ingest = settings.ingest
    return serving(
        guard,
        routes.answer,
        host=ingest.host,
        port=ingest.port,
        unix_socket=ingest.unix_socket,
        unix_socket_mode=int(ingest.unix_socket_mode, 8),
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


async def _follow(
    rereading: Rereading,
    told: asyncio.Event,
    notifier: Notifier,
    clock: Clock,
    control: Control,
) -> None:
    """Read the configuration anew when *told*, and look after the files beside it."""
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await told.wait()
        if not told.is_set():
            await rereading.look()
            continue
        told.clear()  # first: who asks again meanwhile has changed something since
        notifier.reloading(clock.monotonic_s())
        await rereading.reload()
        notifier.ready(await _summary(control))


@asynccontextmanager
async def _forwarding_each(forwarders: Iterable[Forwarder]) -> AsyncIterator[None]:
    """Let all forward while the block runs, and end together: each has a while for what is in flight."""
    ended = asyncio.Event()

    async def forward(forwarder: Forwarder) -> None:
        async with forwarding(forwarder):
            await ended.wait()

    async with asyncio.TaskGroup() as tasks:
        for forwarder in forwarders:
            tasks.create_task(forward(forwarder))
        try:
            yield
        finally:
            ended.set()


async def _report(notifier: Notifier, control: Control) -> None:
    said = ""
    while True:
        await asyncio.sleep(STATUS_INTERVAL_S)
        summary = await _summary(control)
        if summary != said:
            notifier.status(summary)
            said = summary


async def _summary(control: Control) -> str:
    try:
        status = await control.collected()
    except OutboxError as exc:
        return str(exc)
    counts = f"{status.pending} pending, {status.delivered} delivered, {status.dead} dead"
    return f"{status.state}: {counts}" + (f"; {status.reason}" if status.reason else "")


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


def _obey_signals(interrupted: asyncio.Event, told: asyncio.Event) -> None:
    """Stop in order at the first signal; at the second leave at once, for nothing stored can be lost.

    SIGHUP asks to read the configuration anew, but for one case: the terminal went away.
    """
    on_terminal = sys.stderr.isatty()

    def stop() -> None:
        if interrupted.is_set():
            os._exit(130)
        interrupted.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    def hang_up() -> None:
        if on_terminal and not sys.stderr.isatty():
            stop()
        else:
            told.set()

    loop.add_signal_handler(signal.SIGHUP, hang_up)
