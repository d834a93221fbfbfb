"""Requests that no honest client sends, by what they try; each with its right answers.

A table: name, bytes, the statuses of all answers, and how many events are stored. Whatever is
hidden in a body, behind a refusal or in a header has the messageId `HIDDEN`, which is stored never.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass

from security.raw import TRACK, chunked, event, head, post

MIB = 1024 * 1024
LIMIT_BYTES = 256 * 1024
"""`ingest.max_body` of the agent that this is sent to."""

STAMP_BYTES = len(',"timestamp":"2026-11-23T10:00:00.000Z"')
"""What the agent adds to an event without a timestamp; the limit is on what will be sent, too."""

HIDDEN = "hidden"
WITHIN = post(event(HIDDEN))
"""A whole request, where none may be found."""

CHUNKED = "Transfer-Encoding: chunked"
GZIP = "Content-Encoding: gzip"
DEFLATE = "Content-Encoding: deflate"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    sent: bytes
    answers: tuple[int, ...]
    stored: int = 0


def _ambiguous(name: str, *lines: str, body: bytes = b"") -> Case:
    return Case(name, head(*lines) + body + WITHIN, (400,))


def _in_chunks(name: str, body: bytes, answers: tuple[int, ...] = (400,), stored: int = 0) -> Case:
    return Case(name, head(CHUNKED) + body, answers, stored)


def _folded(value: str) -> bytes:
    return head(f"X: a\r\n {value}", f"Content-Length: {len(event('folded'))}") + event("folded")


_SOUND = event("sound")
_LENGTH = f"Content-Length: {len(_SOUND)}"

SMUGGLING = [
    _ambiguous("length, then chunked", "Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
    _ambiguous("chunked, then length", CHUNKED, "Content-Length: 5", body=b"0\r\n\r\n"),
    _ambiguous("length 0 and chunked", "Content-Length: 0", CHUNKED, body=b"0\r\n\r\n"),
    _ambiguous("chunked twice", CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    _ambiguous("chunked, chunked", "Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"),
    _ambiguous("chunked, identity", "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    _ambiguous("identity", "Transfer-Encoding: identity", _LENGTH, body=_SOUND),
    _ambiguous("gzip, chunked", "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    _ambiguous("xchunked", "Transfer-Encoding: xchunked", _LENGTH, body=_SOUND),
    _ambiguous("chunked in quotes", 'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"),
    _ambiguous("chunked behind a vertical tab", "Transfer-Encoding: \x0bchunked"),
    _ambiguous("chunked before a form feed", "Transfer-Encoding: chunked\x0c"),
    _ambiguous("an empty coding", "Transfer-Encoding: ", _LENGTH, body=_SOUND),
    _ambiguous("chunked with a parameter", "Transfer-Encoding: chunked;q=1", body=b"0\r\n\r\n"),
    _ambiguous("a space before its colon", "Transfer-Encoding : chunked", _LENGTH, body=_SOUND),
    _ambiguous("a tab before its colon", "Transfer-Encoding\t: chunked", _LENGTH, body=_SOUND),
    _ambiguous("a folded coding", "Transfer-Encoding:\r\n chunked", _LENGTH, body=_SOUND),
    _ambiguous("a NUL in its name", "Transfer-Encoding\0: chunked", _LENGTH, body=_SOUND),
    _ambiguous("a NUL in its value", "Transfer-Encoding: chunked\0", _LENGTH, body=_SOUND),
    _ambiguous("a bare LF before it", f"X: y\nTransfer-Encoding: chunked\r\n{_LENGTH}"),
    _ambiguous("a bare CR before it", f"X: y\rTransfer-Encoding: chunked\r\n{_LENGTH}"),
    _ambiguous("two lengths", _LENGTH, "Content-Length: 0", body=_SOUND),
    _ambiguous("the same length twice", _LENGTH, _LENGTH, body=_SOUND),
    _ambiguous("a list of lengths", f"{_LENGTH}, {len(_SOUND)}", body=_SOUND),
    _ambiguous("a length with a plus", f"Content-Length: +{len(_SOUND)}", body=_SOUND),
    _ambiguous("a length with a minus", f"Content-Length: -{len(_SOUND)}", body=_SOUND),
    _ambiguous("a length in hex", f"Content-Length: {len(_SOUND):#x}", body=_SOUND),
    _ambiguous("a length in octal", f"Content-Length: {len(_SOUND):#o}", body=_SOUND),
    _ambiguous("a length with an underscore", "Content-Length: 5_0", body=_SOUND),
    _ambiguous("a length in other digits", "Content-Length: \xb2\xb3", body=_SOUND),
    _ambiguous("a length with a fraction", f"{_LENGTH}.0", body=_SOUND),
    _ambiguous("an exponent", "Content-Length: 5e1", body=_SOUND),
    _ambiguous("a length in two words", "Content-Length: 5 0", body=_SOUND),
    _ambiguous("an empty length", "Content-Length:", body=_SOUND),
    _ambiguous("a space before the length's colon", _LENGTH.replace(":", " :"), body=_SOUND),
    _ambiguous("a folded length", "Content-Length:\r\n 5", body=_SOUND),
    Case("a length past 64 bits", head(f"Content-Length: {2**64 + 5}") + WITHIN, (400,)),
    Case("a folded header", _folded("b") + WITHIN, (400,)),
    Case("a request folded in", _folded(WITHIN.decode()) + WITHIN, (400,)),
    Case("a length in HTTP/1.0 with chunked", head(CHUNKED, start=f"POST {TRACK} HTTP/1.0"), (400,)),
    Case("a request in a body", post(WITHIN), (400,)),
    Case("a request in a string", post(event("in-a-string", note="POST / HTTP/1.1")), (204,), 1),
    Case("a request behind a refusal", head("Content-Length: x") + WITHIN, (400,)),
    Case("a request behind a stranger's", post(WITHIN, host="evil.example") + WITHIN, (403,)),
    Case("a request behind one that closes", post(event("closing"), "Connection: close") + WITHIN, (204,), 1),
    Case("a request behind HTTP/1.0", post(event("old"), start=f"POST {TRACK} HTTP/1.0") + WITHIN, (204,), 1),
    Case("a request in the body of a GET", post(WITHIN, start="GET /healthz HTTP/1.1"), (200,)),
    Case("a request in the body of a HEAD", post(WITHIN, start="HEAD /healthz HTTP/1.1"), (200,)),
    Case("a request in a chunked GET", chunked(WITHIN).replace(b"POST /api/public/apps/track", b"GET /healthz", 1), (200,)),
    Case("a request in a body too large by what it says", head("Content-Length: 9999999") + WITHIN, (413,)),
]  # fmt: skip

CHUNKS = [
    _in_chunks("a size in capitals", b"%X\r\n%b\r\n0\r\n\r\n" % (len(event("caps")), event("caps")), (204,), 1),
    _in_chunks("zeros before a size", b"0000%x\r\n%b\r\n0\r\n\r\n" % (len(event("zeros")), event("zeros")), (204,), 1),
    _in_chunks("chunks of one byte", b"".join(b"1\r\n%c\r\n" % c for c in event("ones")) + b"0\r\n\r\n", (204,), 1),
    _in_chunks("a small extension", b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(event("ext")), event("ext")), (204,), 1),
    _in_chunks("a trailer", b"%x\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(event("trailer")), event("trailer")), (204,), 1),
    _in_chunks("a host in the trailers", b"%x\r\n%b\r\n0\r\nHost: evil.example\r\n\r\n" % (len(event("late")), event("late")), (204,), 1),
    _in_chunks("a signed size", b"+5\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a negative size", b"-5\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a size with 0x", b"0x5\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a size past 64 bits", b"10000000000000005\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a size of 64 bits", b"FFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n" + WITHIN, ()),
    _in_chunks("no size", b"\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a space before a size", b" 5\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a space behind a size", b"5 \r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a bare LF behind a size", b"5\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a bare CR behind a size", b"5\rhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a bare LF behind a chunk", b"5\r\nhello\n0\r\n\r\n" + WITHIN),
    _in_chunks("a bare LF in an extension", b"5;\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a chunk longer than it says", b"2\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a chunk shorter than it says", b"7\r\nhello\r\n0\r\n\r\n" + WITHIN),
    _in_chunks("a length in the trailers", b"0\r\nContent-Length: 5\r\n\r\n" + WITHIN),
    _in_chunks("a huge extension", b"5;" + b"x" * MIB + b"\r\nhello\r\n0\r\n\r\n", (431,)),
    _in_chunks("many extensions", b"5" + b";a=b" * 300_000 + b"\r\nhello\r\n0\r\n\r\n", (431,)),
    _in_chunks("a huge trailer", b"0\r\nX: " + b"x" * MIB + b"\r\n\r\n", (431,)),
    _in_chunks("many trailers", b"0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", (431,)),
    _in_chunks("more than a body may have", b"10000\r\n%b\r\n" % bytes(65_536) * 5 + b"0\r\n\r\n", (413,)),
    _in_chunks("more in one chunk", b"%x\r\n%b\r\n0\r\n\r\n" % (MIB, bytes(MIB)), (413,)),
]  # fmt: skip


def _zipped(name: str, plain: bytes, answers: tuple[int, ...], stored: int = 0) -> Case:
    return Case(name, post(gzip.compress(plain, mtime=0), GZIP), answers, stored)


def _deflated(name: str, body: bytes, answers: tuple[int, ...], stored: int = 0) -> Case:
    return Case(name, post(body, DEFLATE), answers, stored)


def _headless(plain: bytes) -> bytes:
    squeezing = zlib.compressobj(wbits=-15)
    return squeezing.compress(plain) + squeezing.flush()


def _nested(plain: bytes, times: int) -> bytes:
    for _ in range(times):
        plain = gzip.compress(plain, mtime=0)
    return plain


def _spaced(message_id: str, size_bytes: int) -> bytes:
    """Return an event that grows to *size_bytes* of which zlib keeps hardly one."""
    return event(message_id, note=" " * (size_bytes - len(event(message_id, note=""))))


BOMBS = [
    _zipped("gzip", event("gzip"), (204,), 1),
    _zipped("gzip nearly up to the limit", _spaced("nearly", LIMIT_BYTES - STAMP_BYTES), (204,), 1),
    _zipped("gzip one byte over the limit", _spaced(HIDDEN, LIMIT_BYTES + 1), (413,)),
    _zipped("64 MiB of zeros", bytes(64 * MIB), (413,)),
    _zipped("64 MiB of spaces before an event", b" " * 64 * MIB + event(HIDDEN), (413,)),
    # Unpacked once and no more, so that one that contains itself is no other.
    _zipped("gzip in gzip", gzip.compress(event(HIDDEN), mtime=0), (400,)),
    Case("a bomb ten times wrapped", post(_nested(bytes(64 * MIB), 10), GZIP), (400,)),
    Case("several members", post(_nested(event(HIDDEN), 1) * 2, GZIP), (400,)),
    Case("10,000 empty members", post(_nested(b"", 1) * 10_000, GZIP), (400,)),
    Case("an event behind an empty member", post(_nested(b"", 1) + _nested(event(HIDDEN), 1), GZIP), (400,)),
    Case("a name that never ends", post(b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * 200_000, GZIP), (400,)),
    Case("a cut member", post(_nested(event(HIDDEN), 1)[:-9], GZIP), (400,)),
    Case("a wrong checksum", post(_nested(event(HIDDEN), 1)[:-8] + bytes(8), GZIP), (400,)),
    Case("a wrong length", post(_nested(event(HIDDEN), 1)[:-4] + b"\xff" * 4, GZIP), (400,)),
    Case("something behind a member", post(_nested(event(HIDDEN), 1) + b"{}", GZIP), (400,)),
    Case("a bomb in chunks", chunked(_nested(bytes(64 * MIB), 1), GZIP), (413,)),
    Case("gzip that is none", post(event(HIDDEN), GZIP), (400,)),
    Case("an empty gzip", post(b"", GZIP), (400,)),
    Case("gzip unannounced", post(_nested(event(HIDDEN), 1)), (400,)),
    Case("two encodings", post(_nested(event(HIDDEN), 2), "Content-Encoding: gzip, gzip"), (415,)),
    Case("two encoding headers", post(_nested(event(HIDDEN), 2), GZIP, GZIP), (400,)),
    Case("brotli", post(event(HIDDEN), "Content-Encoding: br"), (415,)),
    Case("an encoding of 8 KiB", post(event(HIDDEN), "Content-Encoding: " + "x" * 8192), (415,)),
    _deflated("deflate", zlib.compress(event("deflate")), (204,), 1),
    _deflated("a deflate bomb", zlib.compress(bytes(64 * MIB)), (413,)),
    _deflated("deflate with a preset dictionary", b"\x78\xbb\x00\x00\x00\x01" + bytes(9), (400,)),
    _deflated("stored blocks without an end", b"\x78\x01" + b"\x00\x00\x00\xff\xff" * 20_000, (400,)),
]  # fmt: skip


def _to(target: str, answers: tuple[int, ...], stored: int = 0, message_id: str = HIDDEN) -> Case:
    """A post to *target*, whose bytes stand as they are in the request line."""
    sent = post(event(message_id), start=f"POST {target} HTTP/1.1")
    shown = target if len(target) < 60 else f"{target[:20]}... of {len(target)} bytes"
    return Case(f"to {shown!r}", sent, answers, stored)


TARGETS = [
    _to("/api/public/apps/%74rack", (204,), 1, "percent-t"),
    _to("/api%2fpublic%2fapps%2ftrack", (204,), 1, "percent-slash"),
    _to("/api/public/apps/track?x=y", (204,), 1, "query"),
    _to("/api/public/apps/track/", (404,)),
    _to("//api/public/apps/track", (404,)),
    _to("/api/public/apps/../apps/track", (404,)),
    _to("/api/public/apps/%2e%2e/apps/track", (404,)),
    _to("/./api/public/apps/track", (404,)),
    _to("/api/public/apps/track%00", (404,)),
    _to("/api/public/apps/track\0", (400,)),
    _to("/api/public/apps/track%0d%0aHost:%20evil.example", (404,)),
    _to("/api/public/apps/trac%c1%ab", (404,)),
    _to("/api/public/apps/%e0%80%f4rack", (404,)),
    _to("/api/public/apps/track%", (404,)),
    _to("/api/public/apps/track%zz", (404,)),
    _to("/api/public/apps/%2574rack", (404,)),
    _to("/api/public/apps/track;x=y", (404,)),
    _to("/API/public/apps/track", (404,)),
    _to("/api\\public\\apps\\track", (404,)),
    _to("/api/public/apps/track#x", (400,)),
    _to("api/public/apps/track", (400,)),
    _to(f"http://127.0.0.1{TRACK}", (400,)),
    _to(f"http://evil.example{TRACK}", (400,)),
    _to(f"http://evil.example@127.0.0.1{TRACK}", (400,)),
    _to("*", (400,)),
    _to("/\xe9", (400,)),
    _to("/w/../api/public/apps/track", (404,)),
    _to("/w//api/public/apps/track", (404,)),
    _to("/w/" + "x" * 1000 + TRACK, (404,)),
    _to("/" + "x" * 8191, (404,)),
    _to("/" + "x" * 8192, (414,)),
    _to("/" + "x" * 500_000, (414,)),
    _to("/" + "%00" * 2000, (404,)),
    _to("/api/agent/events/%2e%2e%2f%2e%2e%2fetc%2fpasswd", (404,)),
    _to("/?" + "a=b&" * 1000, (404,)),
]


def _start(name: str, start: str, answers: tuple[int, ...], *lines: str) -> Case:
    return Case(name, head(*lines, start=start), answers)


METHODS = [
    _start("GET of a route for posts", f"GET {TRACK} HTTP/1.1", (404,)),
    _start("PUT", f"PUT {TRACK} HTTP/1.1", (404,)),
    _start("DELETE", f"DELETE {TRACK} HTTP/1.1", (404,)),
    _start("PATCH", f"PATCH {TRACK} HTTP/1.1", (404,)),
    _start("TRACE", f"TRACE {TRACK} HTTP/1.1", (404,)),
    _start("CONNECT", "CONNECT evil.example:443 HTTP/1.1", (400,)),
    _start("CONNECT to a path", f"CONNECT {TRACK} HTTP/1.1", (400,)),
    _start("OPTIONS *", "OPTIONS * HTTP/1.1", (400,)),
    _start("PROPFIND", f"PROPFIND {TRACK} HTTP/1.1", (404,)),
    _start("an unknown method", f"BREW {TRACK} HTTP/1.1", (400,)),
    _start("lower case", f"post {TRACK} HTTP/1.1", (400,)),
    _start("a method of 100,000 letters", "P" * 100_000 + " / HTTP/1.1", (400,)),
    _start("a method in another's place", f"POST{TRACK} HTTP/1.1", (400,)),
    _start("HTTP/0.9", f"POST {TRACK}", (400,)),
    _start("HTTP/1.2", f"POST {TRACK} HTTP/1.2", (400,)),
    _start("HTTP/2.0", f"POST {TRACK} HTTP/2.0", (400,)),
    _start("HTTP/11", f"POST {TRACK} HTTP/11", (400,)),
    _start("http/1.1", f"POST {TRACK} http/1.1", (400,)),
    _start("two spaces", f"POST  {TRACK} HTTP/1.1", (400,)),
    _start("a tab", f"POST\t{TRACK} HTTP/1.1", (400,)),
    _start("RTSP", "SETUP rtsp://127.0.0.1/x RTSP/1.0", (400,)),
    Case("HTTP/0.9 alone", b"GET /\r\n", ()),
    Case("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + WITHIN, (400,)),
    Case("TLS", bytes.fromhex("160301020001 0001fc0303".replace(" ", "")) + bytes(500), (400,)),
    Case("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", (400,)),
    Case("a SOCKS greeting", b"\x05\x01\x00", (400,)),
    Case("zeros", bytes(10_000), (400,)),
    Case("blank lines first", b"\r\n" * 10 + post(event("blank")), (204,), 1),
    Case("a mark of byte order first", b"\xef\xbb\xbf" + WITHIN, (400,)),
]

_OFFER = ("Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk", "Upgrade: h2c")

HEADERS = [
    Case("Expect: 100-continue", post(event("expect"), "Expect: 100-continue"), (100, 204), 1),
    Case("another expectation", post(event("expect-x"), "Expect: 200-ok"), (204,), 1),
    Case("an expecting stranger", post(WITHIN, "Expect: 100-continue", host="evil.example"), (403,)),
    Case("an expectation too large", head("Expect: 100-continue", "Content-Length: 9999999"), (413,)),
    Case("h2c", post(event("h2c"), *_OFFER), (204,), 1),
    Case("h2c, then more", post(event("h2c-2"), *_OFFER) + post(event("h2c-2")), (204, 204), 1),
    Case("h2c to a stranger", post(WITHIN, *_OFFER, host="evil.example"), (403,)),
    Case("a websocket", head("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==", start="GET /healthz HTTP/1.1") + WITHIN[:0], (200,)),
    Case("an offer and both lengths", head(*_OFFER, CHUNKED, "Content-Length: 5") + WITHIN, (400,)),
    Case("two hosts", post(event(HIDDEN), "Host: 127.0.0.1"), (400,)),
    Case("two hosts, one foreign", post(event(HIDDEN), "Host: evil.example"), (400,)),
    Case("a folded host", post(event(HIDDEN), host="127.0.0.1\r\n .evil.example"), (400,)),
    Case("a host with a NUL", post(event(HIDDEN), host="127.0.0.1\0.evil.example"), (400,)),
    Case("no host", post(event(HIDDEN)).replace(b"Host: 127.0.0.1\r\n", b""), (403,)),
    Case("an empty host", post(event(HIDDEN), host=""), (403,)),
    Case("a host in X-Forwarded-Host", post(event(HIDDEN), "X-Forwarded-Host: 127.0.0.1", host="evil.example"), (403,)),
    Case("two content types", post(event(HIDDEN), "Content-Type: application/json"), (400,)),
    Case("a method overridden", post(event("overridden"), "X-HTTP-Method-Override: DELETE"), (204,), 1),
    Case("99 headers", post(event("99"), *[f"X{n}: y" for n in range(96)]), (204,), 1),
    Case("101 headers", post(event(HIDDEN), *[f"X{n}: y" for n in range(98)]), (431,)),
    Case("100,000 headers", post(event(HIDDEN), *[f"X{n}: y" for n in range(100_000)]), (431,)),
    Case("one name 100,000 times", post(event(HIDDEN), *["X: y"] * 100_000), (431,)),
    Case("a header of 30,000 bytes", post(event("long"), "X: " + "y" * 30_000), (204,), 1),
    Case("a header of 1 MiB", post(event(HIDDEN), "X: " + "y" * MIB), (431,)),
    Case("a name of 1 MiB", post(event(HIDDEN), "y" * MIB + ": y"), (431,)),
    Case("a cookie flood", post(event(HIDDEN), *["Cookie: " + "a=b; " * 1000] * 20), (431,)),
    Case("no name", post(event(HIDDEN), ": y"), (400,)),
    Case("no colon", post(event(HIDDEN), "X"), (400,)),
    Case("a NUL in a name", post(event(HIDDEN), "X\0: y"), (400,)),
    Case("a NUL in a value", post(event(HIDDEN), "X: \0"), (400,)),
    Case("a control character", post(event(HIDDEN), "X: \x01"), (400,)),
    Case("DEL in a value", post(event(HIDDEN), "X: \x7f"), (400,)),
    Case("raw bytes in a value", post(event("latin"), "X: \xe9\xff"), (204,), 1),
    Case("a space in a name", post(event(HIDDEN), "X Y: z"), (400,)),
    Case("bare line feeds", post(event(HIDDEN)).replace(b"\r\n", b"\n"), (400,)),
    Case("bare carriage returns", post(event(HIDDEN)).replace(b"\r\n", b"\r"), (400,)),
    Case("a bare LF at the end of the head", post(event(HIDDEN)).replace(b"\r\n\r\n", b"\r\n\n"), (400,)),
    Case("a hopping Content-Type", post(event("hop"), "Connection: content-type, keep-alive"), (204,), 1),
    Case("a range", post(event("range"), "Range: bytes=0-18446744073709551615"), (204,), 1),
]  # fmt: skip


def _body(name: str, body: bytes, status: int = 400, stored: int = 0) -> Case:
    return Case(name, post(body), (status,), stored)


BODIES = [
    _body("nothing", b""),
    _body("a space", b" "),
    _body("half an object", event(HIDDEN)[:-1]),
    _body("two objects", event(HIDDEN) * 2),
    _body("an array of events", b"[" + event(HIDDEN) + b"]"),
    _body("NaN", event(HIDDEN)[:-1] + b',"properties":{"x":NaN}}'),
    _body("a NUL behind", event(HIDDEN) + b"\0"),
    _body("a comment", b"/* */" + event(HIDDEN)),
    _body("a byte order mark", b"\xef\xbb\xbf" + event(HIDDEN)),
    _body("UTF-16", event(HIDDEN).decode().encode("utf-16")),
    _body("UTF-7", event(HIDDEN) + b"+AAA-"),
    _body("latin-1", event("caf\xe9", note="x").decode("utf-8").encode("latin-1")),
    _body("an overlong slash", event(HIDDEN, note="x").replace(b'"x"', b'"\xc0\xaf"')),
    _body("half a surrogate", event(HIDDEN, note="\\ud800")),
    _body("100,000 brackets", b"[" * 100_000),
    _body("40,000 objects", b'{"a":' * 40_000),
    _body("nested too deep", event(HIDDEN)[:-1] + b',"properties":{"x":' + b"[" * 200 + b"]" * 200 + b"}}"),
    _body("a huge number", event(HIDDEN)[:-1] + b',"properties":{"x":' + b"9" * 400 + b"}}"),
    _body("100,000 digits", event(HIDDEN)[:-1] + b',"properties":{"x":' + b"9" * 100_000 + b"}}"),
    _body("a huge exponent", event(HIDDEN)[:-1] + b',"properties":{"x":1e999999999}}'),
    _body("__proto__", event(HIDDEN)[:-1] + b',"properties":{"__proto__":{"x":1}}}'),
    _body("__proto__ in escapes", event(HIDDEN)[:-1] + b',"properties":{"\\u005f_proto__":{"x":1}}}'),
    _body("10,000 keys", event("keys")[:-1] + b',"properties":{' + b",".join(b'"k%d":1' % n for n in range(10_000)) + b"}}", 204, 1),
    _body("one key 10,000 times", event("twins")[:-1] + b',"properties":{' + b",".join([b'"k":1'] * 10_000) + b"}}", 204, 1),
    _body("a messageId of 100,000 letters", event("m" * 100_000), 204, 1),
    _body("a NUL in the messageId", event("nul\\u0000id"), 204, 1),
    _body("SQL in the messageId", event("'; DROP TABLE events; --"), 204, 1),
    Case("JSON that says it is a form", post(event(HIDDEN)).replace(b"application/json", b"application/x-www-form-urlencoded"), (415,)),
    Case("JSON that says it is text", post(event(HIDDEN)).replace(b"application/json", b"text/plain"), (415,)),
    Case("JSON of several parts", post(event(HIDDEN)).replace(b"application/json", b"multipart/form-data; boundary=x"), (415,)),
    Case("a type that begins alike", post(event(HIDDEN)).replace(b"application/json", b"application/jsonp"), (415,)),
    Case("no content type", post(event(HIDDEN)).replace(b"Content-Type: application/json\r\n", b""), (415,)),
]  # fmt: skip

HALVES = [
    Case("nothing at all", b"", ()),
    Case("half a method", b"PO", ()),
    Case("half a request line", b"POST /api", ()),
    Case("half a head", head()[:-2], ()),
    Case("a head without its body", head("Content-Length: 50"), ()),
    Case("half a body", post(event(HIDDEN))[:-5], ()),
    Case("half a chunk", head(CHUNKED) + b"50\r\n" + event(HIDDEN), ()),
    Case("no last chunk", chunked(event(HIDDEN))[:-5], ()),
    Case("no end of the trailers", chunked(event(HIDDEN))[:-2], ()),
    Case("a whole one, then half", post(event("whole")) + WITHIN[:-5], (204,), 1),
    Case("half a gzip, as it says", post(gzip.compress(event(HIDDEN), mtime=0)[:-12], GZIP), (400,)),
    Case("ten in one piece", post(event("ten")) * 10, (204,) * 10, 1),
]  # fmt: skip

GROUPS = {
    "smuggling": SMUGGLING,
    "chunks": CHUNKS,
    "bombs": BOMBS,
    "targets": TARGETS,
    "methods": METHODS,
    "headers": HEADERS,
    "bodies": BODIES,
    "halves": HALVES,
}
