"""The first bytes of a qcow2 image, read without believing anything in them.

QEMU's own code opens what a qcow2 header names (backing files, data files) while it opens the image. So an image that
names anything is refused here, before QEMU sees it.
"""

from __future__ import annotations

import os
import struct

from vmm.errors import UserError
from vmm.volumes.types import MAX_SIZE

# docs/interop/qcow2.rst: magic, version, backing offset and size, cluster bits, virtual size, encryption, L1 size and
# offset, refcount offset and clusters, snapshots and their offset; version 3 goes on with three feature words.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">Q")
_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
_KNOWN = (1 << 0) | _CORRUPT | _DATA_FILE | (1 << 3) | (1 << 4)


class ImageRefused(UserError):
    """An image that is not taken; the text says which of its properties is at fault."""

    code = "image-refused"
    status = 422


def virtual_size(descriptor: int) -> int:
    """The size in bytes of the disk in a self-contained qcow2 image. Raises: ImageRefused."""
    raw = os.pread(descriptor, _HEADER.size + _FEATURES.size, 0)
    if not raw.startswith(b"QFI\xfb"):
        raise ImageRefused("the image is not in the format qcow2", hint="Is it raw? Then say format=raw.")
    if len(raw) < _HEADER.size + _FEATURES.size:
        raise ImageRefused("the image ends within its header")
    _, version, backing, _, cluster_bits, size, encryption, _, _, _, _, snapshots, _ = _HEADER.unpack_from(raw)
    if version not in (2, 3):
        raise ImageRefused(f"the image has version {version} of qcow2; 2 and 3 are known")
    features = _FEATURES.unpack_from(raw, _HEADER.size)[0] if version == 3 else 0
    if backing:
        raise ImageRefused(
            "the image has a backing file, which is not part of it",
            hint="Make it self-contained first: qemu-img convert -O qcow2 IMAGE NEW-IMAGE",
        )
    if features & _DATA_FILE:
        raise ImageRefused("the image keeps its data in another file (data-file), which is not part of it")
    if encryption:
        raise ImageRefused("the image is encrypted")
    if snapshots:
        raise ImageRefused("the image contains snapshots", hint="Delete them first, or convert the image to a new one.")
    if features & _CORRUPT:
        raise ImageRefused("the image is marked as corrupt", hint="Repair it first: qemu-img check -r all IMAGE")
    if features & ~_KNOWN:
        raise ImageRefused(f"the image uses unknown features (bits {features & ~_KNOWN:#x})")
    if not 9 <= cluster_bits <= 21:
        raise ImageRefused(f"the image has clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible")
    if not 0 < size <= MAX_SIZE:
        raise ImageRefused(f"the image says that its disk has {size} bytes; 1 to {MAX_SIZE} are possible")
    return int(size)
