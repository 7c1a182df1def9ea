"""What a host is told at its first boot: administrators with certificates, and the configuration naming them."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.harness.repository import URL, server_certificate

MANAGEMENT_MAC = "52:54:00:00:00:01"
OPERATIONAL_MAC = "52:54:00:00:00:02"
REPOSITORY = Path("build/test/repository")
"""Key and certificate of the server of updates."""
ROLES = ("admin", "auditor", "operator", "user")
_SEED_CREDENTIAL = "holdfast.seed"


@dataclass(frozen=True)
class Identity:
    """A client of the API: its name, role, and the files that hold key and certificate (PEM)."""

    name: str
    role: str
    key: Path
    certificate: Path


def make_identity(directory: Path, name: str, role: str = "admin") -> Identity:
    """Make a P-384 key and a certificate signed by itself, or return what an earlier call made."""
    identity = Identity(name, role, directory / f"{name}.key", directory / f"{name}.crt")
    if identity.certificate.exists():
        return identity
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A restored host's clock lags behind until the harness sets it.
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    identity.key.touch(mode=0o600)
    identity.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    identity.certificate.write_bytes(certificate.public_bytes(pem))
    return identity


def identities(directory: Path) -> dict[str, Identity]:
    """One identity a role, named like it; made once and kept, so that checkpoints stay valid."""
    return {role: make_identity(directory, role, role) for role in ROLES}


def configuration(administrators: Sequence[Identity], **changes: Any) -> dict[str, Any]:
    """A configuration document that fits the harness' networks; ``changes`` replace top-level fields."""
    document: dict[str, Any] = {
        "version": 1,
        "hostname": "hf1",
        "banner": "Authorised use only.",
        "management": {"interface": MANAGEMENT_MAC, "address": "10.0.2.15/24", "gateway": "10.0.2.2", "dns": []},
        "operational": [{"name": "lan", "interface": OPERATIONAL_MAC}],
        "administrators": [
            {"name": i.name, "role": i.role, "certificate": i.certificate.read_text()} for i in administrators
        ],
        "time_servers": [],
        "update": {"repository": URL, "ca": server_certificate(REPOSITORY)[1].read_text()},
    }
    return {**document, **changes}


def credential(name: str, content: bytes) -> str:
    """The SMBIOS type 11 string that passes a credential to systemd and to the host's own seed reader."""
    return f"io.systemd.credential.binary:{name}={base64.b64encode(content).decode()}"


def seed_credential(document: dict[str, Any]) -> str:
    """The SMBIOS string that seeds a host with a configuration document."""
    return credential(_SEED_CREDENTIAL, json.dumps(document, sort_keys=True).encode())
