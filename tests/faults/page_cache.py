"""What a power cut leaves behind: a model of the page cache, fed with the writes that strace saw.

A sync that fails carries nothing to the disk, and the kernel then forgets that it had to: the pages
count as clean, every program reads them as if they were stored, and the next sync succeeds without
them. Source: LWN 752063, "PostgreSQL's fsync() surprise", 2018. The model does what Linux may do,
on any machine: a page reaches the disk in the first sync after its last write, or never.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PAGE_BYTES = 4096

_CALL = re.compile(r"^\d+ +(\w+)\(\d+<(.*?)>(?:, (.*))?\) += (-?\d+)")
_WRITTEN = re.compile(r'^"(.*)", \d+, (\d+)$')


@dataclass(slots=True)
class _File:
    cached: bytearray
    stored: bytearray
    dirty: set[int] = field(default_factory=set)
    """Pages, 0-based, that were written since the last sync, whether that succeeded or not."""


class PageCache:
    """The files of an outbox, as programs read them and as the disk has them."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Start with *files* as they are; their agent has synced all of it."""
        self._files = {
            str(file): _File(bytearray(file.read_bytes()), bytearray(file.read_bytes()))
            for file in files
        }

    def replay(self, trace: Path) -> None:
        """Do what was traced, with its data (`injection`), from beginning to end."""
        for call, path, arguments, result in _calls(trace.read_text()):
            file = self._files.get(path)
            if file is None:
                continue
            if call in {"fdatasync", "fsync"}:
                _sync(file, succeeded=result == 0)
            elif result < 0:
                continue
            elif call == "ftruncate":
                _truncate(file, int(arguments))
            else:
                written = _WRITTEN.match(arguments)
                assert call == "pwrite64", f"the model does not know {call}"
                assert written is not None, f"not the whole data: {arguments[-100:]}"
                _write(file, _bytes(written[1]), int(written[2]))

    def assert_true(self) -> None:
        """Compare what the model's programs read with what real ones do: no write was missed."""
        for path, file in self._files.items():
            assert file.cached == Path(path).read_bytes(), f"the model of {path} went astray"

    def cut_power(self, folder: Path) -> None:
        """Put the files into *folder* as the disk has them."""
        folder.mkdir()
        for path, file in self._files.items():
            (folder / Path(path).name).write_bytes(file.stored)


def _calls(trace: str) -> Iterator[tuple[str, str, str, int]]:
    """Yield name, path, further arguments and result; calls that a kill cut off have none."""
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        thread = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if "resumed>" in line and thread in begun:
            line = begun.pop(thread) + line.partition("resumed>")[2]  # noqa: PLW2901
        if call := _CALL.match(line):
            yield call[1], _bytes(call[2]).decode(), call[3] or "", int(call[4])


def _bytes(hexadecimal: str) -> bytes:
    """Return what strace's option -xx wrote as "\\x00\\xff"."""
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


def _write(file: _File, data: bytes, offset: int) -> None:
    end = offset + len(data)
    _extend(file.cached, end)
    file.cached[offset:end] = data
    file.dirty |= set(range(offset // _PAGE_BYTES, -(-end // _PAGE_BYTES)))


def _truncate(file: _File, size: int) -> None:
    del file.cached[size:]
    _extend(file.cached, size)
    file.dirty = {page for page in file.dirty if page * _PAGE_BYTES < size}


def _sync(file: _File, *, succeeded: bool) -> None:
    if succeeded:
        # The size is stored with the first page that needs it.
        del file.stored[len(file.cached) :]
        _extend(file.stored, len(file.cached))
        for page in file.dirty:
            extent = slice(page * _PAGE_BYTES, (page + 1) * _PAGE_BYTES)
            file.stored[extent] = file.cached[extent]
    file.dirty.clear()


def _extend(content: bytearray, size: int) -> None:
    content.extend(bytes(max(0, size - len(content))))
