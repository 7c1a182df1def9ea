"""What a client certificate must be before it may stand for an administrator."""

from __future__ import annotations

import warnings

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from vmm.errors import UserError

MIN_RSA_BITS = 3072
_BEGIN = "-----BEGIN "
_PRIVATE = "contains a private key"
_SPENT = "give the certificate only, and make a new key: this one is spent"
_CURVES = (ec.SECP256R1, ec.SECP384R1)


def check_authorities(pem: str) -> list[x509.Certificate]:
    """Parse a text that is one or more certificates in PEM form. Raises: UserError saying what is wrong."""
    if "PRIVATE KEY-----" in pem:
        raise UserError(_PRIVATE, hint=_SPENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x509.load_pem_x509_certificates(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError("not certificates in PEM form that can be read") from None


def check_anchors(pem: str) -> None:
    """The same, and each of them must be that of an authority. Raises: UserError saying what is wrong."""
    for certificate in check_authorities(pem):
        try:
            is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
            is_authority = False
        if not is_authority:
            raise UserError(f"not the certificate of an authority: {certificate.subject.rfc4514_string()}")


def check_certificate(pem: str) -> x509.Certificate:
    """Parse one PEM certificate and check its key and purpose.

    Raises: UserError saying what is wrong; the caller knows which field the text came from.
    """
    text = pem.strip()
    if "PRIVATE KEY-----" in text:
        raise UserError(_PRIVATE, hint=_SPENT)
    if text.count(_BEGIN) != 1 or not text.startswith("-----BEGIN CERTIFICATE-----"):
        raise UserError("not exactly one certificate in PEM form")
    try:
        with warnings.catch_warnings():
            # The library warns of certificates it will refuse one day; such a text must not reach the console.
            warnings.simplefilter("ignore")
            certificate = x509.load_pem_x509_certificate(text.encode())
            key = certificate.public_key()
            extensions = certificate.extensions
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension):
        raise UserError("not a certificate that can be read") from None
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, _CURVES):
            raise UserError(f"its key is on the curve {key.curve.name}; only P-256 and P-384 are allowed")
    elif isinstance(key, rsa.RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            raise UserError(f"its RSA key has {key.key_size} bits; at least {MIN_RSA_BITS} are needed")
    else:
        raise UserError("its key is neither EC (P-256, P-384) nor RSA")
    for extension in extensions:
        if isinstance(extension.value, x509.ExtendedKeyUsage):
            purposes = set(extension.value)
            if not purposes & {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}:
                raise UserError("it is not for client authentication (extendedKeyUsage has no clientAuth)")
    return certificate
