"""The configuration read anew while the agent runs: when it is told to, or a file beside it changed.

Told to (SIGHUP), it reads everything. The files beside the configuration, the key's and those of
TLS, it looks at by itself: every `LOOK_S`, and before a held queue is probed, so that a key that was
put right is the one that is tried. By their stamps alone, which costs neither disk nor battery. What
a change means is decided in `agent.reload`; what goes by it are the daemon's `Parts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import structlog

from agent.config.loaded import Loaded
from agent.config.loading import files_beside, load, refresh
from agent.errors import ConfigError
from agent.reload import Refusal, Takeover, decide
from agent.settings import Settings

LOOK_S = 10.0
"""Between two looks at the files: soon enough for who has just replaced one, and no load."""

SETTLE_S = 1.0
"""How long a changed file must stay as it is before it is read: not every editor renames."""

_SETTLE_LOOKS = 10
"""After so many it is read all the same; what is written on and on is no key."""

Stamps = Mapping[Path, tuple[int, ...] | None]
"""What tells one state of a file from another; None where there is none."""

log = structlog.get_logger()


class Parts(Protocol):
    """What goes by the configuration."""

    def fault(self, settings: Settings) -> str | None:
        """Return why nothing can be sent with *settings*, if that can be seen from here."""

    async def adopt(self, loaded: Loaded) -> None:
        """Go by *loaded* from now on."""

    def note(self, problem: str | None) -> None:
        """Show why a configuration was refused; None: the last one read is in force."""


class Rereading:
    """Keeps the configuration in force up to date. One change at a time."""

    def __init__(
        self, loaded: Loaded, noticed: Stamps, environ: Mapping[str, str], parts: Parts
    ) -> None:
        """*noticed* are the stamps of the files beside *loaded*, taken before it was read."""
        self._loaded = loaded
        self._noticed = noticed
        self._environ = environ
        self._parts = parts
        fault = None if loaded.missing() else parts.fault(loaded.settings)
        self._known = frozenset(filter(None, (*loaded.problems, fault)))
        """What was not right already when the configuration came into force."""
        self._changing = asyncio.Lock()
        self._refused: dict[str, str] = {}
        """Why, by what was read. A key that is found well mends no mistake in the configuration."""

    async def reload(self) -> None:
        """Read everything anew, and go by it or say why not."""
        async with self._changing:
            try:
                new = load(self._loaded.file, self._environ)
                noticed = stamps(files_beside(new, self._environ))
                new = refresh(new, self._environ)  # what changed before the stamps, at the latest
            except ConfigError as exc:
                self._refuse("configuration", "; ".join(str(exc).splitlines()))
            else:
                await self._weigh(new, noticed, "configuration")

    async def look(self) -> None:
        """Read the files beside the configuration anew if they changed."""
        if not self._changed():
            return
        async with self._changing:
            if self._changed():
                noticed = await self._settled()
                # Whatever comes of it: what was weighed is not weighed again.
                self._noticed = noticed
                await self._weigh(refresh(self._loaded, self._environ), noticed, "files")

    def _changed(self) -> bool:
        return stamps(self._noticed) != self._noticed

    async def _settled(self) -> Stamps:
        """Return the stamps of the files, as soon as nobody is writing to them."""
        noticed = stamps(self._noticed)
        for _ in range(_SETTLE_LOOKS):
            before = noticed
            await asyncio.sleep(SETTLE_S)
            noticed = stamps(self._noticed)
            if noticed == before:
                break
        return noticed

    async def _weigh(self, new: Loaded, noticed: Stamps, source: str) -> None:
        missing = new.missing()
        fault = None if missing else self._parts.fault(new.settings)
        found = dict.fromkeys(filter(None, (missing, fault, *new.problems)))
        problems = [problem for problem in found if problem not in self._known]
        verdict = decide(self._loaded.settings, new.settings, problems)
        match verdict:
            case Refusal(why):
                self._refuse(source, why)
            case Takeover():
                self._loaded = replace(new, settings=verdict.settings)
                self._noticed, self._known = noticed, frozenset(found)
                await self._parts.adopt(self._loaded)
                self._settle(source, verdict, problems)

    def _settle(self, source: str, verdict: Takeover, problems: Iterable[str]) -> None:
        """Say what is in force now; only now, for the key may stand in no log."""
        if source == "configuration":
            self._refused.clear()  # it was read with its files
        else:
            self._refused.pop(source, None)
        self._note()
        log.info("config.reloaded", source=source, changed=verdict.changed)
        if verdict.postponed:
            log.warning(
                "config.postponed", keys=verdict.postponed, why="takes effect at the next start"
            )
        for problem in problems:
            log.error("agent.misconfigured", problem=problem)

    def _refuse(self, source: str, why: str) -> None:
        self._refused[source] = why
        self._note()
        log.error("config.refused", source=source, reason=why)

    def _note(self) -> None:
        self._parts.note("; ".join(dict.fromkeys(self._refused.values())) or None)


def stamps(files: Iterable[Path]) -> Stamps:
    """Return what tells whether *files*, or what they link to, were written or replaced."""
    return {file: _stamp(file) for file in files}


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
