"""`holdfast identity`: the key and certificate by which hosts know this user, and whom else a host knows."""

from __future__ import annotations

import argparse
import datetime
import getpass
import hashlib
import socket

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmm import atomic
from vmm.cli import identities, settings
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import fingerprint_text, print_fields
from vmm.config.certificates import check_certificate
from vmm.errors import Conflict, NotFound

_VALIDITY = datetime.timedelta(days=5 * 365)
# A host whose clock is a little behind must not refuse a new certificate.
_BACKDATED = datetime.timedelta(hours=1)


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "identity", "manage the certificate that hosts know you by, and those that a host knows")
    parser = add(verbs, "create", "make a P-384 key and a client certificate, valid for five years", _create)
    parser.add_argument("--name", help="common name in the certificate (default: user@computer)")
    parser.add_argument(
        "--force", action="store_true", help="replace the present identity; hosts know only the old one"
    )
    parser = add(verbs, "show", "show your own certificate, or an identity that the host knows", _show)
    parser.add_argument("name", nargs="?", help="an identity of the host's (default: your own certificate)")
    parser.add_argument("--pem", action="store_true", help="print your certificate itself, to have it enrolled")
    identities.register(verbs)


def make(common_name: str) -> tuple[bytes, bytes]:
    """Make a private key and its self-signed client certificate, both PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    now = datetime.datetime.now(datetime.UTC)
    # Only digital signatures: TLS 1.3 uses nothing else.
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _VALIDITY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)


def _create(args: argparse.Namespace) -> None:
    if settings.key_path().exists() and not args.force:
        raise Conflict(
            f"there is an identity already in {settings.directory()}", hint="see it with `holdfast identity show`"
        )
    settings.make_directory()
    key, certificate = make(args.name or f"{getpass.getuser()}@{socket.gethostname()}")
    atomic.write(settings.key_path(), key, mode=0o600)
    atomic.write(settings.certificate_path(), certificate)
    _show_own(pem=False)


def _show(args: argparse.Namespace) -> int | None:
    if args.name is not None:
        return remotely(identities.show)(args)
    _show_own(pem=args.pem)
    return None


def _show_own(*, pem: bool) -> None:
    path = settings.certificate_path()
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise NotFound("there is no identity yet", hint="make one with `holdfast identity create`") from None
    if pem:
        print(text, end="")
        return
    certificate = check_certificate(text)
    print_fields(
        [
            ("Subject", certificate.subject.rfc4514_string()),
            ("Valid until", certificate.not_valid_after_utc.date().isoformat()),
            (
                "SHA-256",
                fingerprint_text(hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()),
            ),
            ("Certificate", str(path)),
            ("Key", str(settings.key_path())),
        ]
    )
