"""Where things lie on this machine: the configuration file, systemd's credentials, the outbox.

A person's command and the service must mean the same places, though the one is told them by systemd
and the other by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs

from agent.keys import PREFIX

APP = "tranthor-agent"
FILE_VARIABLE = f"{PREFIX}CONFIG"
SYSTEM_FILE = Path("/etc/tranthor-agent/config.toml")
SYSTEM_STATE = Path("/var/lib/tranthor-agent")


def search_path() -> tuple[Path, ...]:
    """Return where a file is looked for when none is named; the first that is there counts."""
    return platformdirs.user_config_path(APP) / "config.toml", SYSTEM_FILE


def first_there(candidates: Sequence[Path]) -> Path | None:
    """Return the first of *candidates* that is there, or that may not be passed over."""
    for candidate in candidates:
        try:
            candidate.stat()
        except PermissionError:
            # ProtectHome= makes a home like this, and there is no file for the agent in it. Below
            # /etc it is an operator outside the group, who must not be shown defaults instead.
            if candidate != SYSTEM_FILE:
                continue
        except OSError:
            continue
        return candidate
    return None


def credential_path(name: str, environ: Mapping[str, str], file: Path | None) -> Path | None:
    """Return where a systemd credential would be.

    A person's command has none handed over; with the system's configuration it means the service,
    and reads what the unit loads.
    """
    if folder := environ.get("CREDENTIALS_DIRECTORY"):
        return Path(folder) / name
    return SYSTEM_FILE.with_name(name) if file == SYSTEM_FILE else None


def outbox_path(environ: Mapping[str, str], file: Path | None) -> tuple[Path, str]:
    """Return where the outbox is when the configuration does not say, and the origin of that."""
    # systemd.exec(5): several directories are separated by colons; the unit's first is ours.
    if state := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(state) / "outbox.db", "environment STATE_DIRECTORY"
    if file == SYSTEM_FILE:
        # An operator's `status` has no STATE_DIRECTORY, and means the service's outbox.
        return SYSTEM_STATE / "outbox.db", f"default beside {SYSTEM_FILE}"
    return platformdirs.user_data_path(APP) / "outbox.db", "default"
