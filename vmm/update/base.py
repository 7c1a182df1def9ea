"""The running version's parts, which differences are made against; the result is hashed, so these need no trust."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from vmm.update.errors import Refused

LAYER = "base"
_EROFS_MAGIC = 0xE0F5E1E2
_MOST = 1 << 32


class Bases(Protocol):
    """Opens a part of the running version: "root", "verity" or "uki"; ``size`` in bytes if it is known.

    Raises: Refused or OSError when there is no such base.
    """

    def __call__(self, part: str, size: int | None) -> AbstractContextManager[mmap.mmap]: ...


@contextmanager
def mapped(path: Path, size: int | None = None) -> Iterator[mmap.mmap]:
    """The first ``size`` bytes of a file or device, or all of it. Raises: OSError; Refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.lseek(descriptor, 0, os.SEEK_END) if size is None else size
        if not 0 < length <= _MOST:
            raise Refused(LAYER, f"{path} cannot be read as a base of {length} bytes")
        with mmap.mmap(descriptor, length, prot=mmap.PROT_READ) as content:
            yield content
    except ValueError as error:
        raise Refused(LAYER, f"{path}: {error}") from None
    finally:
        os.close(descriptor)


def erofs_size(path: Path) -> int:
    """The size of an erofs file system in bytes, of its superblock. Raises: Refused; OSError."""
    with path.open("rb") as file:
        file.seek(1024)
        block = file.read(128)
    if len(block) < 128 or struct.unpack_from("<I", block)[0] != _EROFS_MAGIC:
        raise Refused(LAYER, f"{path} holds no erofs")
    bits, (blocks,) = block[12], struct.unpack_from("<I", block, 36)
    if not 9 <= bits <= 16:
        raise Refused(LAYER, f"{path} has an erofs with blocks of impossible size")
    return int(blocks) << bits


def verity_size(path: Path) -> int:
    """The size of a dm-verity hash tree with its superblock, in bytes. Raises: Refused; OSError."""
    with path.open("rb") as file:
        block = file.read(512)
    if len(block) < 512 or block[:8] != b"verity\0\0":
        raise Refused(LAYER, f"{path} holds no hash tree")
    hash_block, blocks = struct.unpack_from("<4xIQ", block, 64)
    if block[32:64].rstrip(b"\0") != b"sha256" or not 512 <= hash_block <= 1 << 16:
        raise Refused(LAYER, f"{path} has a hash tree of unknown form")
    total, per_block = 1, hash_block // 32
    while blocks > 1:
        blocks = -(-blocks // per_block)
        total += blocks
    return int(total * hash_block)
