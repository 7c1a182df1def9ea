"""Unpacking a part: zstd, whole or as a difference to the part of an older version, never more than was announced."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import zstandard

from vmm.update.errors import Refused
from vmm.update.files import CHUNK
from vmm.update.types import MAX_WINDOW

LAYER = "unpacking"


def unpack(packed: Path, target: Path, size: int, *, base: mmap.mmap | None = None, tick: Callable[[int], None]) -> str:
    """Write the plain bytes of ``packed`` into the new file ``target``, synced.

    Arguments: ``size`` is what it must unpack to, in bytes; ``base`` the older part, for a difference; ``tick``
    hears how many bytes were written and may raise to end it.
    Returns: the SHA-384. Raises: Refused when it is no zstd or has another size; OSError.
    """
    dictionary = None
    if base is not None:
        # The bindings copy it: unpacking a difference takes twice the part's size in memory, for some seconds.
        with memoryview(base) as view:
            dictionary = zstandard.ZstdCompressionDict(view, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    unpacker = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=MAX_WINDOW)
    digest = hashlib.sha384()
    written = 0
    target.unlink(missing_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb", buffering=0) as out, packed.open("rb") as source:
        os.posix_fallocate(descriptor, 0, size)
        try:
            with unpacker.stream_reader(source, read_across_frames=True) as plain:
                while piece := plain.read(CHUNK):
                    written += len(piece)
                    if written > size:
                        raise Refused(LAYER, f"{packed.name} unpacks to more than the {size} bytes announced")
                    digest.update(piece)
                    out.write(piece)
                    tick(len(piece))
        except zstandard.ZstdError as error:
            raise Refused(LAYER, f"{packed.name}: {error}") from None
        if written != size:
            raise Refused(LAYER, f"{packed.name} unpacks to {written} bytes, not the {size} announced")
        os.fsync(descriptor)
    return digest.hexdigest()
