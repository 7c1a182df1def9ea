"""The little of PE files (UEFI programs, unified kernel images) that the updater looks at.

The file may be anything: every offset and size in it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmm.update.errors import Refused

LAYER = "UKI"
_MOST_HEADERS = 64 << 10
_MOST_SECTIONS = 96
_MOST_TEXT = 64 << 10
_MOST_FILE = 512 << 20
_MOST_CERTIFICATES = 1 << 20
_CHUNK = 1 << 20
_PE32_PLUS = 0x20B
_PKCS_SIGNED_DATA = 2
_SECTION = struct.Struct("<8sIIII16x")


@dataclass(frozen=True)
class Section:
    """Where a section's bytes lie in the file; ``used`` of them are its content, ``stored`` are on disk."""

    name: str
    used: int
    offset: int
    stored: int


@dataclass(frozen=True)
class Image:
    """A PE file's structure. Offsets are into the file, in bytes; ``certificates`` is offset and size."""

    length: int
    headers: int
    checksum: int
    certificate_entry: int
    certificates: tuple[int, int]
    sections: tuple[Section, ...]


def read(file: BinaryIO) -> Image:
    """The structure of an open PE32+ file. Raises: Refused."""
    length = file.seek(0, os.SEEK_END)
    if length > _MOST_FILE:
        raise Refused(LAYER, f"it has {length} bytes, more than {_MOST_FILE}")
    file.seek(0)
    head = file.read(_MOST_HEADERS)
    try:
        return _parse(head, length)
    except struct.error:
        raise Refused(LAYER, "its headers end too early") from None


def _parse(head: bytes, length: int) -> Image:
    (start,) = struct.unpack_from("<I", head, 0x3C)
    if head[:2] != b"MZ" or head[start : start + 4] != b"PE\0\0":
        raise Refused(LAYER, "it is no PE file")
    count, optional_size = struct.unpack_from("<H12xH", head, start + 6)
    optional = start + 24
    magic, headers, directories = (
        struct.unpack_from("<H", head, optional)[0],
        *struct.unpack_from("<I", head, optional + 60),
        *struct.unpack_from("<I", head, optional + 108),
    )
    if magic != _PE32_PLUS or directories < 5 or optional_size < 112 + 5 * 8:
        raise Refused(LAYER, "it is no 64-bit PE file with a certificate directory")
    if not 1 <= count <= _MOST_SECTIONS:
        raise Refused(LAYER, f"it has {count} sections")
    entry = optional + 112 + 4 * 8
    where, size = struct.unpack_from("<II", head, entry)
    if size and (where + size > length or size > _MOST_CERTIFICATES):
        raise Refused(LAYER, "its certificates lie outside of the file")
    table = optional + optional_size
    sections = []
    for number in range(count):
        name, used, _, stored, offset = _SECTION.unpack_from(head, table + number * _SECTION.size)
        if stored and offset + stored > length:
            raise Refused(LAYER, "a section lies outside of the file")
        sections.append(Section(name.rstrip(b"\0").decode("ascii", "replace"), min(used, stored), offset, stored))
    if not table + count * _SECTION.size <= headers <= min(length, _MOST_HEADERS):
        raise Refused(LAYER, "its headers have an impossible size")
    return Image(length, headers, optional + 64, entry, (where, size), tuple(sections))


def text(file: BinaryIO, image: Image, name: str) -> str:
    """The content of the one section with this name, as text. Raises: Refused when there is none or more than one."""
    found = [section for section in image.sections if section.name == name]
    if len(found) != 1:
        raise Refused(LAYER, f"it has {len(found)} sections {name} where one is expected")
    if found[0].used > _MOST_TEXT:
        raise Refused(LAYER, f"its section {name} has {found[0].used} bytes, more than {_MOST_TEXT}")
    file.seek(found[0].offset)
    try:
        return file.read(found[0].used).rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise Refused(LAYER, f"its section {name} is not text") from None


def authenticode_sha256(file: BinaryIO, image: Image) -> str:
    """The hash that db and dbx name a file by: all of it but the checksum and the signatures.

    Raises: Refused when the parts of the file overlap.
    """
    digest = hashlib.sha256()
    signatures = image.certificates[1]
    regions = [
        (0, image.checksum),
        (image.checksum + 4, image.certificate_entry),
        (image.certificate_entry + 8, image.headers),
    ]
    stored = sorted((s.offset, s.offset + s.stored) for s in image.sections if s.stored)
    summed = image.headers + sum(end - begin for begin, end in stored)
    if summed > image.length - signatures:
        raise Refused(LAYER, "its sections overlap")
    # What is in no section counts too, up to the signatures, which come last.
    for begin, end in (*regions, *stored, (summed, image.length - signatures)):
        file.seek(begin)
        left = end - begin
        while left > 0 and (piece := file.read(min(_CHUNK, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def signatures(file: BinaryIO, image: Image) -> list[bytes]:
    """The PKCS #7 signatures attached to a file, each in DER. Raises: Refused."""
    where, size = image.certificates
    file.seek(where)
    table = file.read(size) if size else b""
    found = []
    while len(table) >= 8:
        length, _, kind = struct.unpack_from("<IHH", table)
        if not 8 < length <= len(table):
            raise Refused(LAYER, "its signatures have an impossible size")
        if kind == _PKCS_SIGNED_DATA:
            found.append(_der(table[8:length]))
        table = table[length + -length % 8 :]
    return found


def _der(padded: bytes) -> bytes:
    """Without the padding behind the outermost DER sequence."""
    if len(padded) < 4 or padded[0] != 0x30:
        raise Refused(LAYER, "a signature is not in DER")
    if padded[1] < 0x80:
        return padded[: 2 + padded[1]]
    count = padded[1] & 0x7F
    return padded[: 2 + count + int.from_bytes(padded[2 : 2 + count])]


@dataclass(frozen=True)
class Uki:
    """What a unified kernel image says of the system that it starts; ``epoch`` is 0 if it says none."""

    version: str
    epoch: int
    root_hash: str


def describe(path: Path) -> Uki:
    """Read a UKI's command line and os-release. Raises: Refused; OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        image = read(file)
        words = text(file, image, ".cmdline").split()
        release = text(file, image, ".osrel").splitlines()
    hashes = [word.removeprefix("roothash=") for word in words if word.startswith("roothash=")]
    if len(hashes) != 1 or len(hashes[0]) != 64 or not set(hashes[0]) <= set("0123456789abcdef"):
        raise Refused(LAYER, "its command line does not name one root hash")
    known = dict(line.split("=", 1) for line in release if "=" in line)
    epoch = known.get("HOLDFAST_EPOCH", "0").strip("\"'")
    if not epoch.isascii() or not epoch.isdigit() or len(epoch) > 9:
        raise Refused(LAYER, f"its epoch is no number: {epoch[:40]!r}")
    return Uki(known.get("IMAGE_VERSION", "").strip("\"'"), int(epoch), hashes[0])
