"""What the firmware trusts to start (db) and what it never starts again (dbx), read from its variables."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmm.update.errors import Refused

LAYER = "firmware"
EFIVARS = "sys/firmware/efi/efivars"
IMAGE_SECURITY = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
DB = f"db-{IMAGE_SECURITY}"
KEK = f"KEK-{GLOBAL}"
_MOST = 1 << 20
OWNER_BYTES = 16
_LIST = struct.Struct("<16sIII")
X509 = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072").bytes_le
_SHA256 = uuid.UUID("c1c41626-504c-4092-aca9-41f936934328").bytes_le
_CERTIFICATE_HASHES = {
    uuid.UUID("3bd2a492-96c0-4079-b420-fcf98ef103ed").bytes_le: ("sha256", 32),
    uuid.UUID("7076876e-80c2-4ee6-aad2-28b349a6865b").bytes_le: ("sha384", 48),
    uuid.UUID("446dbf63-2502-4cda-bcfa-2465d2b0fe9d").bytes_le: ("sha512", 64),
}
"""Revoked certificates, as the hash of what the authority signed, with the time of revocation behind it."""


@dataclass(frozen=True)
class Signatures:
    """One of the two lists: certificates in DER, files' hashes and (hash name, hash) of certificates, in hex."""

    certificates: frozenset[bytes] = frozenset()
    hashes: frozenset[str] = frozenset()
    certificate_hashes: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Firmware:
    """``secure_boot`` tells whether the firmware enforces its lists."""

    secure_boot: bool
    db: Signatures
    dbx: Signatures


def read(efivars: Path) -> Firmware:
    """The firmware's lists. Raises: Refused when they cannot be read or make no sense."""
    enforced = variable(efivars / f"SecureBoot-{GLOBAL}")
    return Firmware(
        secure_boot=enforced[:1] == b"\1",
        db=parse("db", variable(efivars / DB)),
        dbx=parse("dbx", variable(efivars / f"dbx-{IMAGE_SECURITY}")),
    )


def variable(path: Path) -> bytes:
    """A variable's content, without the four bytes of attributes in front; empty if it does not exist.

    Raises: Refused.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise Refused(LAYER, f"{path.name} cannot be read: {error.strerror}") from None
    if len(content) > _MOST:
        raise Refused(LAYER, f"{path.name} has more than {_MOST} bytes")
    return content[4:]


def parse(name: str, content: bytes) -> Signatures:
    """What a list holds, in no order. Raises: Refused."""
    certificates: set[bytes] = set()
    hashes: set[str] = set()
    certificate_hashes: set[tuple[str, str]] = set()
    for kind, entry in entries(name, content):
        # Sixteen bytes in front say who put it there, which nothing depends on.
        value = entry[OWNER_BYTES:]
        if kind == X509:
            certificates.add(value)
        elif kind == _SHA256 and len(value) == 32:
            hashes.add(value.hex())
        elif kind in _CERTIFICATE_HASHES:
            algorithm, length = _CERTIFICATE_HASHES[kind]
            certificate_hashes.add((algorithm, value[:length].hex()))
    return Signatures(frozenset(certificates), frozenset(hashes), frozenset(certificate_hashes))


def entries(name: str, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Take EFI_SIGNATURE_LISTs apart (UEFI specification, 32.4.1): kind and EFI_SIGNATURE_DATA of each entry, in order.

    Raises: Refused.
    """
    while content:
        if len(content) < _LIST.size:
            raise Refused(LAYER, f"{name} ends in the middle of a list")
        kind, size, header, each = _LIST.unpack_from(content)
        body = content[_LIST.size + header : size]
        if not _LIST.size + header <= size <= len(content) or each <= OWNER_BYTES or len(body) % each:
            raise Refused(LAYER, f"{name} has a list of impossible size")
        content = content[size:]
        for start in range(0, len(body), each):
            yield kind, body[start : start + each]
