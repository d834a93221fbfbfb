"""Who may talk to the agent, judged from the request's head alone, before its body is read.

Pure. Loopback is not a fence against a web page: a browser on the same machine posts to
127.0.0.1 for any site it shows. Host stops a rebound DNS name, Origin and Sec-Fetch-Site stop a
foreign page. Also here: how a body may be encoded, and inflating it within bounds. Names of headers
are in lower case, as in `Request`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from agent.exchange import Answer, refuse
from agent.ingest.destinations import behind_prefix

_LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})

_ENCODINGS = frozenset({"identity", "gzip", "x-gzip", "deflate"})

_GZIP_OR_ZLIB = 47
"""zlib's wbits: 32 detects either header, 15 is the largest window (zlib manual, inflateInit2)."""

_RAW = -15
"""The same window without any header (zlib manual, inflateInit2)."""

_FOR_PAGES = ("/api/public/", "/v1/")
"""What an allowed origin may reach: where events are posted, and nothing else."""

_PREFLIGHT_AGE_S = "600"
"""How long a browser may remember a preflight: ten minutes, so that a change is soon in force."""

_READABLE = "Retry-After, Idempotent-Replayed"
"""What an allowed page may read beside the body and its type."""


@dataclass(slots=True, kw_only=True)
class Guard:
    """What the operator allows. *allowed_hosts* are names beside the loopback ones, without port;
    *socket_users* who may use the Unix socket, None: whoever can open it.

    All connections share it, so that what the daemon changes here counts for the next request.
    """

    allowed_hosts: frozenset[str]
    allowed_origins: frozenset[str]
    max_body_bytes: int
    socket_users: frozenset[int] | None = None

    def adopt(self, other: Guard) -> None:
        """Allow what *other* allows."""
        self.allowed_hosts = other.allowed_hosts
        self.allowed_origins = other.allowed_origins
        self.max_body_bytes = other.max_body_bytes
        self.socket_users = other.socket_users

    def judge(self, headers: Mapping[str, str], path: str) -> Answer | None:
        """Return the refusal that the head has earned; None if the body may be read."""
        return (
            self._judge_host(headers)
            or self._judge_origin(headers, path)
            or self._judge_body(headers)
        )

    def judge_peer(self, peer: int | None) -> Answer | None:
        """Return the refusal of a user at the other end of a Unix socket, None over TCP; as `judge`."""
        if peer is None or self.socket_users is None or peer in self.socket_users:
            return None
        return _forbid(
            f"user {peer} may not use this socket; if it is an app's, add its user to"
            " ingest.unix_socket_users"
        )

    def cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that let an allowed page read the answer; none for anybody else.

        Source: Fetch standard, CORS protocol; Private Network Access for the last one, which asks
        in Chrome before 142. Its successor, Local Network Access, asks the person and no server.
        """
        origin = headers.get("origin")
        if origin is None or origin not in self.allowed_origins:
            return {}
        granted = {
            "Access-Control-Allow-Origin": origin,
            # A beacon always comes with credentials: its JSON would be dropped without a word.
            # Nothing that is answered here depends on any.
            "Access-Control-Allow-Credentials": "true",
            "Access-Control-Expose-Headers": _READABLE,
            "Vary": "Origin",
        }
        if "access-control-request-method" in headers:
            granted["Access-Control-Allow-Methods"] = "POST"
            granted["Access-Control-Allow-Headers"] = headers.get(
                "access-control-request-headers", "content-type"
            )
            granted["Access-Control-Max-Age"] = _PREFLIGHT_AGE_S
        if "access-control-request-private-network" in headers:
            granted["Access-Control-Allow-Private-Network"] = "true"
        return granted

    def _judge_host(self, headers: Mapping[str, str]) -> Answer | None:
        host = headers.get("host", "")
        name = _without_port(host).lower()
        if name in _LOOPBACK_HOSTS or name in self.allowed_hosts:
            return None
        return _forbid(
            f"Host: {host[:100]!r} is not a name of this agent; use 127.0.0.1 or localhost,"
            " or add the name to ingest.allowed_hosts"
        )

    def _judge_origin(self, headers: Mapping[str, str], path: str) -> Answer | None:
        origin = headers.get("origin")
        if origin is None:
            # A GET for a page comes without Origin. Browsers say this instead, of loopback names
            # alone; with other names, what is answered is of no use to the page (`agent.ingest.wire`).
            if headers.get("sec-fetch-site") in {"cross-site", "same-site"}:
                return _forbid("Sec-Fetch-Site: a page of another origin may not ask")
            return None
        # The agent's own pages: Host was judged already.
        if origin == f"http://{headers.get('host')}":
            return None
        # Others may post events: not look into the outbox, nor steer the agent.
        if origin in self.allowed_origins:
            if behind_prefix(path).startswith(_FOR_PAGES):
                return None
            return _forbid(
                f"Origin: {origin[:100]!r} may post events to /api/public/apps/ or /v1/, and nothing"
                " else; ask from a program on this machine"
            )
        return _forbid(
            f"Origin: {origin[:100]!r} may not post here; if the page is yours, add its origin"
            " to ingest.allowed_origins"
        )

    def _judge_body(self, headers: Mapping[str, str]) -> Answer | None:
        encoding = headers.get("content-encoding")
        if encoding is not None and encoding.lower() not in _ENCODINGS:
            return refuse(
                415,
                "AGENT_UNSUPPORTED_ENCODING",
                f"Content-Encoding: {encoding.lower()[:40]!r} is not supported;"
                " send gzip, deflate or none",
                close=True,
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return self.too_large()
        return None

    def too_large(self) -> Answer:
        return refuse(
            413,
            "FST_ERR_CTP_BODY_TOO_LARGE",
            f"body: over the limit of {self.max_body_bytes} bytes; send less, or split it",
            close=True,
        )

    def inflate(self, body: bytes, encoding: str) -> bytes | Answer:
        """Return the body without its Content-Encoding, or the refusal of a bad or huge one."""
        if encoding.lower() == "identity":
            return body
        # RFC 9110, 8.4.1.2: some call it deflate and leave out the header that belongs to it.
        bare = encoding.lower() == "deflate" and not _has_header(body)
        inflater = zlib.decompressobj(wbits=_RAW if bare else _GZIP_OR_ZLIB)
        try:
            plain = inflater.decompress(body, self.max_body_bytes + 1)
        except zlib.error as exc:
            return _bad_encoding(encoding, str(exc))
        if len(plain) > self.max_body_bytes:
            return self.too_large()
        if not inflater.eof:
            return _bad_encoding(encoding, "the data ends too early")
        if inflater.unused_data:
            return _bad_encoding(encoding, "something follows the compressed data")
        return plain


def _has_header(body: bytes) -> bool:
    """Tell whether compressed data begins as RFC 1950 (zlib) or 1952 (gzip) has it."""
    first = int.from_bytes(body[:2], "big")
    return first == 0x1F8B or (first >> 8 & 0x0F == 8 and first % 31 == 0)


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _forbid(message: str) -> Answer:
    return refuse(403, "AGENT_FORBIDDEN", message, close=True)


def _bad_encoding(encoding: str, why: str) -> Answer:
    return refuse(
        400,
        "AGENT_BAD_ENCODING",
        f"body: not valid {encoding} ({why}); send it as the Content-Encoding header says",
    )
