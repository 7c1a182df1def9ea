"""What the host's TLS server and client have in common: the suites, and a key with a certificate of its own."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Literal

from vmm import atomic
from vmm.errors import UserError

SUITES = frozenset({"TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"})
LIFETIME = datetime.timedelta(days=3652)
# A host's clock may run late until it is synchronised: its certificate must not seem to come from the future.
_EARLIER = datetime.timedelta(days=1)
_LONGEST_NAME = 64  # of a common name (RFC 5280); the whole name stands in subjectAltName


def check_policy(context: ssl.SSLContext) -> None:
    """Refuse to go on when OpenSSL would offer other TLS 1.3 suites than the product claims.

    Python cannot choose them; the image's /etc/ssl/holdfast.cnf does, through OPENSSL_CONF.
    Raises: UserError.
    """
    offered = {str(c["name"]) for c in context.get_ciphers() if c["protocol"] == "TLSv1.3"}
    if offered != SUITES:
        raise UserError(
            f"OpenSSL offers the TLS suites {', '.join(sorted(offered))}",
            hint="start this service with OPENSSL_CONF=/etc/ssl/holdfast.cnf",
        )


def load_pair(
    context: ssl.SSLContext, directory: Path, use: Literal["server", "client"], hostname: str, address: str
) -> None:
    """Have a context show the certificate USE.crt with USE.key, which are made when absent or unusable.

    Arguments: as for make_pair. Raises: OSError when the files cannot be written.
    """
    key, certificate = directory / f"{use}.key", directory / f"{use}.crt"
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError):
        make_pair(directory, use, hostname, address)
        context.load_cert_chain(certificate, key)


def make_pair(directory: Path, use: Literal["server", "client"], hostname: str, address: str) -> None:
    """Make a P-384 key and a self-signed certificate for it, USE.key and USE.crt in ``directory``.

    Arguments: the certificate is for ``use`` alone, and names ``hostname`` and ``address`` (an interface address, or
    "dhcp" for none). It is written last, so a crash in between leaves a pair that does not fit and is made again.
    Raises: OSError.
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
        names.append(x509.IPAddress(ipaddress.ip_interface(address).ip))
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
        False,
    )
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if use == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
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
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    atomic.write(directory / f"{use}.key", private, mode=0o600)
    atomic.write(directory / f"{use}.crt", certificate.public_bytes(pem))
