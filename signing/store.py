"""Writes that are there whole or not at all, also after a kill or a power cut, and one writer at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmm.errors import Conflict


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file, replacing the old one in one step. Raises: OSError."""
    settle(_beside(path, data, mode), path)


def create(path: Path, data: bytes, *, mode: int = 0o644) -> bool:
    """Write a file unless there is one; False when there is. Raises: OSError."""
    fresh = _beside(path, data, mode)
    try:
        # Unlike a rename, a link never replaces what is there.
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        fresh.unlink()
    _sync(path.parent)
    return True


def settle(made: Path, path: Path) -> None:
    """Give a finished file on the same file system its name, replacing what has it, durably. Raises: OSError."""
    _sync(made)
    os.replace(made, path)
    _sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, durably, and those above it. Raises: OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one that changes a folder. Raises: Conflict when somebody else does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Conflict(f"{folder} is being changed by another command", hint="wait for it to end") from None
    finally:
        os.close(descriptor)


def _beside(path: Path, data: bytes, mode: int) -> Path:
    # One name for all attempts: what a kill left behind is taken away by the next write.
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return fresh


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
