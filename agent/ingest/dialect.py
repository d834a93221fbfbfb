"""The APIs that apps speak, each by its paths: how it names and encodes events, and what it is answered.

Pure. `routes` does the same for each; what differs stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal
from uuid import uuid4

import msgspec

from agent.contract import Terms, Translate
from agent.event import KINDS, Kind
from agent.exchange import REPLAYED, STORED, Answer, Request, Taken, answer_json
from agent.segment import translate

Endpoint = Kind | Literal["batch", "alias"]
"""What a path takes."""

APPS = "/api/public/apps/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one API is spoken.

    *media_types* are those that its clients give to JSON, "" for none. *shared* are the members of a
    batch that hold for each of its events. *keyed* says that the body may hold the app's write key.
    """

    media_types: frozenset[str]
    stored: Answer
    replayed: Answer
    shared: tuple[str, ...] = ("context",)
    translate: Translate | None = None
    keyed: bool = False

    def reads(self, content_type: str) -> bool:
        return media_type(content_type) in self.media_types

    def terms(self, terms: Terms) -> Terms:
        """Return *terms* as they are for this one."""
        if self.translate is None:
            return terms
        return msgspec.structs.replace(terms, translate=self.translate, shared=self.shared)

    def key_of(self, request: Request) -> str:
        """Return the write key or token in the head of *request*, else in its body; empty for none."""
        in_head = request.headers.get("authorization", "")
        if in_head or not self.keyed:
            return in_head
        try:
            return _KEYED.decode(request.body).write_key or ""
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return ""  # what is wrong with it is said when it is read


def media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


class _Keyed(msgspec.Struct, rename="camel"):
    write_key: str | None = None


_KEYED = msgspec.json.Decoder(_Keyed)

UPSTREAM = Dialect(
    media_types=frozenset({"application/json"}),
    stored=STORED,
    replayed=REPLAYED,
)

_SUCCESS = answer_json(Taken())

SEGMENT = Dialect(
    # axios calls gzipped bytes a form, and the SDK of RudderStack leaves it at that.
    media_types=frozenset(
        {"application/json", "text/plain", "application/x-www-form-urlencoded", ""}
    ),
    # Segment's own answer; some of its SDKs take nothing but a 200 for success.
    stored=_SUCCESS,
    replayed=replace(_SUCCESS, headers=REPLAYED.headers),
    shared=("context", "integrations"),
    # A message of an unknown id cannot be told from its retry; as with Segment it is a new one.
    translate=partial(translate, new_id=lambda: str(uuid4())),
    keyed=True,
)

_ENDPOINTS: tuple[Endpoint, ...] = (*KINDS, "batch", "alias")

ENDPOINTS: dict[str, tuple[Dialect, Endpoint]] = {
    **{APPS + endpoint: (UPSTREAM, endpoint) for endpoint in _ENDPOINTS},
    **{f"/v1/{endpoint}": (SEGMENT, endpoint) for endpoint in _ENDPOINTS},
    # Short forms are what analytics.js and Segment's mobile SDKs post to.
    **{f"/v1/{endpoint[0]}": (SEGMENT, endpoint) for endpoint in _ENDPOINTS},
    "/v1/import": (SEGMENT, "batch"),
}
