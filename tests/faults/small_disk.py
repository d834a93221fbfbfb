"""A real filesystem with room for little, and another program that takes what is left of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SIZE_BYTES = 16 * 1024 * 1024
"""Half of what the filesystem leaves of it becomes the agent's reserve, the rest fills quickly."""

_WRITES_BYTES = (1016 * 1024, 4096, 1)

_HUNGER_S = 0.001
"""How often a program that was refused a byte tries again."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount an ext4 of its own in *folder* while the block runs; skip where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (e2fsprogs)")
    image, disk = folder / "disk.img", folder / "disk"
    disk.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    # No blocks for root alone: the agent of a test is root, that of a service is not.
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    mounted = subprocess.run(
        ["mount", "-o", "loop", image, disk], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        # Lazily, should anything be open still: the loop device goes with its last user.
        subprocess.run(["umount", "--lazy", disk], check=True)
        image.unlink()


def free_bytes(disk: Path) -> int:
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


def fill(hog: Path) -> None:
    """Write *hog* until the disk has not one byte left."""
    with hog.open("ab", buffering=0) as file:
        for size in _WRITES_BYTES:
            _take(file.fileno(), size)
            os.fsync(
                file.fileno()
            )  # what the cache reserved too much comes free, and is taken next
        _take(file.fileno(), 1)


@contextmanager
def greed(hog: Path) -> Iterator[None]:
    """Let another program write *hog* while the block runs, and take each byte that comes free."""
    sated = threading.Event()

    def devour() -> None:
        with hog.open("ab", buffering=0) as file:
            while not sated.wait(_HUNGER_S):
                _take(file.fileno(), _WRITES_BYTES[1])

    program = threading.Thread(target=devour)
    program.start()
    try:
        yield
    finally:
        sated.set()
        program.join()


def _take(fd: int, size: int) -> None:
    with suppress(OSError):
        while True:
            os.write(fd, bytes(size))
