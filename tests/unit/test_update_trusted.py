"""The firmware of a machine made of files: what is foreseen of it, and what is written to it."""

from __future__ import annotations

import fcntl
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.unit.test_update_keys_rig import (
    GLOBAL,
    IMAGE_SECURITY,
    certificate,
    entry,
    log,
    payload,
    pcr7,
    private,
    signature_list,
    start,
)
from tests.unit.test_update_rig import tools
from vmm.process import run
from vmm.update import addition, trusted
from vmm.update.errors import Refused

STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
pytestmark = pytest.mark.skipif(not tools("sbsign", "sbverify"), reason="needs the tools tree")

OLD, NEW, TEST = (certificate(name) for name in ("db", "db-next", "test"))
DB = signature_list(OLD, TEST)
ADDED = addition.parse(payload(signature_list(NEW)))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A program signed by each key."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("db", "db-next"):
        key = private(name).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / "key").write_bytes(key)
        (folder / "crt").write_bytes(x509.load_der_x509_certificate(certificate(name)).public_bytes(Encoding.PEM))
        run(["sbsign", "--key", folder / "key", "--cert", folder / "crt", "--output", folder / name, STUB])
    return {name: folder / name for name in ("db", "db-next")}


@dataclass
class Firmware:
    """Its variables, its log, and the boot loader that it started."""

    root: Path

    def set(self, name: str, content: bytes, vendor: object = IMAGE_SECURITY) -> None:
        path = self.root / "sys/firmware/efi/efivars" / f"{name}-{vendor}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(struct.pack("<I", 0x27) + content)

    def started(self, db: bytes, *vouched: bytes) -> None:
        steps = start(db, *map(entry, vouched))
        for path, content in (
            ("sys/kernel/security/tpm0/binary_bios_measurements", log(steps)),
            ("sys/class/tpm/tpm0/pcr-sha256/7", pcr7(steps).hex().upper().encode() + b"\n"),
        ):
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(content)


@pytest.fixture
def machine(tmp_path: Path, programs: dict[str, Path]) -> Firmware:
    made = Firmware(tmp_path)
    made.set("SecureBoot", b"\1", GLOBAL)
    made.set("KEK", signature_list(certificate("KEK")), GLOBAL)
    made.set("db", DB)
    made.started(DB, OLD, TEST)
    (tmp_path / "efi/EFI/BOOT").mkdir(parents=True)
    (tmp_path / "efi/EFI/BOOT/BOOTX64.EFI").write_bytes(programs["db"].read_bytes())
    return made


def test_a_certificate_that_is_added(machine: Firmware, programs: dict[str, Path]) -> None:
    old = programs["db"]
    grown = DB + ADDED.list
    found = trusted.foresee(machine.root, old, old, ADDED)
    assert found is not None and (found.db, found.certificate) == (grown, NEW)
    assert found.pcr7 == tuple(pcr7(start(grown, *map(entry, all_))) for all_ in ((OLD, TEST), (OLD, NEW, TEST)))

    machine.set("db", grown)
    machine.started(grown, OLD, TEST)
    again = trusted.foresee(machine.root, old, old, ADDED)
    assert again == found, "once it is there, the same holds"
    machine.started(DB, OLD, TEST)
    assert trusted.foresee(machine.root, old, old, ADDED) == found, "before the next start, too"


def test_another_signer_in_db(machine: Firmware, programs: dict[str, Path]) -> None:
    """There and back, as the boot loader keeps its signature."""
    old, new = programs["db"], programs["db-next"]
    grown = DB + ADDED.list
    machine.set("db", grown)
    machine.started(grown, OLD, TEST)
    there = trusted.foresee(machine.root, old, new, None)
    assert there is not None and there.db == grown
    by_old, by_new = (pcr7(start(grown, *map(entry, all_))) for all_ in ((OLD, TEST), (OLD, NEW, TEST)))
    assert there.pcr7 == (by_old, by_new)
    machine.started(grown, OLD, NEW, TEST)
    assert trusted.foresee(machine.root, new, new, None) is None
    back = trusted.foresee(machine.root, new, old, None)
    assert back is not None and back.pcr7 == (by_new, by_old)


def test_where_nothing_changes(machine: Firmware, programs: dict[str, Path]) -> None:
    old = programs["db"]
    (machine.root / "sys/class/tpm/tpm0/pcr-sha256/7").unlink()
    assert trusted.foresee(machine.root, old, old, None) is None, "an ordinary release asks for no log"
    machine.set("SecureBoot", b"\0", GLOBAL)
    assert trusted.foresee(machine.root, old, old, ADDED) is None


def test_where_nothing_can_be_foreseen(machine: Firmware, programs: dict[str, Path]) -> None:
    old, new = programs["db"], programs["db-next"]

    def refused(says: str, uki: Path = old, added: addition.Addition | None = ADDED) -> None:
        with pytest.raises(Refused, match=says):
            trusted.foresee(machine.root, old, uki, added)

    refused("no certificate of db vouches", new)
    refused("no certificate of db vouches", STUB, None)
    refused("no key exchange key", added=addition.parse(payload(signature_list(NEW), by="theirs")))
    machine.set("db", DB + ADDED.list)
    machine.started(DB + ADDED.list, OLD, TEST)
    refused("must be signed by the same one as the running system", new)
    machine.started(DB + ADDED.list, TEST)
    refused("the log does not name")
    (machine.root / "sys/class/tpm/tpm0/pcr-sha256/7").write_text("00" * 32)
    refused("does not explain what PCR 7 holds")
    (machine.root / "sys/kernel/security/tpm0/binary_bios_measurements").unlink()
    refused("it cannot be read")


def test_what_is_written(machine: Firmware, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write with the attributes in front, between taking the protecting flag away and putting it back."""
    path = machine.root / f"sys/firmware/efi/efivars/db-{IMAGE_SECURITY}"
    calls: list[tuple[int, int]] = []

    def ioctl(_: int, request: int, argument: Any) -> int:
        calls.append((request, *struct.unpack("l", argument)))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    trusted.extend(path, ADDED)
    written = struct.pack("<I", 0x67) + ADDED.payload
    assert path.read_bytes()[: len(written)] == written
    assert calls == [(0x40086602, 0), (0x40086602, 0x10)]
    with pytest.raises(FileNotFoundError):
        trusted.extend(path.with_name("none"), ADDED)
