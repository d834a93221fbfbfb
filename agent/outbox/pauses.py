"""The verbs that remember over a restart which upstreams a person has paused."""

from __future__ import annotations

from collections.abc import Iterable

from agent.outbox.records import label, named
from agent.outbox.store import Store

_PAUSED = """
SELECT paused, paused_upstreams
  FROM ledger
"""

_SET_PAUSED = """
UPDATE ledger
   SET paused = :paused,
       paused_upstreams = :names
"""


def pause(store: Store, upstream: str | None = None) -> None:
    """Remember a pause of one upstream; None: of all."""
    ((paused, names),) = store.fetch(_PAUSED)
    if upstream is None or paused:
        _set_paused(store, True)
    else:
        _set_paused(store, False, {*named(names), upstream})


def resume(store: Store, upstream: str | None = None, *, known: Iterable[str] = ()) -> None:
    """End the pause of one upstream, so that of all *known* the others stay paused; None: of all."""
    ((paused, names),) = store.fetch(_PAUSED)
    still = () if upstream is None else known if paused else named(names)
    _set_paused(store, False, {*still} - {upstream})


def _set_paused(store: Store, paused: bool, upstreams: Iterable[str] = ()) -> None:
    store.change(_SET_PAUSED, paused=paused, names=" ".join(sorted(map(label, upstreams))))
