"""The command line, whole: what `agent.console.commands` offers, and `run`."""

# ruff: noqa: PLC0415  # the daemon and structlog take a while to load: not for `status`

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from agent.config.loaded import Loaded
from agent.console.commands import cli
from agent.console.invocation import PROGRAM, settings_in_effect
from agent.settings import Settings
from agent.units import proxy_secrets

if TYPE_CHECKING:
    from agent.observe.logs import Redactor

_UMASK = 0o027
"""State files are for the agent and its group, and never written by the group."""


def main() -> None:
    cli(prog_name=PROGRAM)


@cli.command()
def run() -> None:
    """Run the agent in the foreground.

    SIGHUP makes it read its configuration anew.
    SIGTERM or Ctrl-C ends it in order; at the second one it leaves at once, and loses nothing.
    """
    loaded = settings_in_effect()
    _leave_out_rich()
    _leave_out_authorities()
    os.umask(_UMASK)
    _run(loaded)


def _leave_out_rich() -> None:
    """Keep structlog from loading rich for tracebacks that no daemon draws: 4 MiB of memory."""
    sys.modules["rich"] = None  # type: ignore[assignment]  # "not there", for `import`
    import structlog  # noqa: F401  # it looks but once

    del sys.modules["rich"]


def _leave_out_authorities() -> None:
    """Keep aiohttp from loading the machine's authorities as it is imported: 2 MiB and 50 ms.

    They are for its default context, and each of our requests has its upstream's own
    (`agent.forward.upstream`). One that had not would trust nobody.
    """
    here = {name: os.environ.get(name) for name in _AUTHORITIES}
    os.environ.update(dict.fromkeys(_AUTHORITIES, os.devnull))
    import aiohttp  # noqa: F401  # it loads them but once

    for name, value in here.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


_AUTHORITIES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""Where OpenSSL is told to find them (SSL_CTX_set_default_verify_paths(3))."""


def _configure_logs(redactor: Redactor, settings: Settings) -> None:
    """Log as *settings* say; no secret of theirs, nor of those before, is ever shown."""
    from agent.observe.logs import configure

    for upstream in (settings.upstream, *settings.upstreams.values()):
        if upstream.write_key is not None:
            redactor.add(upstream.write_key.reveal())
        for secret in proxy_secrets(upstream.proxy or ""):
            redactor.add(secret)
    if settings.redact.key is not None:
        redactor.add(settings.redact.key.reveal())
    configure(settings.log.level, settings.log.format, sys.stderr, redactor)


def _run(loaded: Loaded) -> None:
    from agent import daemon
    from agent.observe.logs import Redactor

    running = daemon.run(loaded, os.environ, partial(_configure_logs, Redactor()))
    try:
        import uvloop
    except ImportError:  # no wheel for this machine
        asyncio.run(running)
    else:
        uvloop.run(running)


# First in the help: everything else is about it.
cli.commands = {"run": run, **cli.commands}


if __name__ == "__main__":
    main()
