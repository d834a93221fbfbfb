"""Who runs the agent and who looks at it: as root three users, otherwise all are one.

The service of the README in small: the agent has a user and a folder of its own, operators are
members of its group and may read, and root may do everything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from faults import planted
from processes import environ

_ROOT = Path(__file__).parents[2]

_AGENT = (61_001, 61_001)
_OPERATOR = (61_002, 61_001)
"""uid and gid; no account needs to have them."""

User = tuple[int, int] | None
"""uid and the one gid; None: whoever runs the tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Household:
    """A folder for an outbox, and how its agent and those who look are started."""

    folder: Path
    agent: User
    onlookers: tuple[User, ...]
    python: str

    def command(self, bug: str | None = None) -> list[str]:
        """Return how to start the agent as its own user, with a planted *bug* or as it is."""
        command = [self.python, *planted.command(bug)[1:]]
        if self.agent is None:
            return command
        uid, gid = self.agent
        return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *command]

    @property
    def owner(self) -> tuple[int, int]:
        """The uid and gid that each file of the outbox has to have."""
        return self.agent or (os.getuid(), os.getgid())


@contextmanager
def household(folder: Path, *, mode: int = 0o750) -> Iterator[Household]:
    """Set up a household; in *folder*, unless there are several users, who could not enter it."""
    python = shared_python() if os.getuid() == 0 and shutil.which("setpriv") else None
    if python is None:
        yield Household(folder=folder, agent=None, onlookers=(None,), python=sys.executable)
        return
    with tempfile.TemporaryDirectory(prefix="tranthor-agent-") as shared:
        Path(shared).chmod(0o755)
        home = Path(shared) / "state"
        home.mkdir()
        os.chown(home, *_AGENT)
        home.chmod(mode)
        yield Household(
            folder=home, agent=_AGENT, onlookers=(_OPERATOR, None, _AGENT), python=python
        )


@contextmanager
def household_of_three(folder: Path, *, mode: int = 0o750) -> Iterator[Household]:
    """Set up a household in which the agent, an operator and root are told apart, or skip."""
    with household(folder, mode=mode) as home:
        if home.agent is None:
            pytest.skip("needs root, setpriv, and a Python that every user may run")
        yield home


@cache
def shared_python() -> str | None:
    """Return a Python that any user may run: the tests' own may lie in somebody's home."""
    candidates = (sys.executable, shutil.which("python3", path="/usr/bin"))
    return next((python for python in candidates if python and _serves_anyone(python)), None)


def _serves_anyone(python: str) -> bool:
    uid, gid = _OPERATOR
    version = sys.version_info[:2]  # the libraries are those of the tests' own
    probe = f"import faults.onlookers, sys; sys.exit(sys.version_info[:2] != {version})"
    with suppress(OSError):
        tried = subprocess.run(
            [python, "-c", probe],
            env=environ(),
            cwd="/",
            user=uid,
            group=gid,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
        return tried.returncode == 0
    return False
