"""What the tests of configuration, command and console share: certificates, documents and a host's tree."""

from __future__ import annotations

import copy
import datetime
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from tests.harness.collector import Authority
from vmm import paths

PEM = serialization.Encoding.PEM
AUTHORITY = Authority.make("authority").pem
"""Who certifies servers of the audit trail."""
MANAGEMENT_MAC = "52:54:00:00:00:01"
OPERATIONAL_MAC = "52:54:00:00:00:02"


@cache
def certificate(
    name: str = "alice", key_kind: str = "p384", purpose: ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH
) -> str:
    """A self-signed certificate in PEM form."""
    return key_and_certificate(name, key_kind, purpose)[1]


@cache
def key_and_certificate(
    name: str, key_kind: str = "p384", purpose: ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH
) -> tuple[str, str]:
    """A key and its self-signed certificate, both PEM."""
    key: Any
    if key_kind.startswith("rsa"):
        key = rsa.generate_private_key(public_exponent=65537, key_size=int(key_kind[3:]))
    elif key_kind == "ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    else:
        key = ec.generate_private_key(
            {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}[key_kind]
        )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
    )
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    signed = builder.sign(key, None if key_kind == "ed25519" else hashes.SHA384())
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), signed.public_bytes(PEM).decode()


def document(**changes: Any) -> dict[str, Any]:
    """A configuration document that is right; a key such as management__address replaces a nested field."""
    result: dict[str, Any] = {
        "version": 1,
        "hostname": "hf1",
        "banner": "Authorised use only.",
        "management": {"interface": "enp0s2", "address": "10.0.2.15/24", "gateway": "10.0.2.2", "dns": ["10.0.2.3"]},
        "operational": [{"name": "lan", "interface": OPERATIONAL_MAC}],
        "administrators": [{"name": "alice", "role": "admin", "certificate": certificate()}],
        "time_servers": [],
    }
    result = copy.deepcopy(result)
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = result
        for parent in parents:
            target = target[parent]
        target[last] = value
    return result


def encoded(**changes: Any) -> bytes:
    """The same as JSON."""
    return json.dumps(document(**changes)).encode()


class HostTree:
    """A host's /sys, /dev and state below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.interface("enp0s2", MANAGEMENT_MAC)
        self.interface("enp0s3", OPERATIONAL_MAC)

    def interface(self, name: str, mac: str, *, physical: bool = True) -> None:
        """Add a network interface."""
        self.write(f"sys/class/net/{name}/address", f"{mac}\n".encode())
        if physical:
            (self.root / f"sys/class/net/{name}/device").mkdir()

    def disk(
        self, name: str, content: bytes = b"", *, removable: bool = False, **partitions: tuple[str, bytes]
    ) -> None:
        """Add a disk; each partition is its kernel name → (name in the partition table, content)."""
        directory = self.root / "sys/devices/block" / name
        self.write(f"sys/devices/block/{name}/removable", b"1\n" if removable else b"0\n")
        self.write(f"sys/devices/block/{name}/uevent", f"DEVNAME={name}\nDEVTYPE=disk\n".encode())
        self.write(f"dev/{name}", content)
        self._link(name, directory)
        for partition, (title, data) in partitions.items():
            self.write(f"sys/devices/block/{name}/{partition}/partition", b"1\n")
            self.write(
                f"sys/devices/block/{name}/{partition}/uevent", f"DEVNAME={partition}\nPARTNAME={title}\n".encode()
            )
            self.write(f"dev/{partition}", data)
            self._link(partition, directory / partition)

    def smbios(self, *strings: bytes) -> None:
        """Add an SMBIOS structure of type 11 with these strings."""
        count = len(list((self.root / "sys/firmware/dmi/entries").glob("*")))
        raw = bytes([11, 5, 0, 0, len(strings)]) + b"".join(text + b"\0" for text in strings) + b"\0"
        self.write(f"sys/firmware/dmi/entries/11-{count}/raw", raw)

    def write(self, path: str, content: bytes) -> Path:
        """Write a file below the root."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return target

    def _link(self, name: str, target: Path) -> None:
        link = self.root / "sys/class/block" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)


def host_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> HostTree:
    """Make a host's tree and let all of vmm.paths point into it."""
    for name, value in list(vars(paths).items()):
        if isinstance(value, Path):
            monkeypatch.setattr(paths, name, root / value.relative_to("/"))
    return HostTree(root)
