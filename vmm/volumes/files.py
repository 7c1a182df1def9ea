"""Making and removing the files behind volumes, durably."""

from __future__ import annotations

import grp
import os
from pathlib import Path

from vmm import atomic
from vmm.errors import Unavailable

IMPORT_GROUP = "holdfast-import"
GIB = 1 << 30


def make_directory(path: Path) -> None:
    """Make a directory through which machines' own users may pass, but which they cannot list."""
    path.mkdir(exist_ok=True)
    path.chmod(0o711)


def reserve(total: int) -> int:
    """What is never promised of a file system of ``total`` bytes: 5 %, at least 1 GiB (10 % where that is less)."""
    return max(total // 20, min(GIB, total // 10))


def create(path: Path, size: int) -> None:
    """Make a sparse file that reads as ``size`` zero bytes. Raises: Unavailable when the disk does not take it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        atomic.sync_folder(path.parent)
    except OSError as error:
        raise Unavailable(f"the volume's file cannot be made: {error.strerror}") from None


def remove(path: Path) -> None:
    """Remove a file if it is there, durably."""
    path.unlink(missing_ok=True)
    atomic.sync_folder(path.parent)


def share_with_converter(path: Path) -> None:
    """Let the converter, which runs as another user, open a file that it is handed (by way of /proc/self/fd)."""
    try:
        group = grp.getgrnam(IMPORT_GROUP).gr_gid
    except KeyError:
        return  # no such user: the converter, if there is one, runs as ourselves
    os.chown(path, -1, group)
    path.chmod(0o660)


def take_back(path: Path) -> None:
    """Undo share_with_converter and make the content durable."""
    os.chown(path, -1, os.getegid())
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
