"""One HTTP exchange as plain values, so that guard, routes and control know no HTTP library.

`agent.ingest.wire` turns bytes into a `Request` and an `Answer` into bytes. Error answers have the
upstream's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

JSON = "application/json; charset=utf-8"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request whose body was read whole.

    *path* is percent-decoded. The names in *headers* are in lower case; the values of a repeated
    one are joined by commas. A HEAD comes as the GET that it stands for.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


class Refusal(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The body of an error answer. *code* is for programs, *message* for people."""

    status_code: int
    code: str
    error: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes back. *close* ends the connection after it."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False


STORED = Answer(status=204)
REPLAYED = Answer(status=204, headers={"Idempotent-Replayed": "true"})


def answer_json(value: Any, *, status: int = 200) -> Answer:
    return Answer(status=status, body=msgspec.json.encode(value))


def refuse(
    status: int,
    code: str,
    message: str,
    *,
    retry_after_s: float | None = None,
    close: bool = False,
) -> Answer:
    """Return an error answer, a `Refusal`.

    *retry_after_s* is sent rounded up to whole seconds, as Retry-After requires (RFC 9110, 10.2.3).
    """
    headers = {} if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
    body = Refusal(status_code=status, code=code, error=HTTPStatus(status).phrase, message=message)
    return Answer(status=status, body=msgspec.json.encode(body), headers=headers, close=close)
