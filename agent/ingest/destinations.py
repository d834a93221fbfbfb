"""Which upstream an event is for: by the path it was posted to, else by the write key that the app sent.

Pure. Knows digests of keys, and no key: what an app sent is forgotten with its request.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from agent.exchange import Answer, refuse
from agent.outbox.records import label, unlabel
from agent.units import app_keys, app_token, key_digest

PREFIX = "/w/"
"""In front of the usual path: /w/NAME/api/public/apps/track."""

_RETRY_S = 60
"""Files of keys are looked at every ten seconds (`agent.rereading`); a person mends one in minutes."""


def behind_prefix(path: str) -> str:
    """Return *path* without the part that names an upstream."""
    if not path.startswith(PREFIX):
        return path
    _, slash, rest = path.removeprefix(PREFIX).partition("/")
    return slash + rest


class Destinations:
    """The upstreams beside the default one, whose name is empty.

    *digests* has for the digest of an app's write key the name of its upstream; one that is not among
    *names* has no queue before the next start. *unknown* says why some are missing there: then a key
    that is not found may be one of those, and is refused.
    """

    def __init__(
        self,
        names: tuple[str, ...] = (),
        digests: Mapping[str, str] | None = None,
        unknown: str = "",
    ) -> None:
        self._names = frozenset(("", *names))
        self._digests = tuple((digests or {}).items())
        self._unknown = unknown

    def of_path(self, path: str) -> tuple[str, str] | Answer:
        """Return (upstream, the path behind its prefix) for a *path* that begins with `PREFIX`."""
        name = path.removeprefix(PREFIX).partition("/")[0]
        behind, upstream = behind_prefix(path), unlabel(name)
        if not behind or not name or upstream not in self._names:
            known = ", ".join(f"{PREFIX}{label(one)}/" for one in sorted(self._names))
            return refuse(
                404,
                "AGENT_UNKNOWN_UPSTREAM",
                f"{PREFIX}{name[:100]}/ is no upstream of this agent; there are {known}",
            )
        return upstream, behind

    def of_key(self, key: str) -> str | Answer:
        """Return the upstream that claims the *key* that an app sent; the default one where none does."""
        if not self._digests and not self._unknown:
            return ""
        sent = [] if app_token(key) else app_keys(key)
        for digest in map(key_digest, sent):
            # All are compared, each in constant time: how long it takes tells nothing of them.
            found = [
                name for claimed, name in self._digests if hmac.compare_digest(claimed, digest)
            ]
            if found and found[0] not in self._names:
                return self._not_yet(
                    f"[upstreams.{found[0]}] is used from the agent's next start on"
                )
            if found:
                return found[0]
        if sent and self._unknown:
            return self._not_yet(f"nobody knows which upstream this key is for: {self._unknown}")
        return ""

    def _not_yet(self, why: str) -> Answer:
        return refuse(
            503,
            "AGENT_UNKNOWN_KEY",
            f"{why}; send again with the same messageId",
            retry_after_s=_RETRY_S,
        )
