"""What the commands do to an agent: through its daemon where one runs, else under the outbox's lock.

Owns the answer to "who has this outbox": a daemon that answers, nobody (the lock is free), or one
that holds the lock in silence. Prints nothing; called by the commands.

| daemon answers | lock | status            | reading       | changing                    |
| -------------- | ---- | ----------------- | ------------- | --------------------------- |
| yes            | held | the daemon's own  | from the file | by the control API          |
| no             | free | counted from file | from the file | by a writer, under the lock |
| no             | held | `unresponsive`    | from the file | `DaemonSilentError`         |
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent import __version__
from agent.clock import SystemClock
from agent.config.loaded import Loaded
from agent.console import apps as console_apps
from agent.console import dead_letters
from agent.console.apps import AppStatus
from agent.console.daemon_client import (
    DaemonClient,
    DaemonRefusedError,
    DaemonSilentError,
    open_client,
)
from agent.console.receipts import WAIT_MAX_S, ReceiptView, receipt_view
from agent.console.status import OutboxStatus, Report, Standing, Status, Unreadable, collect
from agent.errors import AgentError, OutboxError
from agent.flow import Wait
from agent.observe import logs
from agent.outbox import lock, pauses
from agent.outbox.access import open_own_reader, open_reader
from agent.outbox.reader import Reader
from agent.outbox.records import Policy, Receipt, Selection, State, label, unlabel
from agent.outbox.store import Store
from agent.outbox.writer import Writer, open_writer

_PAGE = 100
"""Events read at once: bodies have up to 5 MiB, and the machine may be small."""

_CHUNK_BYTES = 256 * 1024
"""Ids named in one request at most; less where ingest.max_body is less."""

_CHUNK = 500
"""Ids named in one request at most, whatever their length: it is one transaction (dead_letters)."""


async def inspect(loaded: Loaded) -> Report:
    """Return how the agent stands; never raises for a foreseen failure."""
    ingest = loaded.settings.ingest
    async with open_client(ingest.host, ingest.port) as client:
        try:
            status = await client.status()
        except DaemonRefusedError as exc:
            return _unreadable(loaded, str(exc))
        except DaemonSilentError as exc:
            return await _from_file(loaded, str(exc))
        if _is_of(status, loaded):
            return status
        return await _from_file(loaded, _stranger(client, status))


async def pause(loaded: Loaded, upstream: str | None = None) -> Status:
    """Stop sending, now and after a restart; return how the agent stands then.

    *upstream* is a label; None means all of them. So with the next two.
    """
    async with _at_hand(loaded) as hand:
        return await hand.pause(upstream)


async def resume(loaded: Loaded, upstream: str | None = None) -> Status:
    """End a pause; return how the agent stands then."""
    async with _at_hand(loaded) as hand:
        return await hand.resume(upstream)


async def flush(loaded: Loaded, upstream: str | None = None) -> Status | None:
    """End every wait of the running daemon; None if none runs."""
    ingest = loaded.settings.ingest
    async with open_client(ingest.host, ingest.port) as client:
        if await _answers(client, loaded):
            return await client.flush(upstream)
    return None


async def requeue(loaded: Loaded, selection: Selection) -> int:
    """Put the dead letters that *selection* means back into the queue; return how many."""
    async with _at_hand(loaded) as hand:
        return sum([await hand.requeue(part) for part in _parts(loaded, selection)])


async def discard(loaded: Loaded, selection: Selection) -> int:
    """Delete the dead letters that *selection* means for good; return how many."""
    async with _at_hand(loaded) as hand:
        return sum([await hand.discard(part) for part in _parts(loaded, selection)])


async def add_app(loaded: Loaded, name: str, token_digest: bytes) -> None:
    """Let the app be known by the token of that digest, whether or not an agent runs."""
    async with _at_hand(loaded) as hand:
        await hand.add_app(name, token_digest, await _operator_key(loaded, hand))


async def revoke_app(loaded: Loaded, name: str) -> None:
    """Let the app's token be good for nothing."""
    async with _at_hand(loaded) as hand:
        await hand.revoke_app(name, await _operator_key(loaded, hand))


async def apps(loaded: Loaded) -> list[AppStatus]:
    """Return the apps that are known or configured. Raises `AgentError` if that cannot be read."""
    report = await inspect(loaded)
    if isinstance(report, Unreadable):
        raise AgentError(report.reason)
    return report.apps


async def _operator_key(loaded: Loaded, hand: DaemonClient | _Alone) -> str:
    """Return what shows the daemon that we may read its files; nobody else asks for it."""
    if isinstance(hand, _Alone):
        return ""
    return lock.operator_key(await _outbox_path(loaded))


async def dead_ids(loaded: Loaded, selection: Selection) -> tuple[str, ...]:
    """Return the ids of the dead letters that *selection* means."""
    pages = events(loaded, "dead", selection, limit=sys.maxsize)
    return tuple([letter.message_id async for page in pages for letter in page])


async def events(
    loaded: Loaded, state: State, selection: Selection, *, limit: int
) -> AsyncIterator[list[Receipt]]:
    """Yield the first *limit* events that *selection* means, page by page, oldest first.

    Between two pages nothing is held open: whoever reads our output may be slow.
    """
    path, after, left = await _outbox_path(loaded), 0, limit
    while left > 0:
        size = min(left, _PAGE)
        async with _reading(path) as reader:
            page = await reader.select(state, selection, after=after, limit=size)
        if page:
            yield page
        if len(page) < size:
            return
        after, left = page[-1].seq, left - size


async def receipts(
    loaded: Loaded, message_id: str, upstream: str | None = None, *, wait_s: float = 0
) -> list[ReceiptView]:
    """Return where the events of one id stand, of each upstream or of that of the label *upstream*.

    None where it is not known (any more). With *wait_s* they are waited for until all are settled,
    as long as an agent runs that could settle them. Raises `DaemonRefusedError` then.
    """
    ingest = loaded.settings.ingest
    refused: DaemonRefusedError | None = None
    async with open_client(ingest.host, ingest.port) as client:
        try:
            if _is_of(await client.status(), loaded):
                return await _told(client, message_id, upstream, wait_s)
        except DaemonSilentError:
            pass
        except DaemonRefusedError as exc:  # it may know no more than that it cannot read
            if wait_s:
                raise
            refused = exc
    alone = Wait(waits_for="agent", reason="no agent runs here that answers")
    async with _reading(await _outbox_path(loaded)) as reader:
        known = await reader.receipts(message_id)
    if refused is not None and not known:
        raise refused
    return [
        receipt_view(each, alone if each.state == "pending" else None, known)
        for each in known
        if upstream in {None, label(each.upstream)}
    ]


async def _told(
    client: DaemonClient, message_id: str, upstream: str | None, wait_s: float
) -> list[ReceiptView]:
    """Return what the daemon says of each, one after the other: together they wait *wait_s*."""
    clock = SystemClock()
    until_s = clock.monotonic_s() + wait_s
    first = await client.receipt(message_id, upstream)
    if first is None:
        return []
    found: list[ReceiptView] = []
    for name in first.upstreams if upstream is None else (upstream,):
        receipt = first if name == first.upstream else await client.receipt(message_id, name)
        while receipt is not None and receipt.state == "pending":
            left_s = until_s - clock.monotonic_s()
            if left_s <= 0:
                break
            receipt = await client.receipt(message_id, name, wait_s=min(left_s, WAIT_MAX_S))
        if receipt is not None:
            found.append(receipt)
    return found


# --- who has the outbox ---


@asynccontextmanager
async def _at_hand(loaded: Loaded) -> AsyncIterator[DaemonClient | _Alone]:
    """Yield what can change the outbox: the daemon that answers, else a writer of our own."""
    ingest, outbox = loaded.settings.ingest, loaded.settings.outbox
    async with open_client(ingest.host, ingest.port) as client:
        if await _answers(client, loaded):
            yield client
            return
    if not _exists(outbox.path):
        raise OutboxError(f"{_nothing_at(outbox.path)}; nothing to change")
    # What the writer has to say belongs to stderr; unconfigured, it would go to stdout.
    logs.configure("warning", "console", sys.stderr, logs.Redactor())
    policy = Policy(
        max_bytes=int(outbox.max_size),
        evicts=False,  # nothing is appended here
        remember=outbox.delivered_retention > 0,
    )
    async with (
        open_writer(outbox.path, policy, SystemClock()) as writer,
        open_own_reader(outbox.path) as reader,
    ):
        yield _Alone(loaded, reader, writer)


async def _answers(client: DaemonClient, loaded: Loaded) -> bool:
    """Return whether *client* reaches the daemon of this outbox; False if none runs.

    Raises `DaemonSilentError` if one holds the lock but does not answer.
    """
    try:
        status = await client.status()
        if _is_of(status, loaded):
            return True
        silence = _stranger(client, status)
    except DaemonSilentError as exc:
        silence = str(exc)
    path = loaded.settings.outbox.path
    with lock.shared(path) as is_free:
        if is_free:
            return False
    raise DaemonSilentError(
        f"{_holder(path)}, but {silence}; is it starting or stopping? Try again, or restart it"
    )


def _is_of(status: Status, loaded: Loaded) -> bool:
    """Whether the daemon that answered is the one meant.

    Under systemd the outbox is elsewhere than for a person who typed the same command: where
    outbox.path was not chosen, the daemon knows best.
    """
    if loaded.origins["outbox.path"] == "default":
        return True
    return Path(status.outbox.path).resolve() == loaded.settings.outbox.path.resolve()


async def _outbox_path(loaded: Loaded) -> Path:
    """Return the outbox to read: the daemon's where none was chosen and one answers."""
    settings = loaded.settings
    if loaded.origins["outbox.path"] == "default":
        try:
            async with open_client(settings.ingest.host, settings.ingest.port) as client:
                return Path((await client.status()).outbox.path)
        except (DaemonSilentError, DaemonRefusedError):
            pass
    return settings.outbox.path


def _stranger(client: DaemonClient, status: Status) -> str:
    return f"the agent at {client.address} keeps another outbox, {status.outbox.path}"


def _holder(path: Path) -> str:
    return f"process {lock.owner(path)} owns {path}"


# --- without a daemon ---


@dataclass(frozen=True, slots=True)
class _Alone:
    """Does what `DaemonClient` asks for, while the lock keeps daemons away."""

    loaded: Loaded
    reader: Reader
    writer: Writer

    async def pause(self, upstream: str | None = None) -> Status:
        name = self._name(upstream)
        return await self._perform(lambda store: pauses.pause(store, name))

    async def resume(self, upstream: str | None = None) -> Status:
        name, known = self._name(upstream), self._known
        return await self._perform(lambda store: pauses.resume(store, name, known=known))

    @property
    def _known(self) -> tuple[str, ...]:
        return ("", *self.loaded.settings.upstreams)

    def _name(self, upstream: str | None) -> str | None:
        """Return the name of an upstream by its label. Raises `AgentError` for one that there is not."""
        if upstream is None:
            return None
        if unlabel(upstream) not in self._known:
            there = ", ".join(map(label, self._known))
            raise AgentError(f"{upstream}: no such upstream is configured; there are {there}")
        return unlabel(upstream)

    async def _perform(self, verb: Callable[[Store], None]) -> Status:
        await self.writer.perform(verb)
        return await _count(self.reader, self.loaded)

    async def requeue(self, selection: Selection) -> int:
        now_ms = SystemClock().wall_ms()
        return await dead_letters.requeue(self.reader, self.writer, selection, now_ms=now_ms)

    async def discard(self, selection: Selection) -> int:
        return await dead_letters.discard(self.reader, self.writer, selection)

    async def add_app(self, name: str, token_digest: bytes, operator_key: str) -> None:
        del operator_key  # whoever holds the lock needs none
        now_ms = SystemClock().wall_ms()
        await console_apps.add(self.writer, name, token_digest, now_ms=now_ms)

    async def revoke_app(self, name: str, operator_key: str) -> None:
        del operator_key
        await console_apps.revoke(self.writer, name, now_ms=SystemClock().wall_ms())


async def _from_file(loaded: Loaded, silence: str) -> Report:
    """Count what the file holds; *silence* says why it is not the daemon that tells."""
    path = loaded.settings.outbox.path
    try:
        with lock.shared(path) as is_free:
            pass
        if is_free and not _exists(path):
            return _empty(loaded)
        async with _reading(path) as reader:
            status = await _count(reader, loaded)
    except OutboxError as exc:
        return _unreadable(loaded, str(exc))
    if is_free:
        return status
    return msgspec.structs.replace(
        status,
        state="unresponsive",
        reason=f"{_holder(path)}, but {silence}",
        upstreams=msgspec.UNSET,  # nobody says how they stand
    )


async def _count(reader: Reader, loaded: Loaded) -> Status:
    return await collect(
        reader,
        now_ms=SystemClock().wall_ms(),
        upstreams={
            name: Standing(loaded.settings.upstream_of(name).url)
            for name in ("", *loaded.settings.upstreams)
        },
        max_bytes=loaded.settings.outbox.max_size,
        quotas=console_apps.quotas(loaded.settings),
    )


def _empty(loaded: Loaded) -> Status:
    """Return the status of a machine on which the agent has not run yet."""
    outbox = loaded.settings.outbox
    return Status(
        state="stopped",
        reason=_nothing_at(outbox.path),
        accepted=0,
        delivered=0,
        pending=0,
        dead=0,
        discarded=0,
        evicted=0,
        duplicates=0,
        conflicts=0,
        oldest_pending_age_s=None,
        next_attempt_in_s=None,
        last_error=None,
        last_error_age_s=None,
        in_flight=0,
        limit=0,
        parked_users=0,
        ambiguous=0,
        salvage=None,
        outbox=OutboxStatus(
            path=str(outbox.path),
            bytes=0,
            wal_bytes=0,
            max_bytes=int(outbox.max_size),
            full=None,
            fault=None,
        ),
        upstream=loaded.settings.upstream.url or "",
        version=__version__,
        apps=console_apps.overview((), console_apps.quotas(loaded.settings)),
    )


def _unreadable(loaded: Loaded, reason: str) -> Unreadable:
    return Unreadable(
        state="unreadable",
        reason=reason,
        outbox={"path": str(loaded.settings.outbox.path)},
        version=__version__,
    )


def _nothing_at(path: Path) -> str:
    return f"{path}: no outbox here; the agent has not run yet, or outbox.path names another place"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as exc:  # a folder on the way that this user may not enter
        raise OutboxError(
            f"{path}: cannot be looked at ({exc.strerror}); run as the agent's user, as a member of"
            " its group, or as root"
        ) from exc


@asynccontextmanager
async def _reading(path: Path) -> AsyncIterator[Reader]:
    _exists(path)
    async with open_reader(path) as reader:
        yield reader


# --- ids ---


def _parts(loaded: Loaded, selection: Selection) -> Iterator[Selection]:
    """Yield *selection* in parts whose ids fit into one request each."""
    if not selection.message_ids:
        yield selection
        return
    room = min(int(loaded.settings.ingest.max_body), _CHUNK_BYTES) // 2
    part: list[str] = []
    part_bytes = 0
    for message_id in dict.fromkeys(selection.message_ids):
        id_bytes = len(msgspec.json.encode(message_id)) + 1
        if part and (part_bytes + id_bytes > room or len(part) == _CHUNK):
            yield msgspec.structs.replace(selection, message_ids=tuple(part))
            part, part_bytes = [], 0
        part.append(message_id)
        part_bytes += id_bytes
    yield msgspec.structs.replace(selection, message_ids=tuple(part))
