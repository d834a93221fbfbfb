"""What the upstream makes of one request, as a pure function: bytes in, status and events out.

Owns the sandbox's own reading of the public apps API, the server's forgiving coercions included
(a number or a null is a fine `userId`). It is written from the contract and shares nothing with
`agent.event`, so that a misreading there shows up as a refusal here. It answers as the server
does, not as the agent should: what the server spoils in silence is a 204 here too.

Not modelled: strings that arrive as arrays of one, and bodies that the server stores unreadably for
their nesting (here: a 500, from the depth on that Python's parser gives up at).

Called by `agent.console.sandbox` only.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import responses
from typing import Any, NoReturn

import msgspec

PREFIX = "/api/public/apps/"

# Bytes; the server's own limit. A body of exactly this size passes.
BODY_LIMIT_BYTES = 5 * 1024 * 1024

_ITEM_REQUIRES: Mapping[str, tuple[str, ...]] = {
    "track": ("messageId", "event"),
    "identify": ("messageId",),
    "page": ("messageId",),
    "screen": ("messageId",),
    "group": ("messageId", "groupId"),
}
_ITEM_OBJECTS: Mapping[str, tuple[str, ...]] = {
    "track": ("context", "properties"),
    "identify": ("context", "traits"),
    "page": ("context", "properties"),
    "screen": ("context", "properties"),
    "group": ("context", "traits"),
}
_ITEM_STRINGS: Mapping[str, tuple[str, ...]] = {
    "track": ("event",),
    "identify": (),
    "page": ("name",),
    "screen": ("name",),
    "group": ("groupId",),
}
_COMMON_STRINGS = ("userId", "anonymousId", "messageId", "timestamp")
# Also 1 and 0, which Python holds equal to True and False.
_BOOLEANS = (None, True, False, "true", "false")
_FILE_STRINGS = ("type", "name", "mimeType", "data")

ENDPOINTS = frozenset({*_ITEM_REQUIRES, "batch", "alias"})

# The server's parser looks for forbidden keys only where one of these occurs.
_MAY_HOLD_PROTOTYPE = re.compile(r"__proto__|constructor|\\u")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One event as it stood in a request. *body* is its exact bytes, cut out of a batch if need be.

    *user* is the userId, or else the anonymousId; *kind* is the type that would be stored. An id
    is coerced to text as the server does it, and empty where the event has none. A batch's own
    context is merged into its items: only then is *body* encoded anew.
    """

    message_id: str
    user: str
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer and the events that the request held; they are stored if *status* is 204.

    *payload* is the JSON of the answer, None for an empty one.
    """

    status: int
    payload: Mapping[str, object] | None = None
    found: tuple[Found, ...] = ()


class _Batch(msgspec.Struct):
    batch: list[msgspec.Raw]


def judge(
    path: str, *, content_type: str, authorization: str | None, body: bytes, write_key: str
) -> Verdict:
    """Return what the upstream answers to a POST. The order of checks: body, headers, key."""
    endpoint = path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""
    if endpoint not in ENDPOINTS:
        return not_found("POST", path)
    if endpoint == "alias":
        return Verdict(status=400, payload={"message": "Not yet implemented."})
    if content_type != "application/json":
        return _refusal(
            415, f"Unsupported Media Type: {content_type}", code="FST_ERR_CTP_INVALID_MEDIA_TYPE"
        )
    try:
        document = _parsed(body)
        found = _found_in(endpoint, document, body)
    except ValueError as exc:
        return _refusal(400, str(exc))
    except RecursionError:
        return _refusal(500, "Maximum call stack size exceeded")
    fault = _batch_fault(document) if endpoint == "batch" else _item_fault(document, endpoint)
    if fault is None and authorization is None:
        fault = "headers must have required property 'authorization'"
    if fault is not None:
        return _refusal(400, fault, code="FST_ERR_VALIDATION", found=found)
    if not is_authorized(authorization, write_key):
        return Verdict(status=401, payload={"message": "Invalid write key."}, found=found)
    return Verdict(status=204, found=found)


def is_authorized(authorization: str | None, write_key: str) -> bool:
    """Return whether the key is what follows the first space, whatever the scheme before it."""
    _scheme, _space, key = (authorization or "").partition(" ")
    return hmac.compare_digest(key.encode(errors="replace"), write_key.encode())


def not_found(method: str, path: str) -> Verdict:
    """Return the answer to a route that the server does not have."""
    return _refusal(404, f"Route {method}:{path} not found")


def too_large() -> Verdict:
    """Return the answer to a body over BODY_LIMIT_BYTES."""
    return _refusal(413, "Request body is too large", code="FST_ERR_CTP_BODY_TOO_LARGE")


def error_payload(status: int, message: str, *, code: str = "") -> dict[str, object]:
    """Return an error body in the server's shape."""
    named = {"code": code} if code else {}
    return {
        "statusCode": status,
        **named,
        "error": responses.get(status, "Error"),
        "message": message,
    }


def _refusal(
    status: int, message: str, *, code: str = "", found: tuple[Found, ...] = ()
) -> Verdict:
    return Verdict(status=status, payload=error_payload(status, message, code=code), found=found)


def _parsed(body: bytes) -> Any:
    """Return the JSON document; ValueError carries the server's message.

    Like the server's runtime it lets lone surrogates and `1e400` pass, and NaN not.
    """
    if not body:
        raise ValueError("Body cannot be empty when content-type is set to 'application/json'")
    text = body.decode(errors="replace")
    document = json.loads(text, parse_constant=_refuse_constant)
    if _MAY_HOLD_PROTOTYPE.search(text) and _holds_prototype(document):
        raise ValueError("Object contains forbidden prototype property")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"Unexpected token {name[0]} in JSON")


def _holds_prototype(document: object) -> bool:
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            constructor = value.get("constructor")
            if "__proto__" in value or (
                isinstance(constructor, dict) and "prototype" in constructor
            ):
                return True
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return False


def _found_in(endpoint: str, document: object, body: bytes) -> tuple[Found, ...]:
    """Return the events of a request, as far as they can be told, whether valid or not."""
    if not isinstance(document, dict):
        return ()
    if endpoint != "batch":
        return (_found(document, endpoint, body),)
    items = document.get("batch")
    if not isinstance(items, list):
        return ()
    try:
        exact = [bytes(raw) for raw in msgspec.json.decode(body, type=_Batch).batch]
    except msgspec.DecodeError:  # it is stricter about strings than the server
        exact = [json.dumps(item).encode() for item in items]
    shared = document.get("context")
    return tuple(
        _found(item, "", _merged(item, shared, raw))
        for item, raw in zip(items, exact, strict=True)
        if isinstance(item, dict)
    )


def _merged(item: object, shared: object, raw: bytes) -> bytes:
    if not (isinstance(item, dict) and isinstance(shared, dict) and shared):
        return raw
    own = item.get("context", {})
    if not isinstance(own, dict):
        return raw
    return json.dumps({**item, "context": {**shared, **own}}).encode()


def _found(item: Mapping[str, object], endpoint: str, body: bytes) -> Found:
    user = item["userId"] if "userId" in item else item.get("anonymousId")
    return Found(
        message_id=_text(item.get("messageId")),
        user=_text(user),
        # A top-level type wins over the route, even on /track.
        kind=_text(item.get("type", endpoint)),
        body=body,
    )


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value)


def _batch_fault(document: object) -> str | None:
    """Return why the whole batch is refused: one bad item is enough, and is named by its index."""
    if not isinstance(document, dict):
        return "body must be object"
    if "batch" not in document:
        return "body must have required property 'batch'"
    if not isinstance(document["batch"], list):
        return "body/batch must be array"
    if not isinstance(document.get("context", {}), dict):
        return "body/context must be object"
    for index, item in enumerate(document["batch"]):
        at = f"body/batch/{index}"
        if not isinstance(item, dict):
            return f"{at} must be object"
        if "type" not in item:
            return f"{at} must have required property 'type'"
        kind = item["type"]
        if not isinstance(kind, str) or kind not in _ITEM_REQUIRES:
            return f"{at}/type must be equal to constant, {at} must match a schema in anyOf"
        fault = _item_fault(item, kind, at)
        if fault is not None:
            return fault
    return None


def _item_fault(item: object, kind: str, at: str = "body") -> str | None:
    """Return the server's message about one event, None if it is valid.

    The schema is a union of two, one for each of the ids; when neither fits, both complain.
    """
    if not isinstance(item, dict):
        return f"{at} must be object"
    complaints = []
    for id_field in ("userId", "anonymousId"):
        complaint = _variant_fault(item, kind, id_field, at)
        if complaint is None:
            return None
        complaints.append(complaint)
    return ", ".join([*complaints, f"{at} must match a schema in anyOf"])


def _variant_fault(item: Mapping[str, object], kind: str, id_field: str, at: str) -> str | None:
    for name in (id_field, *_ITEM_REQUIRES[kind]):
        if name not in item:
            return f"{at} must have required property '{name}'"
    for name in (*_COMMON_STRINGS, *_ITEM_STRINGS[kind]):
        if isinstance(item.get(name), dict | list):
            return f"{at}/{name} must be string"
    for name in _ITEM_OBJECTS[kind]:
        if not isinstance(item.get(name, {}), dict):
            return f"{at}/{name} must be object"
    if kind == "group" and item.get("assigned") not in _BOOLEANS:
        return f"{at}/assigned must be boolean"
    if kind == "track" and "files" in item:
        return _files_fault(item["files"], f"{at}/files")
    return None


def _files_fault(files: object, at: str) -> str | None:
    if not isinstance(files, list):
        return f"{at} must be array"
    for index, file in enumerate(files):
        if not isinstance(file, dict):
            return f"{at}/{index} must be object"
        for name in _FILE_STRINGS:
            if name not in file:
                return f"{at}/{index} must have required property '{name}'"
            if isinstance(file[name], dict | list):
                return f"{at}/{index}/{name} must be string"
        if file["type"] != "Base64Encoded":
            return f"{at}/{index}/type must be equal to constant"
    return None
