"""A stand-in for the upstream that costs as little as it can: it counts events and answers 204.

It answers as the contract has it (`agent.console.sandbox_contract`): 204 without a body to a POST
of one event to /track, or of many to /batch. It stores nothing and checks nothing: it must not be what limits a drain.
Run as `python -m benchmarks.upstream`; `Arrivals` asks it over the same port.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import msgspec
import uvloop

from benchmarks.processes import FigureError, get, say_result, serving

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"
_TRACK = b"POST /api/public/apps/track HTTP/1.1\r\n"
_BATCH = b"POST /api/public/apps/batch HTTP/1.1\r\n"
_ITEM = b'{"type":'
"""What each item of a batch begins with; the events of the benchmarks hold no such thing inside."""
_ASKED = re.compile(rb"GET /arrivals/(\d+) ")

_ACCEPTED = b"HTTP/1.1 204 No Content\r\n\r\n"

_POLL_S = 0.1


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """What has arrived: *count* events; *seconds* from the first to the one asked for, if it came."""

    count: int
    seconds: float | None


class Upstream:
    """The running stand-in, to ask."""

    def __init__(self, port: int) -> None:
        self.port = port

    def arrivals(self, number: int = 1) -> Arrivals:
        """Return how many came, and when the *number*-th (1-based) did."""
        return msgspec.json.decode(get(self.port, f"/arrivals/{number}"), type=Arrivals)

    def drain_rate(self, count: int) -> float:
        """Wait for the *count*-th event; return events a second from the first to it."""
        # Nothing here drains slower; it only keeps a dead side from being waited for.
        until_s = time.monotonic() + 60 + count / 100
        while (seconds := self.arrivals(count).seconds) is None:
            if time.monotonic() > until_s:
                raise FigureError(f"only {self.arrivals().count} of {count} events arrived")
            time.sleep(_POLL_S)
        return (count - 1) / seconds


@contextmanager
def upstream() -> Iterator[Upstream]:
    """Run a stand-in of its own while the block runs: nothing has arrived yet."""
    with serving("benchmarks.upstream") as server:
        yield Upstream(server.port)


class _Connection(asyncio.Protocol):
    def __init__(self, arrivals_s: array[float]) -> None:
        self._arrivals_s = arrivals_s
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(_HEAD_END)) >= 0 and self._transport is not None:
            head = self._buffer[:end]
            length = _LENGTH.search(head)
            whole = end + len(_HEAD_END) + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end:whole], self._buffer[whole:]
            self._transport.write(self._answer(head, body))

    def _answer(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(_TRACK):
            self._arrivals_s.append(time.monotonic())
            return _ACCEPTED
        if head.startswith(_BATCH):
            self._arrivals_s.extend([time.monotonic()] * body.count(_ITEM))
            return _ACCEPTED
        asked = _ASKED.match(head)
        if asked is None:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        came, number = self._arrivals_s, int(asked[1])
        seconds = came[number - 1] - came[0] if 0 < number <= len(came) else None
        body = msgspec.json.encode(Arrivals(count=len(came), seconds=seconds))
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def _serve() -> None:
    arrivals_s = array("d")
    listening = socket.create_server(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(arrivals_s), sock=listening
    )
    say_result(listening.getsockname()[1])
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
