"""Files that are whole or not there, and how much room there is for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from vmm import atomic
from vmm.update.errors import NoRoom

CHUNK = 1 << 20
RESERVE = 64 << 20
"""Bytes that an update leaves to everybody else on a volume."""


def publish(temporary: Path, final: Path) -> None:
    """Give a written and synced file its name. Raises: OSError."""
    os.replace(temporary, final)
    atomic.sync_folder(final.parent)


def sha384(path: Path, *, size: int | None = None, tick: Callable[[int], None] = lambda count: None) -> str:
    """The hash of a file's (or device's) first ``size`` bytes, or of all of it; ``tick`` hears how many were read.

    Raises: OSError, also for links.
    """
    digest = hashlib.sha384()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while size is None or size > 0:
            piece = file.read(CHUNK if size is None else min(CHUNK, size))
            if not piece:
                break
            if size is not None:
                size -= len(piece)
            digest.update(piece)
            tick(len(piece))
    return digest.hexdigest()


def free(folder: Path) -> int:
    """Bytes free on the file system of a folder. Raises: OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def need(where: str, needed: int, available: int) -> None:
    """Say with figures what does not fit. Raises: NoRoom."""
    if needed > available:
        raise NoRoom(
            f"{where}: {needed} bytes are needed, {max(available, 0)} are free, {needed - available} are missing"
        )
