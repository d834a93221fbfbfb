"""A JSON body as a tree, refused where something at any depth would spoil the event.

Pure. What the fields mean is `agent.contract`'s business, which calls this. A refusal names the place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from agent.errors import InvalidEventError

T = TypeVar("T")

MAX_DEPTH = 100
"""Levels of objects and arrays. Over about 1,000 the upstream stores an unreadable event."""

_MAX_NUMBER = sys.float_info.max
"""A larger integer overflows the upstream's double-precision numbers to Infinity."""


def read_object(raw: bytes, depth: int = 1) -> dict[str, Any]:
    """Return the object that *raw* spells. Raises `InvalidEventError`.

    *depth* is the level that it will stand on, 1 for an event itself.
    """
    fields = _decode(raw, _ANYTHING)
    if not isinstance(fields, dict):
        raise InvalidEventError(f"body: expected object, got {type_name(fields)}")
    _check_tree(raw, fields, depth)
    return fields


def read_members(raw: bytes) -> dict[str, bytes]:
    """Return the members of the object that *raw* spells, each as its own JSON.

    Theirs is grammatical, and not looked at further. Raises `InvalidEventError`.
    """
    if not raw.lstrip(_WHITESPACE).startswith(b"{"):
        read_object(raw)  # which says what it is instead
    return {name: bytes(value) for name, value in _decode(raw, _MEMBERS).items()}


def read_items(raw: bytes) -> Iterator[bytes]:
    """Return the items of the array that *raw* spells, each as `read_members` does."""
    if not raw.lstrip(_WHITESPACE).startswith(b"["):
        raise InvalidEventError(f"body: expected array, got {type_name(_decode(raw, _ANYTHING))}")
    items = _decode(raw, _ITEMS)
    return map(bytes, items)


_WHITESPACE = b" \t\r\n"
_ANYTHING: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])

_SURROGATE_ESCAPE = re.compile(
    rb"""(?ix) (?<!\\)(?:\\\\)*            # an even number of backslashes before the escape
    (?: \\u d[89ab][0-9a-f]{2} (?! \\u d[c-f][0-9a-f]{2} )   # a high half without its low half
      | (?<! \\u d[89ab][0-9a-f]{2} ) \\u d[c-f][0-9a-f]{2} )  # a low half without its high half
    """
)


def _decode(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(raw)
    except RecursionError as exc:
        raise _too_deep() from exc
    except UnicodeDecodeError as exc:
        raise InvalidEventError("body: not valid UTF-8; encode the JSON as UTF-8") from exc
    except msgspec.ValidationError as exc:
        # The decoder calls this one a validation error: a number past what a double can hold.
        raise InvalidEventError("body: a number is out of range (over about 1.8e308)") from exc
    except msgspec.DecodeError as exc:
        if _SURROGATE_ESCAPE.search(raw):
            raise InvalidEventError(
                "body: a string holds half of a surrogate pair (\\ud800 to \\udfff alone);"
                " the upstream cannot read such an event back"
            ) from exc
        raise InvalidEventError(f"body: {lower_first(str(exc))}") from exc


_BACKSLASH = ord("\\")
_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]")
"""An escape that could spell a letter of a forbidden key; encoders write none for text as it is."""

_HUGE_DIGITS = 309
_HUGE_INTEGER = re.compile(rb"[0-9]{%d}" % _HUGE_DIGITS)
_THREE_DIGITS = re.compile(rb"[0-9][0-9][0-9]")


def _check_tree(raw: bytes, fields: dict[str, Any], root_depth: int) -> None:
    """Refuse what would spoil an event at any depth.

    The walk visits every value; it is skipped where the bytes alone prove it needless: too few
    brackets to nest too deep, no text that could spell a forbidden key, no run of digits that long.
    """
    if (
        root_depth - 1 + raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH
        # In each pair a quick search spares most bodies the slow one.
        and not (_BACKSLASH in raw and _ASCII_ESCAPE.search(raw))
        and not (b"proto" in raw and _may_poison(raw))
        # Whoever looks at every 103rd byte sees three of such a run of digits, one after the other.
        and not (_THREE_DIGITS.search(raw[:: _HUGE_DIGITS // 3]) and _HUGE_INTEGER.search(raw))
    ):
        return
    for trail, value, depth in _walk(fields, root_depth):
        match value:
            case dict() | list() if depth > MAX_DEPTH:
                raise _too_deep()
            case dict() if "__proto__" in value:
                raise _forbidden_key((trail, "__proto__"))
            case {"constructor": {"prototype": _}}:
                raise _forbidden_key((trail, "constructor.prototype"))
            case int() if abs(value) > _MAX_NUMBER:
                raise InvalidEventError(f"{_path(trail)}: number out of range (over about 1.8e308)")
            case _:
                pass


def _may_poison(raw: bytes) -> bool:
    return b"__proto__" in raw or (b'"constructor"' in raw and b'"prototype"' in raw)


_Trail = tuple[Any, str | int] | None
"""The way to a value: the trail of its container and its key or index; None for the root.

Linked and not joined: a text for each value would take their product where a long key has many.
"""


def _walk(fields: dict[str, Any], root_depth: int) -> Iterator[tuple[_Trail, Any, int]]:
    """Yield (trail, value, depth) of every value, containers above their contents.

    Of each container that it is in it keeps one place, and no list of what is still to come.
    """
    yield None, fields, root_depth
    stack: list[tuple[_Trail, Iterator[tuple[str | int, Any]]]] = [(None, iter(fields.items()))]
    while stack:
        trail, items = stack[-1]
        for step, value in items:
            yield (trail, step), value, root_depth + len(stack)
            if isinstance(value, dict):
                stack.append(((trail, step), iter(value.items())))
                break
            if isinstance(value, list):
                stack.append(((trail, step), iter(enumerate(value))))
                break
        else:
            stack.pop()


def _path(trail: _Trail) -> str:
    steps: list[str | int] = []
    while trail is not None:
        trail, step = trail
        steps.append(step)
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in reversed(steps))
    return shorten(text.removeprefix("."))


def _forbidden_key(trail: _Trail) -> InvalidEventError:
    return InvalidEventError(f"{_path(trail)}: a key of this name is refused")


def _too_deep() -> InvalidEventError:
    return InvalidEventError(f"body: nested deeper than {MAX_DEPTH} levels; flatten it")


_SHOWN_CHARS = 100
"""How much of a name or value from the body an answer quotes."""


def shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def type_name(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def lower_first(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]
