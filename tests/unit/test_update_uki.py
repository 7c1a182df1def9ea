"""Unified kernel images: reading hostile ones, and asking whether the firmware would start them."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.test_update_rig import make_pe, make_uki, tools
from vmm.process import run
from vmm.update import firmware, pe, signer
from vmm.update.errors import Refused
from vmm.update.firmware import Firmware, Signatures

STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
needs_sbsign = pytest.mark.skipif(not tools("sbsign", "sbverify", "openssl"), reason="needs the tools tree")


def described(folder: Path, content: bytes) -> pe.Uki:
    path = folder / "uki.efi"
    path.write_bytes(content)
    return pe.describe(path)


def test_a_uki_says_what_it_starts(tmp_path: Path) -> None:
    assert described(tmp_path, make_uki("1.2.3", 4, "ab" * 32)) == pe.Uki("1.2.3", 4, "ab" * 32)
    old = make_pe(((".osrel", b"IMAGE_VERSION=0.1.0\n"), (".cmdline", b"roothash=" + b"cd" * 32 + b"\n\0")))
    assert described(tmp_path, old) == pe.Uki("0.1.0", 0, "cd" * 32)


RELEASE = (".osrel", b"IMAGE_VERSION=1.0.0\nHOLDFAST_EPOCH=1\n")
HASH = b"roothash=" + b"ab" * 32


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MZ",
        b"MZ" + b"\xff" * 2000,
        bytes(4096),
        make_pe([RELEASE]),
        make_pe([RELEASE, (".cmdline", HASH), (".cmdline", HASH)]),
        make_pe([RELEASE, (".cmdline", HASH + b" " + HASH)]),
        make_pe([RELEASE, (".cmdline", b"roothash=" + b"AB" * 32)]),
        make_pe([RELEASE, (".cmdline", b"roothash=ab")]),
        make_pe([RELEASE, (".cmdline", b"\xff" * 100)]),
        make_pe([RELEASE, (".cmdline", b"a" * 70_000)]),
        make_pe([(".osrel", b"HOLDFAST_EPOCH=-1\n"), (".cmdline", HASH)]),
        make_pe([(".osrel", b"HOLDFAST_EPOCH=99999999999999\n"), (".cmdline", HASH)]),
        make_pe([(".osrel", "HOLDFAST_EPOCH=\u0661\n".encode()), (".cmdline", HASH)]),
    ],
    ids=itertools.count(),
)
def test_hostile_ukis(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Refused, match="^UKI: "):
        described(tmp_path, content)


def read_all(path: Path) -> None:
    """Read everything that is read of a UKI; whatever is wrong with it may only be refused."""
    try:
        with path.open("rb") as file:
            image = pe.read(file)
            pe.authenticode_sha256(file, image)
            pe.signatures(file, image)
        pe.describe(path)
    except Refused:
        pass


@pytest.mark.parametrize("offset", [*range(60, 130), *range(168, 240), *range(304, 400)])
def test_every_header_field_out_of_bounds(tmp_path: Path, offset: int) -> None:
    content = bytearray(make_uki("1.0.0", 1, "ab" * 32))
    content[offset : offset + 4] = b"\xff\xff\xff\xff"
    path = tmp_path / "uki.efi"
    path.write_bytes(content)
    read_all(path)


def test_random_damage(tmp_path: Path) -> None:
    good, chance = make_uki("1.0.0", 1, "ab" * 32), random.Random(2)
    path = tmp_path / "uki.efi"
    for _ in range(500):
        content = bytearray(good[: chance.choice((len(good), chance.randrange(len(good))))])
        for _ in range(min(len(content), chance.randrange(1, 10))):
            content[chance.randrange(min(len(content), 600))] = chance.randrange(256)
        path.write_bytes(content)
        read_all(path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(make_uki("1.0.0", 1, "ab" * 32))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="link"):
        pe.describe(tmp_path / "link")


def key(folder: Path, name: str) -> tuple[Path, Path]:
    paths = folder / f"{name}.key", folder / f"{name}.crt"
    subject = ("-subj", f"/CN={name}", "-days", "100")
    run(
        [
            "openssl",
            "req",
            "-new",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            *subject,
            "-keyout",
            paths[0],
            "-out",
            paths[1],
        ]
    )
    return paths


def der(certificate: Path) -> bytes:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A signed UEFI program, and the certificates of its signer and of somebody else."""
    folder = tmp_path_factory.mktemp("signed")
    certificates = {}
    for name in ("ours", "theirs"):
        private, certificate = key(folder, name)
        certificates[name] = der(certificate)
        if name == "ours":
            run(["sbsign", "--key", private, "--cert", certificate, "--output", folder / "uki.efi", STUB])
    return folder / "uki.efi", certificates


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return pe.authenticode_sha256(file, pe.read(file))


@needs_sbsign
def test_the_hash_is_the_one_that_was_signed(signed: tuple[Path, dict[str, bytes]]) -> None:
    path, _ = signed
    digest = digest_of(path)
    assert bytes.fromhex(digest) in path.read_bytes()
    assert digest != digest_of(STUB) or path.stat().st_size % 8 == 0


def trust(*certificates: bytes) -> Firmware:
    return Firmware(True, Signatures(frozenset(certificates)), Signatures())


@needs_sbsign
def test_the_signer_must_be_in_db(signed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    path, certificates = signed
    assert signer.check(path, trust(*certificates.values())) == "CN=ours in db"
    with pytest.raises(Refused, match=r"UKI signer: no certificate of the firmware's db \(1\)"):
        signer.check(path, trust(certificates["theirs"]))
    with pytest.raises(Refused, match=r"UKI signer: no certificate of the firmware's db \(0\)"):
        signer.check(path, trust())
    with pytest.raises(Refused, match="UKI signer: no certificate"):
        signer.check(STUB, trust(certificates["ours"]))
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    (tmp_path / "damaged.efi").write_bytes(damaged)
    with pytest.raises(Refused, match="UKI signer: no certificate"):
        signer.check(tmp_path / "damaged.efi", trust(certificates["ours"]))


@needs_sbsign
def test_what_dbx_revokes(signed: tuple[Path, dict[str, bytes]]) -> None:
    path, certificates = signed
    ours = trust(certificates["ours"])
    certificate = x509.load_der_x509_certificate(certificates["ours"])
    tbs = hashlib.sha384(certificate.tbs_certificate_bytes).hexdigest()
    for dbx in (
        Signatures(frozenset({certificates["ours"]})),
        Signatures(certificate_hashes=frozenset({("sha384", tbs)})),
        Signatures(hashes=frozenset({digest_of(path)})),
    ):
        with pytest.raises(Refused, match="the firmware's dbx revokes"):
            signer.check(path, replace(ours, dbx=dbx))
    signer.check(path, replace(ours, dbx=Signatures(frozenset({certificates["theirs"]}))))


@needs_sbsign
def test_hashes_in_db_and_no_secure_boot() -> None:
    db = Signatures(hashes=frozenset({digest_of(STUB)}))
    assert signer.check(STUB, Firmware(True, db, Signatures())) == "its hash in db"
    assert "Secure Boot is off" in signer.check(STUB, Firmware(False, Signatures(), Signatures()))


def signature_list(kind: str, *entries: bytes) -> bytes:
    each = 16 + len(entries[0])
    body = b"".join(bytes(16) + entry for entry in entries)
    return uuid.UUID(kind).bytes_le + struct.pack("<III", 28 + len(body), 0, each) + body


X509, SHA256 = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072", "c1c41626-504c-4092-aca9-41f936934328"
TBS = "446dbf63-2502-4cda-bcfa-2465d2b0fe9d"


def test_signature_lists(tmp_path: Path) -> None:
    content = signature_list(X509, b"certificate") + signature_list(SHA256, b"1" * 32, b"2" * 32)
    content += signature_list(TBS, b"3" * 64 + bytes(16)) + signature_list(str(uuid.uuid4()), b"whatever")
    found = firmware.parse("db", content)
    assert found.certificates == {b"certificate"}
    assert found.hashes == {(b"1" * 32).hex(), (b"2" * 32).hex()}
    assert found.certificate_hashes == {("sha512", (b"3" * 64).hex())}

    (tmp_path / "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(b"\6\0\0\0\1")
    (tmp_path / "db-d719b2cb-3d3a-4596-a3bc-dad00e67656f").write_bytes(b"\x27\0\0\0" + content)
    here = firmware.read(tmp_path)
    assert here == Firmware(True, found, Signatures())
    assert firmware.read(tmp_path / "none") == Firmware(False, Signatures(), Signatures())


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        signature_list(X509, b"c")[:-1],
        uuid.UUID(X509).bytes_le + struct.pack("<III", 0, 0, 17),
        uuid.UUID(X509).bytes_le + struct.pack("<III", 28, 0, 0),
        uuid.UUID(X509).bytes_le + struct.pack("<III", 40, 4000, 17) + bytes(12),
        uuid.UUID(X509).bytes_le + struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 17),
        uuid.UUID(SHA256).bytes_le + struct.pack("<III", 60, 0, 31) + bytes(32),
    ],
    ids=itertools.count(),
)
def test_hostile_signature_lists(content: bytes) -> None:
    with pytest.raises(Refused, match="firmware: db "):
        firmware.parse("db", content)
