"""The seed container: one line of ASCII with length and SHA-256, then the configuration document.

It lies raw in a partition (or on a whole device), so that no file system parser ever sees what an
attacker may have written: `HOLDFAST-SEED 1 <length> <sha256-hex>\\n` and <length> bytes of JSON.
"""

from __future__ import annotations

import hashlib
import re
from typing import BinaryIO

from vmm.config.load import MAX_DOCUMENT
from vmm.errors import UserError

PARTITION_NAME = "HOLDFAST-SEED"
PARTITION_TYPE = "6f1c2b0e-8d3a-4c57-9b62-1f0a7e5d4c31"
MAGIC = b"HOLDFAST-SEED "

_HEADER = re.compile(rb"HOLDFAST-SEED 1 ([1-9][0-9]{0,9}) ([0-9a-f]{64})\n")
# The longest header, and the longest region that can matter.
_MAX_HEADER = len(MAGIC) + 2 + 10 + 1 + 64 + 1
MAX_SEED = _MAX_HEADER + MAX_DOCUMENT


def pack(document: bytes) -> bytes:
    """Put a document into its container. Raises: UserError when it is empty or too long."""
    if not 0 < len(document) <= MAX_DOCUMENT:
        raise UserError(f"a seed holds 1 to {MAX_DOCUMENT} bytes, not {len(document)}")
    return b"HOLDFAST-SEED 1 %d %s\n" % (len(document), hashlib.sha256(document).hexdigest().encode()) + document


def unpack(region: bytes) -> bytes | None:
    """Take the document out of a region's first MAX_SEED bytes; None if the region is all zero.

    Raises: UserError for anything that is not a whole, undamaged container.
    """
    if not region.strip(b"\0"):
        return None
    if not region.startswith(MAGIC):
        raise UserError("it holds no seed: the first line is missing")
    header = _HEADER.match(region[:_MAX_HEADER])
    if header is None:
        raise UserError("the seed's first line is damaged or of an unknown version")
    length = int(header[1])
    if length > MAX_DOCUMENT:
        raise UserError(f"the seed says it is {length} bytes long; at most {MAX_DOCUMENT} are allowed")
    document = region[header.end() : header.end() + length]
    if len(document) < length:
        raise UserError(f"the seed is cut off: {len(document)} of {length} bytes are there")
    if hashlib.sha256(document).hexdigest().encode() != header[2]:
        raise UserError("the seed is damaged: its SHA-256 does not match")
    return document


def read(stream: BinaryIO) -> bytes | None:
    """Read a seed from an open partition or file at its present position. See unpack()."""
    return unpack(stream.read(MAX_SEED))
