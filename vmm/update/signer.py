"""Whether this machine's firmware would start a new UKI, asked before anything is overwritten."""

from __future__ import annotations

import hashlib
import ssl
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from vmm.process import run
from vmm.update import pe
from vmm.update.errors import Refused
from vmm.update.firmware import Firmware, Signatures

LAYER = "UKI signer"
_MOST_SIGNATURES = 8
_TIMEOUT_S = 60.0


def check(uki: Path, firmware: Firmware) -> str:
    """Compare a UKI with db and dbx.

    Returns: who vouches for it, for the audit record. Raises: Refused naming what is wrong; CommandFailed.
    """
    with uki.open("rb") as file:
        image = pe.read(file)
        digest = pe.authenticode_sha256(file, image)
        signatures = pe.signatures(file, image)
    if digest in firmware.dbx.hashes:
        raise Refused(LAYER, f"the firmware's dbx revokes this very file (SHA-256 {digest[:16]}…)")
    if len(signatures) > _MOST_SIGNATURES:
        raise Refused(LAYER, f"the UKI has {len(signatures)} signatures")
    for signature in signatures:
        for signing in _certificates(signature):
            _check_not_revoked(signing, firmware.dbx)
    if digest in firmware.db.hashes:
        return "its hash in db"
    if not firmware.db.certificates and not firmware.secure_boot:
        return "nobody: Secure Boot is off and db is empty"
    if der := certificate(uki, sorted(firmware.db.certificates)):
        _check_not_revoked(_load(der), firmware.dbx)
        return f"{subject(der)} in db"
    raise Refused(
        LAYER,
        f"no certificate of the firmware's db ({len(firmware.db.certificates)}) has signed the UKI",
        hint="The firmware would refuse to start it; enrol the new certificate in db first.",
    )


def certificate(program: Path, certificates: Iterable[bytes]) -> bytes:
    """The first of some certificates (DER) that has signed a program, as firmware looks for it; empty if none has."""
    return next((der for der in certificates if _verifies(program, der)), b"")


def subject(certificate: bytes) -> str:
    """Whose certificate (DER) it is. Raises: Refused."""
    return _load(certificate).subject.rfc4514_string()


def _verifies(uki: Path, der: bytes) -> bool:
    with tempfile.TemporaryDirectory(prefix="holdfast-db-") as folder:
        certificate = Path(folder) / "db.pem"
        certificate.write_text(ssl.DER_cert_to_PEM_cert(der))
        return run(["sbverify", "--cert", certificate, uki], check=False, timeout=_TIMEOUT_S).returncode == 0


def _load(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise Refused(LAYER, f"a certificate of db cannot be read: {error}") from None


def _certificates(signature: bytes) -> list[x509.Certificate]:
    try:
        return pkcs7.load_der_pkcs7_certificates(signature)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Refused(LAYER, f"a signature of the UKI cannot be read: {error}") from None


def _check_not_revoked(certificate: x509.Certificate, dbx: Signatures) -> None:
    signed = certificate.tbs_certificate_bytes
    revoked = certificate.public_bytes(Encoding.DER) in dbx.certificates or any(
        hashlib.new(algorithm, signed).hexdigest() == value for algorithm, value in dbx.certificate_hashes
    )
    if revoked:
        raise Refused(LAYER, f"the firmware's dbx revokes {certificate.subject.rfc4514_string()}")
