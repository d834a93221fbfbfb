"""What the daemon asks of the kernel, in order: its outbox's files, and its words on the network.

`traced` puts strace in front of a command; `operations` reads what it wrote. Times and what is not
of the outbox are left out. Knows nothing of SQLite or HTTP; called by `faults.crash_runs`.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = ("", "-wal", "-journal")
"""Of the files that hold an outbox. Its -shm, lock and reserve say nothing after a power cut."""

_WRITES = (
    "openat,open,creat,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,"
    "copy_file_range,fsync,fdatasync,"
    "unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
)
_TALK = "read,readv,recvfrom,recvmsg,sendto,sendmsg"

_STRING_BYTES = 32 * 1024 * 1024
"""More than any one call passes: nothing of it may be cut short."""

_SOURCES_READ = r"^[0-9]+ +read\([0-9]+<\\x"
"""Python reading its modules: files have their path in hex, and sockets begin with TCP."""

_END_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Opened:
    """A file was opened, and made if it was not there."""

    name: str


@dataclass(frozen=True, slots=True)
class Unlinked:
    name: str


@dataclass(frozen=True, slots=True)
class Written:
    name: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resized:
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Synced:
    """A file, or with no *name* the folder, was synced: all that was done to it before *begun*.

    *begun* is how many operations had been done when the call began.
    """

    name: str
    begun: int


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes left on a connection, written as `local address->remote address`."""

    connection: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Received:
    connection: str
    data: bytes


Operation = Opened | Unlinked | Written | Resized | Synced | Sent | Received


# --- tracing ---


def why_untraceable() -> str | None:
    """Return why nothing can be traced here; None if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = subprocess.run(
        ["strace", "-D", "-f", "-yy", "-o", "/dev/null", "true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return None if probe.returncode == 0 else f"strace cannot trace here: {probe.stderr.strip()}"


def traced(command: Sequence[str], trace: Path, *, kill_at_sync: int | None = None) -> list[str]:
    """Return *command* with strace beside it, which writes to *trace*.

    The process started is the command itself, so that signals reach it. *kill_at_sync*: its thread
    that syncs is killed when it asks for its 1-based n-th fdatasync, which is not done any more.
    """
    # The filter makes tracing cheap, but under it nothing is injected (strace 6.1).
    manner = (
        ["-e", f"inject=fdatasync:signal=KILL:when={kill_at_sync}"]
        if kill_at_sync
        else ["--seccomp-bpf"]
    )
    return [
        *("strace", "-D", "-f", "-yy", "-xx", "-s", str(_STRING_BYTES)),
        *("-o", f"|grep -avE {shlex.quote(_SOURCES_READ)} > {shlex.quote(str(trace))}"),
        *("-e", f"trace={_WRITES},{_TALK}"),
        *manner,
        *("--", *command),
    ]


async def ended(trace: Path, pid: int) -> None:
    """Return once the *trace* of process *pid*, which has ended or will, is whole."""
    while not _is_whole(trace, pid):  # noqa: ASYNC110  # it is another process that writes
        await asyncio.sleep(_END_POLL_S)


def _is_whole(trace: Path, pid: int) -> bool:
    with trace.open("rb") as file:
        file.seek(max(0, trace.stat().st_size - 200))
        return re.search(rb"^%d +\+\+\+ .*\+\+\+\n\Z" % pid, file.read(), re.MULTILINE) is not None


# --- reading ---

_UNFINISHED = b" <unfinished ...>\n"
_RESUMED = b" resumed>"

_CALL = re.compile(rb"(\d+) +(\w+)\((.*)\) += (-?\w+|\?)", re.DOTALL)
_FILE = re.compile(rb"\d+<([^>]*)>")
_CONNECTION = re.compile(rb"\d+<TCP:\[(.+->.+)\]>")
_STRING = re.compile(rb'"([^"]*)"')

_SYNCS = {b"fsync", b"fdatasync"}
_SENDS = {b"write", b"writev", b"sendto", b"sendmsg"}
_RECEIVES = {b"read", b"readv", b"recvfrom", b"recvmsg"}
_BY_NAME = {
    *(b"open", b"openat", b"creat", b"truncate", b"unlink", b"unlinkat"),
    *(b"rename", b"renameat", b"renameat2", b"link", b"linkat", b"symlink", b"symlinkat"),
}


def operations(traces: Iterable[Path], outbox: Path) -> list[Operation]:
    """Return what the processes of *traces*, one after the other, did to *outbox* and on TCP.

    AssertionError: a call to the outbox that this does not know, and so must learn first.
    """
    found: list[Operation] = []
    for trace in traces:
        with trace.open("rb") as lines:
            reading = _Reading(outbox, found)
            for line in lines:
                reading.read(line)
    return found


class _Reading:
    """Of one process, which may have threads. Adds to *found*."""

    def __init__(self, outbox: Path, found: list[Operation]) -> None:
        self._folder = _escaped(str(outbox.parent))
        self._watched = {
            _escaped(f"{outbox}{suffix}"): f"{outbox.name}{suffix}" for suffix in SUFFIXES
        }
        self._found = found
        self._unfinished: dict[bytes, tuple[bytes, int]] = {}
        """By thread: the beginning of its line, and how many operations were done then."""

    def read(self, line: bytes) -> None:
        begun = len(self._found)
        if line.endswith(_UNFINISHED):
            beginning = line.removesuffix(_UNFINISHED)
            self._unfinished[line.split(b" ", 1)[0]] = beginning, begun
            call = _CALL.match(beginning + b") = 0")
            if call and call[2] in _SENDS:  # the other side may have it before the call returns
                self._take(call[2], call[3], -1, begun)
            return
        if _RESUMED in line[:60]:
            unfinished = self._unfinished.pop(line.split(b" ", 1)[0], None)
            if unfinished is None:  # of the sources that were left out
                return
            beginning, begun = unfinished
            line = beginning + line.partition(_RESUMED)[2]
        call = _CALL.match(line)
        if call is None or call[4].startswith((b"-", b"?")):
            return
        sent_before = call[2] in _SENDS and begun < len(self._found)
        if not (sent_before and _CONNECTION.match(call[3])):
            self._take(call[2], call[3], int(call[4], 0), begun)

    def _take(self, call: bytes, arguments: bytes, result: int, begun: int) -> None:
        if (connection := _CONNECTION.match(arguments)) and call in _SENDS | _RECEIVES:
            data = _data(arguments)
            name = connection[1].decode()
            if call in _SENDS:
                self._found.append(Sent(name, data if result < 0 else data[:result]))
            else:
                self._found.append(Received(name, data[:result]))
            return
        if call in _BY_NAME:
            paths = _STRING.findall(arguments)
        elif file := _FILE.match(arguments):
            paths = [file[1]]
        else:
            return
        if call in _SYNCS and paths == [self._folder]:
            self._found.append(Synced("", begun))
        for name in filter(None, map(self._watched.get, paths)):
            self._found.extend(self._on_file(call, name, arguments, result, begun))

    def _on_file(
        self, call: bytes, name: str, arguments: bytes, result: int, begun: int
    ) -> Iterator[Operation]:
        match call:
            case b"openat" if b"O_TRUNC" not in arguments:
                if b"O_CREAT" in arguments:
                    yield Opened(name)
            case b"pwrite64":
                yield Written(name, _last_number(arguments), _data(arguments)[:result])
            case b"ftruncate":
                yield Resized(name, _last_number(arguments))
            case b"fsync" | b"fdatasync":
                yield Synced(name, begun)
            case b"unlink":
                yield Unlinked(name)
            case _:
                raise AssertionError(f"a call that no model knows: {call!r} of {name}")


def _last_number(arguments: bytes) -> int:
    return int(arguments.rpartition(b", ")[2])


def _data(arguments: bytes) -> bytes:
    assert b'"...' not in arguments, "strace cut a string short"
    return b"".join(
        bytes.fromhex(string.replace(b"\\x", b"").decode()) for string in _STRING.findall(arguments)
    )


def _escaped(path: str) -> bytes:
    return b"".join(b"\\x%02x" % byte for byte in path.encode())
