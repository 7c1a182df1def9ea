"""The server's key and certificate, and the TLS settings of the listener."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vmm import atomic
from vmm.errors import UserError

SUITES = frozenset({"TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"})
LIFETIME = datetime.timedelta(days=3652)
# A host's clock may run late until it is synchronised: its certificate must not seem to come from the future.
_EARLIER = datetime.timedelta(days=1)
_LONGEST_NAME = 64  # of a common name (RFC 5280); the whole name stands in subjectAltName


@dataclass(frozen=True)
class Pins:
    """Who is let in: the TLS settings that take their certificates, and the SHA-256 of each."""

    context: ssl.SSLContext
    fingerprints: frozenset[str]


def server_context(directory: Path, hostname: str, address: str, certificates: Iterable[str]) -> ssl.SSLContext:
    """The listener's TLS settings: 1.3 only, and a client certificate that is shown must be a pinned one.

    Arguments: ``directory`` keeps server.key and server.crt, which are made when absent or unusable, for ``hostname``
    and ``address`` (an interface address, or "dhcp"); ``certificates`` are the pinned ones (PEM).
    Raises: UserError when a certificate cannot be read; OSError when the files cannot be written.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Resumption would skip the check of the client's certificate after it was removed.
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    # The pinned certificates are anchors themselves, whether self-signed or issued by somebody.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata="\n".join(certificates))
    except ssl.SSLError as error:
        raise UserError(f"a pinned certificate cannot be used: {error.reason or error}") from None
    key, certificate = directory / "server.key", directory / "server.crt"
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError):
        make_server_files(directory, hostname, address)
        context.load_cert_chain(certificate, key)
    return context


def check_policy(context: ssl.SSLContext) -> None:
    """Refuse to serve when OpenSSL would offer other TLS 1.3 suites than the product claims.

    Python cannot choose them; the image's /etc/ssl/holdfast.cnf does, through OPENSSL_CONF.
    Raises: UserError.
    """
    offered = {str(c["name"]) for c in context.get_ciphers() if c["protocol"] == "TLSv1.3"}
    if offered != SUITES:
        raise UserError(
            f"OpenSSL offers the TLS suites {', '.join(sorted(offered))}",
            hint="start this service with OPENSSL_CONF=/etc/ssl/holdfast.cnf",
        )


def make_server_files(directory: Path, hostname: str, address: str) -> None:
    """Make a P-384 key and a self-signed certificate for it.

    Arguments: as for server_context. The certificate is written last, so a crash in between leaves a pair that
    does not fit and is made again.
    """
    # Needed once in a host's life, and dear to import.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:_LONGEST_NAME])])
    names: list[x509.GeneralName] = [x509.DNSName(hostname)]
    if address != "dhcp":
        import ipaddress  # noqa: PLC0415

        names.append(x509.IPAddress(ipaddress.ip_interface(address).ip))
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
        False,
    )
    now = datetime.datetime.now(datetime.UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, encipher_only=False, decipher_only=False, **usage), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    atomic.write(directory / "server.key", private, mode=0o600)
    atomic.write(directory / "server.crt", certificate.public_bytes(pem))
