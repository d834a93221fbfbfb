"""What the files of an outbox look like, seen every few milliseconds for as long as a proof runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_INTERVAL_S = 0.005
"""In that time the log grows by a few commits at most, and no file that is left behind is missed."""


class Trace(NamedTuple):
    """Whose a file was at some moment."""

    name: str
    uid: int
    gid: int
    mode: str


class Footprint:
    """Reads on in a thread of its own: the event loop of a proof is busy with its clients."""

    def __init__(self, outbox: Path) -> None:
        self.largest_log_bytes = 0
        self.traces: set[Trace] = set()
        self._outbox = outbox
        self._log = outbox.with_name(f"{outbox.name}-wal")

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def strange(self, owner: tuple[int, int]) -> set[Trace]:
        """Return the traces of files that were not *owner*'s, or open to others than the group."""
        return {trace for trace in self.traces if trace[1:] != (*owner, "0o640")}

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_INTERVAL_S):
            for file in self._outbox.parent.glob(f"{self._outbox.name}*"):
                with suppress(FileNotFoundError):
                    seen = file.stat()
                    mode = oct(seen.st_mode & 0o7777)
                    self.traces.add(Trace(file.name, seen.st_uid, seen.st_gid, mode))
                    if file == self._log:
                        self.largest_log_bytes = max(self.largest_log_bytes, seen.st_size)
