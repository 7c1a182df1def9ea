"""Unpacking a bundle: a plain tar of a repository (metadata/ and targets/), uploaded or on a stick.

Written by anybody, so nothing in it is taken at its word: regular files only, names from a short alphabet, every size
limited before a byte is written. A reader of our own, fed piece by piece, because the standard library's reads
extension headers of any length into memory.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from vmm import atomic
from vmm.update import files
from vmm.update.errors import NoRoom, Refused

LAYER = "bundle"
_BLOCK = 512
_END_BLOCKS = 2
_MOST_FILES = 4096
_MOST_FILE = 2 << 30
_MOST_METADATA = 4 << 20
_MOST_TOTAL = 4 << 30
_MOST_EXTENSION = 4096
_NAME = re.compile(
    r"metadata/[0-9A-Za-z][0-9A-Za-z._-]{0,127}\.json|targets/holdfast_[0-9.]{5,32}/[0-9a-f]{96}\.[a-z0-9.-]{1,64}"
)
_FOLDER = re.compile(r"(\.|metadata|targets(/holdfast_[0-9.]{5,32})?)/?")


class Unpacker:
    """Takes a tar's bytes by feed(), and puts the repository in place at finish()."""

    def __init__(self, folder: Path, free: Callable[[Path], int] = files.free, *, ends_itself: bool = False) -> None:
        """Arguments: ``folder`` is where the repository shall lie; what is there stays until finish().

        ``ends_itself`` is for a partition, longer than its tar: what follows the tar's own end is not looked at.
        """
        self._folder = folder
        self._work = folder.with_name(f"{folder.name}.new")
        self._free = free
        self._buffer = bytearray()
        self._file: BinaryIO | None = None
        self._left = self._padding = 0
        self._extension = ""
        self._longer_name = ""
        self._total = self._count = 0
        self._ends_itself = ends_itself
        self._zero_blocks = 0
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(mode=0o700, parents=True)

    @property
    def ended(self) -> bool:
        """Whether the two zero blocks came that end a tar."""
        return self._zero_blocks >= _END_BLOCKS

    def feed(self, content: bytes) -> None:
        """Take the next bytes. Raises: Refused; NoRoom; OSError."""
        self._total += len(content)
        if self._total > _MOST_TOTAL:
            raise Refused(LAYER, f"it has more than {_MOST_TOTAL} bytes")
        view = memoryview(content)
        while view and not (self._ends_itself and self.ended):
            if self._file is not None:
                piece, view = view[: self._left], view[self._left :]
                self._file.write(piece)
                self._left -= len(piece)
                if not self._left:
                    self._close()
            elif self._padding:
                step = min(self._padding, len(view))
                view, self._padding = view[step:], self._padding - step
            else:
                wanted = (self._left or _BLOCK) - len(self._buffer)
                self._buffer += view[:wanted]
                view = view[wanted:]
                if len(self._buffer) == (self._left or _BLOCK):
                    block, self._buffer = bytes(self._buffer), bytearray()
                    self._extend(block) if self._left else self._header(block)

    def finish(self) -> None:
        """The bundle is complete: make it durable and put it in place. Raises: Refused; OSError."""
        if not self._zero_blocks or self._buffer:
            raise Refused(LAYER, "it is incomplete, or no tar")
        if not (self._work / "metadata/timestamp.json").is_file():
            raise Refused(LAYER, "it holds no metadata/timestamp.json; it must be a tar of a repository, uncompressed")
        for folder, _, _ in os.walk(self._work):
            atomic.sync_folder(Path(folder))
        old = _former(self._folder)
        shutil.rmtree(old, ignore_errors=True)
        if self._folder.exists():
            os.replace(self._folder, old)
        files.publish(self._work, self._folder)
        shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        """Forget what was not put in place; never raises."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._work, ignore_errors=True)

    def _header(self, block: bytes) -> None:
        if block == bytes(_BLOCK):
            self._zero_blocks += 1
            return
        if self._zero_blocks:
            raise Refused(LAYER, "there is something behind its end")
        if int(_octal(block[148:156])) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            raise Refused(LAYER, "it is no tar, or damaged")
        name, size, kind = _text(block[:100]), _octal(block[124:136]), block[156:157]
        if block[257:262] == b"ustar" and block[257:265] != b"ustar  \0" and (prefix := _text(block[345:500])):
            name = f"{prefix}/{name}"
        name, self._longer_name = (self._longer_name or name).removeprefix("./"), ""
        if kind in (b"L", b"x"):
            # GNU's and POSIX's ways to write a name of more than 100 bytes, which ours are.
            if not 0 < size <= _MOST_EXTENSION:
                raise Refused(LAYER, "an extension header is too long")
            self._extension, self._left = kind.decode(), size
        elif kind == b"5" and size == 0 and _FOLDER.fullmatch(name or "."):
            return
        elif kind in (b"0", b"\0"):
            self._open(name, size)
        else:
            raise Refused(LAYER, f"{name[:200]!r} is no regular file")

    def _extend(self, content: bytes) -> None:
        self._padding = -len(content) % _BLOCK
        self._left = 0
        if self._extension == "L":
            self._longer_name = _text(content)
        else:
            self._longer_name = _pax_path(content)

    def _open(self, name: str, size: int) -> None:
        if not _NAME.fullmatch(name):
            raise Refused(LAYER, f"{name[:200]!r} does not belong into a repository")
        if size > (_MOST_METADATA if name.startswith("metadata/") else _MOST_FILE):
            raise Refused(LAYER, f"{name} has {size} bytes, more than allowed")
        self._count += 1
        if self._count > _MOST_FILES:
            raise Refused(LAYER, f"it holds more than {_MOST_FILES} files")
        if (available := self._free(self._work) - files.RESERVE) < size:
            raise NoRoom(f"the bundle's {name} has {size} bytes; {max(available, 0)} are free on the data volume")
        path = self._work / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise Refused(LAYER, f"it holds {name} twice") from None
        self._file, self._left, self._padding = os.fdopen(descriptor, "wb"), size, -size % _BLOCK
        if not size:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def recover(folder: Path) -> None:
    """After a kill between the two renamings of finish(), the former bundle is there again. Raises: OSError."""
    if _former(folder).exists() and not folder.exists():
        os.replace(_former(folder), folder)


def _former(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")


def _octal(field: bytes) -> int:
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,12}", text):
        raise Refused(LAYER, "it is no tar, or damaged")
    return int(text, 8)


def _pax_path(content: bytes) -> str:
    """The path among POSIX extended headers ("LENGTH KEY=VALUE"); sizes given there are refused, times ignored."""
    path = ""
    while content:
        found = re.match(rb"([0-9]{1,4}) ([A-Za-z0-9._]{1,64})=", content)
        if not found or not found.end() < int(found[1]) <= len(content) or content[int(found[1]) - 1] != 0x0A:
            raise Refused(LAYER, "an extension header is damaged")
        value, content = content[found.end() : int(found[1]) - 1], content[int(found[1]) :]
        if found[2] in (b"size", b"linkpath"):
            raise Refused(LAYER, f"an extension header sets {found[2].decode()}")
        if found[2] == b"path":
            path = value.decode("ascii", "replace")
    return path
