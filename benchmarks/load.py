"""Who posts events: `wrk` or a simple stand-in as fast as it is answered, or at a steady rate.

Each runs in a process of its own and says what it saw as one `Load`. An answer that is not a
204 counts as failed, and `Load.checked` refuses a run with any.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import random
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import uvloop

from benchmarks import events
from benchmarks.processes import FigureError, ask, say_result

CONNECTIONS = 64

BATCH_EVENTS = 100
BATCH_CONNECTIONS = 16

_LUA = Path(__file__).with_name("events.lua")

_SLACK_S = 30.0
"""How much longer than asked a generator may take to start, to connect and to count."""

_ACCEPTED = b"HTTP/1.1 204"
_HEAD_END = b"\r\n\r\n"

SPIN_S = 0.002
"""The end of each wait of a steady rate is spun: timers are a millisecond or more late."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a generator saw. *failed*: answers other than 2xx, and errors of the socket."""

    answered: int
    seconds: float
    failed: int
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Return answers per second."""
        return self.answered / self.seconds

    def checked(self) -> Load:
        """Return this load; raises `FigureError` if anything but success was answered."""
        if self.failed or not self.answered:
            raise FigureError(f"{self.failed} of {self.answered} requests failed; see the log")
        return self


def wrk_is_here() -> bool:
    return shutil.which("wrk") is not None


def at_full_speed(port: int, seconds: float, *, with_wrk: bool) -> Load:
    """Post over 64 connections, each sends again as soon as it is answered. One thread."""
    if not with_wrk:
        return ask("benchmarks.load", "full", port, seconds, result=Load, timeout_s=seconds + 30)
    # wrk takes whole seconds only.
    whole_s = max(1, round(seconds))
    seed = secrets.randbits(31)
    done = subprocess.run(
        (
            *("wrk", "--threads=1", f"--connections={CONNECTIONS}", f"--duration={whole_s}s"),
            *("--timeout=10s", "--script", str(_LUA), f"http://127.0.0.1:{port}"),
            *("--", str(seed), *events.PIECES),
        ),
        capture_output=True,
        timeout=whole_s + _SLACK_S,
        check=False,
    )
    *_, last = done.stdout.splitlines() or [b""]
    if done.returncode or not last.startswith(b"{"):
        raise FigureError(f"wrk failed: {(done.stderr or done.stdout).decode()[-500:]}")
    return msgspec.json.decode(last, type=Load)


def at_rate(port: int, rate: float, seconds: float) -> Load:
    """Post *rate* requests a second whatever the answers do; latency counts from the due time."""
    return ask("benchmarks.load", "rate", port, rate, seconds, result=Load, timeout_s=seconds + 30)


def in_batches(port: int, count: int, seed: int, *, gzipped: bool = False) -> Load:
    """Post the *count* events of *seed* in requests of 100, over 16 connections, prebuilt."""
    way = "gzipped" if gzipped else "batches"
    return ask(
        *("benchmarks.load", way, port, count, seed), result=Load, timeout_s=60 + count / 100
    )


def request(port: int, body: bytes, endpoint: str = "track", *, gzipped: bool = False) -> bytes:
    encoding = b"Content-Encoding: gzip\r\n" if gzipped else b""
    return (
        b"POST /api/public/apps/%b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%b"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (endpoint.encode(), port, encoding, len(body), body)
    )


def load_of(latencies_s: list[float], *, seconds: float, failed: int) -> Load:
    latencies_s.sort()
    return Load(
        answered=len(latencies_s),
        seconds=seconds,
        failed=failed,
        p50_ms=percentile(latencies_s, 50) * 1e3,
        p99_ms=percentile(latencies_s, 99) * 1e3,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the value that *percent* of the *ordered* are not above; 0 of none."""
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)] if ordered else 0.0


# --- as fast as it is answered ------------------------------------------------------------------


class _Client(asyncio.Protocol):
    """One connection, which sends *requests* to their end, one after the other."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self.latencies_s: list[float] = []
        self.failed = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._answer = b""
        self._sent_s = 0.0
        self._waits = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send(self._transport)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if _HEAD_END not in self._answer or self._transport is None:
            return
        now_s = time.perf_counter()
        if not self._answer.startswith(_ACCEPTED):
            self._transport.close()
            return
        self.latencies_s.append(now_s - self._sent_s)
        self._waits, self._answer = False, b""
        self._send(self._transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.failed += self._waits
        self.done.set_result(None)

    def _send(self, transport: asyncio.Transport) -> None:
        following = next(self._requests, None)
        if following is None:
            transport.close()
            return
        self._waits, self._sent_s = True, time.perf_counter()
        transport.write(following)


def _until(port: int, until_s: float) -> Iterator[bytes]:
    rng = random.Random(secrets.randbits(64))
    while time.perf_counter() < until_s:
        yield request(port, events.body(rng))


async def _full_speed(port: int, seconds: float) -> Load:
    until_s = time.perf_counter() + seconds
    return await _post(port, [_until(port, until_s) for _ in range(CONNECTIONS)], seconds)


async def _in_batches(port: int, count: int, seed: int, *, gzipped: bool) -> Load:
    made = iter(events.batches(count, seed, BATCH_EVENTS))
    bodies = [gzip.compress(body) for body in made] if gzipped else list(made)
    requests = [request(port, body, "batch", gzipped=gzipped) for body in bodies]
    gc.collect()
    gc.freeze()
    waiting = iter(requests)
    return await _post(port, [waiting] * BATCH_CONNECTIONS, count / 100)


async def _post(port: int, requests: Sequence[Iterator[bytes]], seconds: float) -> Load:
    """Send over a connection for each of *requests*; about *seconds* are expected."""
    loop = asyncio.get_running_loop()
    started_s = time.perf_counter()
    clients = []
    for mine in requests:
        made = await loop.create_connection(
            lambda mine=mine: _Client(mine),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        clients.append(made[1])
    async with asyncio.timeout(seconds + _SLACK_S / 2):
        for client in clients:
            await client.done
    latencies_s = [latency for client in clients for latency in client.latencies_s]
    return load_of(
        latencies_s,
        seconds=time.perf_counter() - started_s,
        failed=sum(client.failed for client in clients),
    )


# --- at a steady rate ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Waiting:
    """A connection whose request was due at *due_s*."""

    due_s: float
    answer: bytes = b""


class _Steady:
    """The open loop: a request goes out when it is due, on a further connection if none is free."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._free: list[socket.socket] = []
        self._waiting: dict[socket.socket, _Waiting] = {}
        self._rng = random.Random(secrets.randbits(64))
        self.latencies_s: list[float] = []
        self.failed = 0

    def run(self, rate: float, seconds: float) -> None:
        self._free = [self._connect() for _ in range(8)]
        total, sent = max(1, round(rate * seconds)), 0
        start_s = time.perf_counter() + 0.1
        end_s = start_s + seconds + _SLACK_S / 2
        while sent < total or self._waiting:
            due_s = start_s + sent / rate if sent < total else end_s
            now_s = time.perf_counter()
            if now_s >= end_s:
                self.failed += len(self._waiting)
                return
            if now_s >= due_s:
                self._send(due_s)
                sent += 1
            else:
                self._receive(due_s - now_s - SPIN_S)

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(connection, selectors.EVENT_READ)
        return connection

    def _send(self, due_s: float) -> None:
        connection = self._free.pop() if self._free else self._connect()
        connection.sendall(request(self._port, events.body(self._rng)))
        self._waiting[connection] = _Waiting(due_s)

    def _receive(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(max(0.0, timeout_s)):
            connection = cast("socket.socket", key.fileobj)
            data = connection.recv(65_536)
            waiting = self._waiting.get(connection)
            if waiting is None or not data:
                # Closed: an idle one may be, at any time; one that waits for its answer may not.
                self.failed += waiting is not None
                self._drop(connection)
                continue
            waiting.answer += data
            if _HEAD_END in waiting.answer:
                self._answered(connection, waiting)

    def _answered(self, connection: socket.socket, waiting: _Waiting) -> None:
        if waiting.answer.startswith(_ACCEPTED):
            self.latencies_s.append(time.perf_counter() - waiting.due_s)
            del self._waiting[connection]
            self._free.append(connection)
        else:
            self.failed += 1
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._waiting.pop(connection, None)
        if connection in self._free:
            self._free.remove(connection)
        connection.close()


def _steady(port: int, rate: float, seconds: float) -> Load:
    steady = _Steady(port)
    started_s = time.perf_counter()
    steady.run(rate, seconds)
    return load_of(
        steady.latencies_s, seconds=time.perf_counter() - started_s, failed=steady.failed
    )


def _main(way: str, port: str, *numbers: str) -> None:
    match way, numbers:
        case "full", (seconds,):
            say_result(uvloop.run(_full_speed(int(port), float(seconds))))
        case "rate", (rate, seconds):
            say_result(_steady(int(port), float(rate), float(seconds)))
        case "batches" | "gzipped", (count, seed):
            gzipped = way == "gzipped"
            say_result(uvloop.run(_in_batches(int(port), int(count), int(seed), gzipped=gzipped)))
        case _:
            raise SystemExit(
                f"{way} {numbers}: expected full SECONDS, rate RATE SECONDS,"
                " or batches or gzipped COUNT SEED"
            )


if __name__ == "__main__":
    _main(*sys.argv[1:])
