"""Exceptions by blame: who has to act decides the class.

An expected failure of the upstream is not here: it is a value (`agent.forward.disposition`).
Nothing in this module knows where an exception is shown.
"""

from __future__ import annotations


class AgentError(Exception):
    """Every failure that the agent foresees. Its text says what, which value, and what to do."""


class ConfigError(AgentError):
    """The operator's: a setting is missing, unknown or out of range."""


class InvalidEventError(AgentError):
    """The app's: a body that the upstream would refuse or silently spoil.

    *code* is the machine-readable word of the answer; *status* its HTTP status (400 or 413).
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str = "FST_ERR_VALIDATION"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class OutboxError(AgentError):
    """The machine's: the outbox cannot do what was asked, now."""


class OutboxLockedError(OutboxError):
    """Another process owns the outbox."""


class OutboxOverloadedError(OutboxError):
    """More is waiting for the next commit than may wait; a moment later it fits."""


class OutboxFullError(OutboxError):
    """The quota or the disk is full; it fits again once events were delivered or discarded."""


class AppQuotaError(OutboxFullError):
    """One app has as much in the outbox as it may; others go on."""


class OutboxUnavailableError(OutboxError):
    """The database did not answer as it must: whether the event was stored is unknown."""


class OutboxDamagedError(OutboxError):
    """The file is not what the agent wrote: its rows must be salvaged from it, not read by SQLite."""
