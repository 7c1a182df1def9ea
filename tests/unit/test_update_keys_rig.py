"""What the tests of the firmware's keys share: certificates, lists of them, additions to db, and logs of starts."""

from __future__ import annotations

import datetime
import hashlib
import struct
import uuid
from collections.abc import Iterable, Sequence
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from vmm.update import eventlog, firmware, foresight

OWNER = uuid.UUID(int=7)
IMAGE_SECURITY = uuid.UUID(firmware.IMAGE_SECURITY)
GLOBAL = uuid.UUID(firmware.GLOBAL)
APPEND, REPLACE = 0x67, 0x27
_X509 = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072").bytes_le
_PKCS7 = uuid.UUID("4aafd29d-68df-49ee-8aa9-347d375665a7").bytes_le
_TIME = struct.pack("<HBBBBBBIhBB", 2026, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)


@cache
def private(name: str) -> rsa.RSAPrivateKey:
    """A key, the same for a name as long as the tests run."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def certificate(name: str, issuer: str = "") -> bytes:
    """A name's certificate in DER, issued by itself unless told otherwise."""
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer or name)]
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(private(name).public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=3650))
    )
    return made.sign(private(issuer or name), hashes.SHA256()).public_bytes(Encoding.DER)


def entry(der: bytes, owner: uuid.UUID = OWNER) -> bytes:
    """EFI_SIGNATURE_DATA."""
    return owner.bytes_le + der


def signature_list(*ders: bytes) -> bytes:
    """One EFI_SIGNATURE_LIST for each certificate, as cert-to-efi-sig-list makes them."""
    entries = map(entry, ders)
    return b"".join(_X509 + struct.pack("<III", 28 + len(e), 0, len(e)) + e for e in entries)


def payload(
    content: bytes,
    *,
    by: str = "KEK",
    variable: str = "db",
    vendor: uuid.UUID = IMAGE_SECURITY,
    attributes: int = APPEND,
) -> bytes:
    """EFI_VARIABLE_AUTHENTICATION_2 as sign-efi-sig-list makes it, but for what stands in front of the signature."""
    signed = variable.encode("utf-16-le") + vendor.bytes_le + struct.pack("<I", attributes) + _TIME + content
    signature = bytes(100) + private(by).sign(signed, padding.PKCS1v15(), hashes.SHA256())
    header = struct.pack("<IHH16s", 24 + len(signature), 0x0200, 0x0EF1, _PKCS7)
    return _TIME + header + signature + content


def variable(name: str, content: bytes, vendor: uuid.UUID = IMAGE_SECURITY) -> bytes:
    """UEFI_VARIABLE_DATA."""
    return vendor.bytes_le + struct.pack("<QQ", len(name), len(content)) + name.encode("utf-16-le") + content


Step = tuple[int, int, bytes]
"""An event: register, type, data."""


def start(db: bytes, *vouched: bytes) -> list[Step]:
    """What firmware measures in a start, in which these entries of db vouch for programs, in this order."""
    return [
        (0, 8, b"version"),
        (7, foresight.DRIVER_CONFIG, variable("SecureBoot", b"\1", GLOBAL)),
        (7, foresight.DRIVER_CONFIG, variable("KEK", signature_list(certificate("KEK")), GLOBAL)),
        (7, foresight.DRIVER_CONFIG, variable("db", db)),
        (7, foresight.DRIVER_CONFIG, variable("dbx", b"")),
        (7, 4, bytes(4)),
        (4, 0x80000003, b"loader"),
        *((7, foresight.AUTHORITY, variable("db", each)) for each in vouched),
    ]


def pcr7(steps: Iterable[Step]) -> bytes:
    """What PCR 7 holds after a start."""
    value = bytes(32)
    for register, _, data in steps:
        if register == 7:
            value = hashlib.sha256(value + hashlib.sha256(data).digest()).digest()
    return value


def log(steps: Sequence[Step], *, algorithms: Sequence[tuple[int, int]] = ((4, 20), (11, 32))) -> bytes:
    """The log of a start, crypto agile, with these hashes (number, size) of each event."""
    sizes = b"".join(struct.pack("<HH", *each) for each in algorithms)
    header = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms)) + sizes + b"\0"
    content = struct.pack("<II20xI", 0, eventlog.NO_ACTION, len(header)) + header
    for register, kind, data in [(0, eventlog.NO_ACTION, b"StartupLocality\0\3"), *steps]:
        content += struct.pack("<III", register, kind, len(algorithms))
        for number, size in algorithms:
            digest = hashlib.sha256(data).digest() if number == 11 else bytes(size)
            content += struct.pack("<H", number) + digest
        content += struct.pack("<I", len(data)) + data
    return content
