"""The server: listens, looks after its connections, and ends in good order.

What a connection does is `agent.ingest.connection`'s, what its bytes mean `agent.ingest.wire`'s.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial

import structlog

from agent.ingest.connection import MOST_CONNECTIONS, Connection, Deadlines, Shared
from agent.ingest.guard import Guard
from agent.ingest.reply import Handler
from agent.ingest.sockets import bind_tcp, bind_unix, shown

_BACKLOG = 1024
"""Connections the kernel holds ready: apps that all start at boot must not be refused."""

_OTHER_FILES = 64
"""At least so many descriptors are kept for the outbox and the upstream: they must not go short."""

log = structlog.get_logger()


@asynccontextmanager
async def serving(
    guard: Guard,
    handler: Handler,
    *,
    host: str,
    port: int,
    unix_socket: str = "",
    unix_socket_mode: int = 0o660,
    inherited: Sequence[socket.socket] = (),
    deadlines: Deadlines | None = None,
) -> AsyncIterator[list[str]]:
    """Answer requests while the block runs; yields the addresses bound, as URLs or socket paths.

    With *inherited* sockets (of a .socket unit) those are listened on, and host and port are not.

    On leaving: no new connections, idle ones closed, answers in flight finished (up to `stop_s`).
    Raises `AgentError` if an address cannot be bound.
    """
    with ExitStack() as bound:
        sockets = [bound.enter_context(each) for each in inherited or bind_tcp(host, port)]
        if unix_socket:
            sockets.append(bound.enter_context(bind_unix(unix_socket, unix_socket_mode)))
        async with asyncio.TaskGroup() as tasks:
            loop = asyncio.get_running_loop()
            shared = Shared(
                guard=guard,
                handler=handler,
                deadlines=deadlines or Deadlines(),
                tasks=tasks,
                loop=loop,
                most_connections=_most_connections(),
            )
            looking = tasks.create_task(_look_after(shared))
            listeners = [
                await loop.create_server(
                    partial(Connection, shared, local=each.family == socket.AF_UNIX),
                    sock=each,
                    backlog=_BACKLOG,
                )
                for each in sockets
            ]
            try:
                yield [shown(each) for each in sockets]
            finally:
                for listener in listeners:
                    listener.close()
                await _finish(shared)
                looking.cancel()


def _most_connections() -> int:
    """Return how many there may be, all listeners together: as the process may open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, files - max(_OTHER_FILES, files // 4)))


async def _look_after(shared: Shared) -> None:
    """Cut off clients that stall: one timer for all of them."""
    while True:
        await asyncio.sleep(shared.deadlines.look_s)
        now_s = shared.loop.time()
        for connection in tuple(shared.connections):
            connection.look(now_s)
        if shared.refused and len(shared.connections) < shared.most_connections:
            log.info("connections.available", refused=shared.refused)
            shared.refused = 0


async def _finish(shared: Shared) -> None:
    shared.stopping = True
    for connection in tuple(shared.connections):
        connection.stop()
    if shared.connections:
        with suppress(TimeoutError):
            async with asyncio.timeout(shared.deadlines.stop_s):
                await shared.emptied.wait()
    for connection in tuple(shared.connections):
        connection.abort()
    for task in tuple(shared.handling):
        task.cancel()
