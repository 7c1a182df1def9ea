"""A certificate that a release adds to the firmware's db: the signed variable, checked as the firmware will check it.

EFI_VARIABLE_AUTHENTICATION_2 (UEFI specification, 8.2.2) with one list of one certificate, signed by a key exchange
key. The signature covers the variable's name and attributes, so what is signed for another variable, or to replace db,
is found out before anything is changed. Strict where firmware is not: our own publishing makes no other form.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256

from vmm.update import firmware
from vmm.update.errors import Refused

LAYER = "db addition"
ATTRIBUTES = 0x67
"""Non-volatile, for boot and run time, authenticated with a time stamp, and appended to what is there."""

_TIME_BYTES = 16
_AUTHENTICATION = struct.Struct("<16sIHH16s")
"""EFI_TIME, then WIN_CERTIFICATE_UEFI_GUID: length, revision, type, kind of signature."""
_REVISION, _TYPE = 0x0200, 0x0EF1
_PKCS7 = uuid.UUID("4aafd29d-68df-49ee-8aa9-347d375665a7").bytes_le


@dataclass(frozen=True)
class Addition:
    """``payload`` is what the firmware takes; ``list`` what its db has behind its end then."""

    payload: bytes
    list: bytes
    entry: bytes
    signature: bytes
    time: bytes

    @property
    def certificate(self) -> bytes:
        """The certificate, in DER; ``entry`` has its owner in front."""
        return self.entry[firmware.OWNER_BYTES :]


def parse(payload: bytes) -> Addition:
    """Take a payload apart. Raises: Refused."""
    if len(payload) < _AUTHENTICATION.size:
        raise Refused(LAYER, "it ends in the middle of its header")
    time, length, revision, type, kind = _AUTHENTICATION.unpack_from(payload)
    end = _TIME_BYTES + length
    if (revision, type, kind) != (_REVISION, _TYPE, _PKCS7) or not _AUTHENTICATION.size < end < len(payload):
        raise Refused(LAYER, "it is no authenticated variable")
    content = payload[end:]
    match [*firmware.entries("the addition", content)]:
        case [(firmware.X509, entry)]:
            pass
        case _:
            raise Refused(LAYER, "it does not hold one certificate and nothing else")
    try:
        certificate = x509.load_der_x509_certificate(entry[firmware.OWNER_BYTES :])
    except ValueError as error:
        raise Refused(LAYER, f"its certificate cannot be read: {error}") from None
    if certificate.issuer != certificate.subject:
        # Firmware may name the issuer in PCR 7 instead, if db has that, too.
        raise Refused(LAYER, "its certificate is not self-signed")
    return Addition(payload, content, entry, payload[_AUTHENTICATION.size : end], time)


def check_signed(addition: Addition, key_exchange: Iterable[bytes]) -> None:
    """Whether a key exchange key has signed it as an addition to db.

    Arguments: ``key_exchange`` are certificates in DER. Raises: Refused.
    """
    signed = b"".join(
        (
            "db".encode("utf-16-le"),
            uuid.UUID(firmware.IMAGE_SECURITY).bytes_le,
            struct.pack("<I", ATTRIBUTES),
            addition.time,
            addition.list,
        )
    )
    if not any(_verifies(addition.signature, signed, certificate) for certificate in key_exchange):
        raise Refused(LAYER, "no key exchange key of this firmware has signed it as an addition to db")


def _verifies(signature: bytes, signed: bytes, certificate: bytes) -> bool:
    """Whether a PKCS #7 SignedData without signed attributes verifies: its last bytes are the signature itself."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
        if not isinstance(key, RSAPublicKey):
            return False
        key.verify(signature[-key.key_size // 8 :], signed, PKCS1v15(), SHA256())
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
