"""Values as people write them: durations, sizes, secrets, addresses. Pure.

Owns their types and the forms that are accepted. A ValueError here is half a message to a person:
what is wrong and what to write; whoever calls puts the file, key and value in front. What a type's
`text` gives, its `parse` reads back as the same value. The configuration calls in.
"""

from __future__ import annotations

import ipaddress
import json
import re
from base64 import b64decode
from contextlib import suppress
from datetime import time
from decimal import Decimal
from hashlib import sha256
from os import fsencode
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

MASK = "********"

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB

_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_UNITS_BYTES = {
    "GiB": GiB,
    "GB": 1_000_000_000,
    "MiB": MiB,
    "MB": 1_000_000,
    "KiB": KiB,
    "KB": 1_000,
    "B": 1,
}

# Twelve digits hold any value that is meant, and keep the arithmetic exact. Ranges are the keys'.
_NUMBER = r"(\d{1,12}(?:\.\d{1,12})?)"

# The largest unit first and each at most once, so that "5m 3m" is a slip and not eight minutes.
_DURATION = re.compile(
    r"\s*".join(rf"(?:{_NUMBER}\s*{unit}(?![a-z]))?" for unit in _UNITS_MS), re.ASCII
)
_SIZE = re.compile(rf"{_NUMBER}\s*({'|'.join(_UNITS_BYTES)})", re.ASCII)

_SOCKET_PATH_BYTES = 107
"""What fits into sun_path with its final zero. Source: unix(7)."""


class Seconds(float):
    """A duration in seconds, to the millisecond."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the duration that a person wrote. Raises ValueError, which says how to write it."""
        if _is_number(value):
            raise ValueError(f'a duration needs a unit: write "{value}s", or "{value}ms", m, h, d')
        if not isinstance(value, str):
            raise ValueError('expected a duration in quotes, such as "30s"')  # noqa: TRY004  # msgspec passes it on
        found = _DURATION.fullmatch(value.strip())
        if found is None or not any(found.groups()):
            raise ValueError(
                'expected a duration: numbers with the units d, h, m, s, ms, such as "30s" or "1h30m"'
            )
        wait_ms = sum(
            Decimal(number) * unit_ms
            for number, unit_ms in zip(found.groups(), _UNITS_MS.values(), strict=True)
            if number is not None
        )
        if wait_ms != int(wait_ms):
            raise ValueError("expected a duration of whole milliseconds")
        return cls(int(wait_ms) / 1000)

    @property
    def text(self) -> str:
        """The duration in its largest units: 5400 s is "1h30m"."""
        rest_ms = round(self * 1000)
        parts = []
        for unit, unit_ms in _UNITS_MS.items():
            number, rest_ms = divmod(rest_ms, unit_ms)
            if number:
                parts.append(f"{number}{unit}")
        return "".join(parts) or "0s"


class Bytes(int):
    """A size in bytes."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the size that a person wrote. Raises ValueError, which says how to write it."""
        if _is_number(value):
            raise ValueError(f'a size needs a unit: write "{value}B", or KiB, MiB, GiB, KB, MB, GB')
        if not isinstance(value, str):
            raise ValueError('expected a size in quotes, such as "5MiB"')  # noqa: TRY004  # msgspec passes it on
        found = _SIZE.fullmatch(value.strip())
        if found is None:
            raise ValueError(
                "expected a size: a number with one of the units KiB, MiB, GiB (by 1024), KB, MB, GB"
                ' (by 1000) or B, such as "5MiB"'
            )
        size = Decimal(found[1]) * _UNITS_BYTES[found[2]]
        if size != int(size):
            raise ValueError("expected a size of whole bytes")
        return cls(size)

    @property
    def text(self) -> str:
        """The size in the one unit that needs the smallest whole number: 5,242,880 is "5MiB"."""
        unit = next(
            unit for unit, size in _UNITS_BYTES.items() if (self and self % size == 0) or size == 1
        )
        return f"{self // _UNITS_BYTES[unit]}{unit}"


class Secret:
    """A text that shows itself only when asked to: repr, str and formatting give a mask."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the text itself, for the one place that sends it."""
        return self._value

    def __repr__(self) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


class WriteKey(Secret):
    """The key of a workspace, bare or with a scheme ("Basic ...")."""

    __slots__ = ()

    @property
    def authorization(self) -> str:
        """The value of the Authorization header: as it is with a scheme, else as Bearer."""
        key = self.reveal()
        return key if " " in key else f"Bearer {key}"

    @property
    def bare(self) -> str:
        """The key without a scheme: the value of the PublicWriteKey header."""
        return self.reveal().partition(" ")[2].strip() or self.reveal()


def app_keys(authorization: str) -> list[str]:
    """Return what may be the write key in a value of Authorization, however an app sends it.

    Bare, behind a scheme, or as the user name of Basic authentication without a password, as
    Segment's libraries do; a key that is Base64 itself may look like that.
    """
    first, _, rest = authorization.strip().partition(" ")
    key = rest.strip() or first
    found = [key] if key else []
    if rest and first.lower() == "basic":
        with suppress(ValueError):  # then it is a key as it stands
            user, colon, password = b64decode(key, validate=True).decode().partition(":")
            if user and colon and not password:
                found.append(user)
    return found


TOKEN_PREFIX = "tat_"  # noqa: S105  # what every token has in common
"""Begins every app's token, so that it is told from a write key, and found where it leaked."""


def app_token(authorization: str) -> str | None:
    """Return the app's token in a value of Authorization, however an app sends it."""
    return next((key for key in app_keys(authorization) if key.startswith(TOKEN_PREFIX)), None)


def token_digest(token: str) -> bytes:
    """Return what is kept of a token. It is 256 random bits: no guess comes near, so no salt is
    needed, nor a digest that takes long.
    """
    return sha256(token.encode()).digest()


def key_digest(key: str) -> str:
    """Return what stands for a key where the key itself may not: its SHA-256 in hex."""
    return sha256(key.encode()).hexdigest()


class ProxyUrl(str):
    """An address that may hold a user and password, which its repr keeps to itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(without_credentials(self))


def proxy_secrets(url: str) -> list[str]:
    """Return what of a proxy's address must not be shown: its password, and what is sent of it."""
    parts = urlsplit(url)
    if not parts.password:
        return []
    password = unquote(parts.password)
    return [parts.password, password, f"{unquote(parts.username or '')}:{password}"]


# --- what a text may be, beyond its type: each returns it in one form, or says what to write ---


def loopback(host: str) -> str:
    if not _stays_here(host):
        raise ValueError(
            "not a loopback address. Whoever reaches the agent may post, so it listens on this"
            ' machine alone: use "127.0.0.1", "::1" or "localhost"'
        )
    return host


def host_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", name, re.ASCII):
            raise ValueError(
                f"{json.dumps(name)} is not a host name. Give names alone, without scheme, port or"
                ' wildcard, such as "till-7.local"'
            )
    return tuple(name.lower() for name in names)


_TIME_OF_DAY = r"([01][0-9]|2[0-3]):([0-5][0-9])"
_WINDOW = re.compile(rf"{_TIME_OF_DAY}\s*-\s*{_TIME_OF_DAY}", re.ASCII)


def time_windows(windows: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        "-".join(f"{instant:%H:%M}" for instant in time_window(window)) for window in windows
    )


def time_window(text: str) -> tuple[time, time]:
    """Return when a window such as "22:00-06:00" opens and closes. Raises ValueError."""
    found = _WINDOW.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f'{json.dumps(text)} is not a window. Write two times of day, such as "22:00-06:00"'
        )
    hour, minute, until_hour, until_minute = map(int, found.groups())
    opens, closes = time(hour, minute), time(until_hour, until_minute)
    if opens == closes:
        raise ValueError(f"{json.dumps(text)} never opens; for the whole day leave windows empty")
    return opens, closes


def web_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_web_origin(origin) for origin in origins)


def _web_origin(origin: str) -> str:
    example = "https://shop.example"
    if origin in {"*", "null"}:
        raise ValueError(
            f'"{origin}" would let pages of strangers post. Name each origin, such as "{example}"'
        )
    if "*" in origin:
        raise ValueError(
            f'{json.dumps(origin)} has a wildcard. Name each origin, such as "{example}"'
        )
    if origin.lower().startswith("file:"):
        raise ValueError(
            'pages from files have no origin of their own: browsers send "null" for them, and for'
            ' any page that asks for it. Serve yours, say as "http://localhost:8080"'
        )
    if not origin.isascii() or "://" not in origin:
        raise _no_origin(origin, example)
    parts = _split(origin)
    default_port = {"http": 80, "https": 443}.get(parts.scheme)
    host = parts.netloc.lower().removesuffix(f":{default_port}")
    if parts.path or parts.query or parts.fragment or "@" in host or origin.endswith(("?", "#")):
        raise ValueError(
            "an origin has no path, user or query: write"
            f' "{parts.scheme}://{host.rpartition("@")[2]}"'
        )
    if not _WEB_HOST.fullmatch(host):
        raise _no_origin(origin, example)
    return f"{parts.scheme}://{host}"


_WEB_HOST = re.compile(r"([\w-]+(\.[\w-]+)*|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?", re.ASCII)
"""As browsers send it: one that is written otherwise would never be met."""


def _no_origin(text: str, example: str) -> ValueError:
    return ValueError(
        f"{json.dumps(text)} is not an origin. Write it as browsers send it:"
        f' scheme://host[:port], such as "{example}"'
    )


def server_root(url: str) -> str:
    if not url:
        return url
    if "://" not in url:
        raise ValueError('expected an address with its scheme, such as "https://app.tranthor.com"')
    parts = _split(url)
    if parts.scheme not in {"http", "https"}:
        raise ValueError(f"{parts.scheme}:// is not spoken here: use https://")
    if "@" in parts.netloc:
        raise ValueError("an address holds no user or password; the key belongs in write_key_file")
    root = f"{parts.scheme}://{parts.netloc.lower()}"
    if parts.path.strip("/") or "?" in url or "#" in url:
        raise ValueError(
            "expected the server's root, since the agent adds the path itself:"
            f' write url = "{root}"'
        )
    return root


def http_proxy(url: ProxyUrl) -> ProxyUrl:
    if "://" not in url or _split(url).scheme not in {"http", "https"}:
        raise ValueError('expected the address of an HTTP proxy, such as "http://proxy.local:3128"')
    return url


def socket_path(path: str) -> str:
    if path and not path.startswith("/"):
        raise ValueError('expected a whole path, such as "/run/tranthor-agent/ingest.sock"')
    if len(fsencode(path)) > _SOCKET_PATH_BYTES:
        raise ValueError(f"the path of a socket has at most {_SOCKET_PATH_BYTES} bytes: shorten it")
    return path


def file_mode(text: str) -> str:
    found = re.fullmatch(r"(?:0o?)?([0-7]{3})", text, re.ASCII)
    if found is None:
        raise ValueError('expected an octal mode of three digits, such as "0660"')
    return f"0{found[1]}"


def user_names(users: tuple[str, ...]) -> tuple[str, ...]:
    for user in users:
        if not re.fullmatch(r"[^\s:/,-][^\s:/,]{0,255}", user):
            raise ValueError(f"{json.dumps(user)} is no name of a user, and no number of one")
    return users


def write_key(key: WriteKey) -> WriteKey:
    if not (key.reveal().isascii() and key.reveal().isprintable()):
        raise ValueError(
            "a write key is one line of printable ASCII, and this is not;"
            " copy it again from your workspace"
        )
    return key


def sha256_digests(digests: tuple[str, ...]) -> tuple[str, ...]:
    for number, digest in enumerate(digests, 1):
        if not re.fullmatch(r"[0-9A-Fa-f]{64}", digest):
            # Not quoted: it may be the key itself.
            raise ValueError(
                f"entry {number} is no SHA-256 digest, which has 64 hex digits: it is made of a key by"
                " `printf %s KEY | sha256sum`"
            )
    return tuple(digest.lower() for digest in digests)


def why_readable(url: str, proxy: str | None) -> str | None:
    """Return why others could read what is sent to *url*, perhaps by a *proxy*; None if they cannot.

    Plain HTTP is fine as long as it stays on this machine.
    """
    parts = urlsplit(url)
    if parts.scheme == "https":
        return None
    if not _stays_here(parts.hostname or ""):
        return "is plain http: key and events would cross the network readable; use https"
    if proxy and not _stays_here(urlsplit(proxy).hostname or ""):
        return (
            "is plain http, and the proxy is another machine: key and events would cross the network"
            " readable; use https, or no proxy"
        )
    return None


def _stays_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_credentials(url: str) -> str:
    """Return *url*, well formed or not, with user, password, query and fragment masked."""
    url = re.sub(r"^([a-zA-Z][a-zA-Z0-9+.-]*://)?.*@", rf"\1{MASK}@", url, flags=re.DOTALL)
    return re.sub(r"([?#]).*", rf"\1{MASK}", url, flags=re.DOTALL)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("expected scheme://host[:port]; host or port cannot be read") from None
    if not parts.hostname or port == 0 or " " in url:
        raise ValueError("expected scheme://host[:port]; there is no host, or a space")
    return parts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
