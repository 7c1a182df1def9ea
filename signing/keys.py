"""The key set: one key a purpose, in one folder, made once for development (docs/key-ceremony.md).

A production set has the same file names; its certificates do not say "development", and that is
what a release build looks at.
"""

from __future__ import annotations

import datetime
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from signing.root import KEYS_OF_ROLE, provide_root
from vmm.errors import die

CERTIFIED = {
    "PK": "Secure Boot platform key",
    "KEK": "Secure Boot key exchange key",
    "db": "Secure Boot signature key",
    "verity": "root file system signature key",
    "test": "test extension key",
}
"""RSA keys with a certificate: what firmware and kernel verify. "test" is in no release's db."""

PLAIN = {"pcr": "PCR policy key"}
"""RSA keys without one: what the TPM verifies."""

ROLES = tuple(name for names in KEYS_OF_ROLE.values() for name in names)
"""ECDSA P-384 keys of the update repository (TUF)."""

NEXT_DB = "db-next"
"""The certificate of the db key that releases to come are signed with; its private key may be elsewhere."""

DEVELOPMENT = "Holdfast development"


@dataclass(frozen=True)
class KeySet:
    """A folder of keys, checked to be complete."""

    folder: Path

    def key(self, name: str) -> Path:
        """The private key's file (PEM, PKCS#8)."""
        return self.folder / f"{name}.key"

    def certificate(self, name: str) -> Path:
        """The certificate's file (PEM)."""
        return self.folder / f"{name}.crt"

    def public(self, name: str) -> Path:
        """The public key's file (PEM)."""
        return self.folder / f"{name}.pub"

    @property
    def owner(self) -> str:
        """The GUID under which firmware files these keys."""
        return (self.folder / "owner.guid").read_text().strip()

    @property
    def previous_pcr(self) -> Path | None:
        """The private policy key before this one, while a change from it is under way: it signs releases, too."""
        key = self.key("pcr-previous")
        return key if key.exists() else None

    @property
    def enrolled(self) -> tuple[str, ...]:
        """The certificates that a new installation's firmware trusts: of the key that signs, and of the one to come."""
        return ("db", NEXT_DB) if self.certificate(NEXT_DB).exists() else ("db",)

    @property
    def root(self) -> Path:
        """The update repository's first root.json, which the image brings to hosts."""
        return self.folder / "root.json"


def open_keys(folder: Path, *, release: bool) -> KeySet:
    """Open a key set, making a development one where the folder does not exist, or its root.json where it is missing.

    Raises: UserError naming the missing file, a private key that others can read, or, for a release, the
    certificate that is a development one.
    """
    if not folder.exists():
        if release:
            die(
                f"there is no key set in {folder}",
                hint="a release is signed with keys made by docs/key-ceremony.md; KEYS=folder names them",
            )
        make_development_keys(folder)
    keys = KeySet(folder)
    if release and (folder / "development").exists():
        die(
            f"{folder} is a development key set; a release must not be signed with it",
            hint="KEYS=folder names the release keys",
        )
    names = (*CERTIFIED, *PLAIN, *ROLES)
    for file in [
        keys.folder / "owner.guid",
        *map(keys.key, names),
        *map(keys.certificate, CERTIFIED),
        *map(keys.public, names),
    ]:
        if release and file.stem in ("test", *ROLES):
            continue
        if not file.exists():
            die(
                f"the key set lacks {file}",
                hint="restore it, or move the folder away to have a new development set made",
            )
    for name in names:
        if keys.key(name).exists() and keys.key(name).stat().st_mode & 0o077:
            die(f"{keys.key(name)} can be read by others", hint=f"chmod 600 {keys.key(name)}")
    if keys.previous_pcr is not None and NEXT_DB in keys.enrolled:
        die(
            f"{folder} changes the policy key (pcr-previous) and announces another db key ({NEXT_DB}) at once",
            hint="one after the other: the release before would not open the volumes once both have changed",
        )
    if release:
        for name in (*CERTIFIED, *keys.enrolled[1:]):
            if name != "test" and DEVELOPMENT in _subject(keys.certificate(name)):
                die(
                    f"{keys.certificate(name)} is a development certificate; a release must not be signed with it",
                    hint="KEYS=folder names the release keys",
                )
        if not keys.root.exists():
            die(
                f"the key set lacks {keys.root}, by which hosts know the update repository",
                hint="holdfast-release root --keys FOLDER makes it, once, from two of the three root keys",
            )
    else:
        provide_root(folder)
    return keys


def _subject(certificate: Path) -> str:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).subject.rfc4514_string()


def make_development_keys(folder: Path) -> None:
    """Make a whole development set; the folder appears only when it is complete."""
    fresh = folder.with_name(folder.name + ".new")
    if fresh.exists():
        for file in fresh.iterdir():
            file.unlink()
    fresh.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = KeySet(fresh)
    (fresh / "owner.guid").write_text(f"{uuid.uuid4()}\n")
    (fresh / "development").write_text("Made by the build on its own; signs nothing that leaves this machine.\n")
    for name, purpose in CERTIFIED.items():
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        _write_key(keys, name, key)
        keys.certificate(name).write_bytes(_certificate(key, purpose).public_bytes(serialization.Encoding.PEM))
    for name in PLAIN:
        _write_key(keys, name, rsa.generate_private_key(public_exponent=65537, key_size=2048))
    for name in ROLES:
        _write_key(keys, name, ec.generate_private_key(ec.SECP384R1()))
    provide_root(fresh)
    fresh.rename(folder)


def _write_key(keys: KeySet, name: str, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(keys.key(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
    keys.public(name).write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def _certificate(key: rsa.RSAPrivateKey, purpose: str) -> x509.Certificate:
    name = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, DEVELOPMENT), x509.NameAttribute(NameOID.COMMON_NAME, purpose)]
    )
    # Firmware ignores validity dates, other verifiers do not; a fixed start lets a machine with a wrong clock build.
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=False,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
