"""What the file system does for a segment: room that is promised to it, and content that nobody can change any more."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from vmm.audit.records import MAX_LINE

# linux/falloc.h: FS_IOC_RESVSP is fallocate(2) with FALLOC_FL_KEEP_SIZE, which Python has no call for. Of struct
# space_resv only the length counts here (from the file's begin).
_RESVSP = 0x40305828
_SPACE = struct.Struct("=hh4xqqiI16x")
# linux/fsverity.h, linux/fs.h: FS_IOC_ENABLE_VERITY with version 1, SHA-256 (1), blocks of 4096 bytes, no salt, no
# signature; FS_IOC_GETFLAGS and its FS_VERITY_FL.
_ENABLE_VERITY = 0x40806685
_VERITY = struct.Struct("=IIIIQIIQ88x")
_GETFLAGS, _VERITY_FLAG = 0x80086601, 0x00100000

_ABSENT = (errno.EOPNOTSUPP, errno.ENOTTY)
"""How a file system says that it does not know of such a thing."""


class Unprotected(Exception):
    """A segment could not be put under fs-verity; the text says why. ``absent``: the file system has none."""

    def __init__(self, why: str, *, absent: bool) -> None:
        super().__init__(why)
        self.absent = absent


def promise(descriptor: int, size: int) -> None:
    """Set aside ``size`` bytes for a file in all, whose length stays; truncating it gives back what is not used.

    Raises: OSError when there is no room. A file system that cannot promise does not.
    """
    try:
        fcntl.ioctl(descriptor, _RESVSP, _SPACE.pack(0, os.SEEK_SET, 0, size, 0, 0))
    except OSError as error:
        if error.errno not in _ABSENT:
            raise


def reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes that others cannot have. Raises: OSError when there is no room."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def protect(path: Path) -> None:
    """Have the kernel refuse every change of a segment's content, root's included, and check what it reads of it.

    The file is durable before. Nobody may have it open for writing. Raises: Unprotected; FileNotFoundError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags = int.from_bytes(fcntl.ioctl(descriptor, _GETFLAGS, bytes(8)), "little")
            if not flags & _VERITY_FLAG:
                # Only who may write a file may enable it.
                os.fchmod(descriptor, 0o600)
                try:
                    fcntl.ioctl(descriptor, _ENABLE_VERITY, _VERITY.pack(1, 1, 4096, 0, 0, 0, 0, 0))
                finally:
                    os.fchmod(descriptor, 0o400)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        absent = error.errno in _ABSENT
        why = "the file system has no fs-verity" if absent else f"{path.name}: {error.strerror}"
        raise Unprotected(why, absent=absent) from None


def ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last line of a sealed segment. Raises: OSError."""
    with path.open("rb") as file:
        first = file.readline(MAX_LINE + 1)
        # A line is no longer than that, so the last one begins in here.
        file.seek(max(os.fstat(file.fileno()).st_size - 2 * MAX_LINE, 0))
        lines = file.read(2 * MAX_LINE).splitlines(keepends=True)
    return first, lines[-1] if lines else b""
