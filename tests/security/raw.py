"""Bytes to a real daemon over a real socket, and what it answers: no HTTP library in between."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from contextlib import suppress
from pathlib import Path

from processes import DEADLINE_S, AgentProcess

TRACK = "/api/public/apps/track"

_PIECE_BYTES = 65_536


def event(message_id: str, **fields: object) -> bytes:
    """Return a small body of /track in which nothing is odd."""
    extra = "".join(f',"{name}":"{value}"' for name, value in fields.items())
    return f'{{"messageId":"{message_id}","event":"Item Sold","userId":"1043"{extra}}}'.encode()


def head(*lines: str, start: str = f"POST {TRACK} HTTP/1.1", host: str = "127.0.0.1") -> bytes:
    """Return the head of a post of JSON with further *lines*; how long its body is they must say."""
    usual = [start, f"Host: {host}", "Content-Type: application/json"]
    return "\r\n".join([*usual, *lines, "", ""]).encode("latin-1")


def post(
    body: bytes, *lines: str, start: str = f"POST {TRACK} HTTP/1.1", host: str = "127.0.0.1"
) -> bytes:
    return head(f"Content-Length: {len(body)}", *lines, start=start, host=host) + body


def chunked(body: bytes, *lines: str) -> bytes:
    sent = head("Transfer-Encoding: chunked", *lines)
    return sent + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


async def talk(port: int, sent: bytes) -> bytes:
    """Send *sent*, say that nothing follows, and return all that comes back before the agent closes."""
    loop = asyncio.get_running_loop()
    answered = b""
    with socket.socket() as client:
        client.setblocking(False)
        async with asyncio.timeout(DEADLINE_S):
            await loop.sock_connect(client, ("127.0.0.1", port))
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(_send(client, sent))
                with suppress(ConnectionError):
                    while piece := await loop.sock_recv(client, _PIECE_BYTES):
                        answered += piece
                sending.cancel()
    return answered


async def _send(client: socket.socket, sent: bytes) -> None:
    with suppress(OSError):  # refused in the middle: the answer says why
        await asyncio.get_running_loop().sock_sendall(client, sent)
        client.shutdown(socket.SHUT_WR)


_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


def statuses(answered: bytes, sent: bytes = b"") -> tuple[int, ...]:
    """Return the statuses of all answers to what was *sent*. ValueError: they are not whole ones."""
    found = []
    bodiless = sent.startswith(b"HEAD ")
    while answered:
        top, end, rest = answered.partition(b"\r\n\r\n")
        line = re.match(rb"HTTP/1\.1 (\d{3}) [^\r\n]+\r\n", top + end)
        if line is None or not end:
            raise ValueError(f"not a response: {answered[:200]!r}")
        length = _LENGTH.search(top + end)
        body_bytes = int(length[1]) if length and not bodiless else 0
        if len(rest) < body_bytes:
            raise ValueError(f"cut short: {answered[:200]!r}")
        found.append(int(line[1]))
        answered = rest[body_bytes:]
    return tuple(found)


def memory_bytes(pid: int, line: str = "VmRSS") -> int:
    """Return how much memory a process has in use; "VmHWM": the most that it ever had."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def troubles(agent: AgentProcess, pid: int) -> list[str]:
    """Return what an agent must not show whatever was sent to it; none: all is well."""
    found = [line for line in agent.log.read_text().splitlines() if _tells_of_trouble(line)]
    if agent.process.pid != pid or not agent.alive:
        found.append("it died")
    return found


def _tells_of_trouble(line: str) -> bool:
    try:
        said = json.loads(line)
    except ValueError:  # not of our own making: a traceback, or the interpreter's last words
        return True
    return said["level"] == "error" and said["event"] not in _FORESEEN


_FORESEEN = {"agent.misconfigured"}
"""There is no upstream: what is accepted stays."""
