"""Who stands at the other end of the agent's connections, and keeps every byte that it can read."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

_REQUEST = re.compile(rb"(?is).*?\r\n\r\n")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")

_TLS = b"\x16\x03"
"""How a greeting of TLS begins; to a peer without TLS it is one more thing to answer."""


class Peer:
    """A server that says whatever it likes. *heard* is all that it was told, in the clear or within TLS."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        """*answer* makes a response of the head of a request."""
        self.answer = answer
        self.heard = b""
        self.connections = 0
        self.requests = 0
        self.port = 0


class _Conversation(asyncio.Protocol):
    def __init__(self, peer: Peer, all_: set[asyncio.Transport]) -> None:
        self._peer = peer
        self._all = all_
        self._unread = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._all.add(self._transport)

    def data_received(self, data: bytes) -> None:
        self._peer.heard += data
        self._unread += data
        if self._unread.startswith(_TLS):
            self._unread = b""
            self._transport.write(self._peer.answer(b""))
        while head := _REQUEST.match(self._unread):
            length = _LENGTH.search(head[0])
            end = head.end() + (int(length[1]) if length else 0)
            if len(self._unread) < end:
                return
            self._unread = self._unread[end:]
            self._peer.requests += 1
            self._transport.write(self._peer.answer(head[0]))

    def connection_lost(self, _exc: Exception | None) -> None:
        self._all.discard(self._transport)


@asynccontextmanager
async def listening(
    answer: Callable[[bytes], bytes] | bytes,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Peer]:
    peer = Peer((lambda _: answer) if isinstance(answer, bytes) else answer)
    transports: set[asyncio.Transport] = set()

    def made() -> _Conversation:
        peer.connections += 1
        return _Conversation(peer, transports)

    server = await asyncio.get_running_loop().create_server(made, host, 0, ssl=tls)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield peer
    finally:
        server.close()
        for transport in tuple(transports):
            transport.abort()
        await server.wait_closed()


def response(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


STORED = b"HTTP/1.1 204 No Content\r\n\r\n"
