"""How a request is handed on: to a handler, whose answer may be there at once or come later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import msgspec

from agent.exchange import Answer, Request

T = TypeVar("T")


class Later(msgspec.Struct, Generic[T]):
    """An answer to come: what *answer* makes of *future* once that is done. Costs no task."""

    future: asyncio.Future[T]
    answer: Callable[[asyncio.Future[T]], Answer]


Reply = Answer | Later[Any] | Coroutine[Any, Any, Answer]

Handler = Callable[[Request], Reply]
"""Answers one request; expected failures are answers, not exceptions."""
