"""The seed container, and where the host looks for one."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

import pytest

from tests.unit.test_config_rig import HostTree, host_tree
from vmm.config import seed, sources
from vmm.config.load import MAX_DOCUMENT
from vmm.errors import UserError

DOCUMENT = b'{"version":1}'


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostTree:
    return host_tree(tmp_path, monkeypatch)


def partition(document: bytes) -> tuple[str, bytes]:
    return seed.PARTITION_NAME, seed.pack(document).ljust(4096, b"\0")


def test_the_container_is_what_the_contract_says() -> None:
    digest = hashlib.sha256(DOCUMENT).hexdigest()
    assert seed.pack(DOCUMENT) == f"HOLDFAST-SEED 1 13 {digest}\n".encode() + DOCUMENT


def test_a_seed_is_read_back_from_a_larger_region() -> None:
    assert seed.read(io.BytesIO(seed.pack(DOCUMENT) + b"\0" * 10_000)) == DOCUMENT
    largest = b"x" * MAX_DOCUMENT
    assert seed.read(io.BytesIO(seed.pack(largest) + b"rest")) == largest


def test_an_empty_region_holds_no_seed() -> None:
    assert seed.unpack(b"") is None
    assert seed.unpack(bytes(1 << 16)) is None


def test_every_flipped_bit_is_noticed() -> None:
    whole = seed.pack(DOCUMENT)
    for position in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(UserError):
            seed.unpack(bytes(damaged))


def test_every_torn_seed_is_refused() -> None:
    whole = seed.pack(DOCUMENT)
    for length in range(1, len(whole)):
        with pytest.raises(UserError):
            seed.unpack(whole[:length])
        with pytest.raises(UserError):
            seed.unpack(whole[:length] + bytes(len(whole) - length + 100))


@pytest.mark.parametrize(
    "length", [b"65537", b"9999999999", b"99999999999999999999", b"0", b"-1", b"013", b"1e1", b"\xb2"]
)
def test_lengths_that_are_refused(length: bytes) -> None:
    header = b"HOLDFAST-SEED 1 " + length + b" " + hashlib.sha256(DOCUMENT).hexdigest().encode() + b"\n"
    with pytest.raises(UserError):
        seed.unpack(header + DOCUMENT)


def test_too_long_or_empty_documents_are_not_packed() -> None:
    for document in (b"", b"x" * (MAX_DOCUMENT + 1)):
        with pytest.raises(UserError):
            seed.pack(document)


def test_no_source_is_no_error(tree: HostTree) -> None:
    tree.disk("sda", sda1=("root", b"x" * 512))
    assert sources.find() is None


def test_smbios_wins_over_devices(tree: HostTree) -> None:
    tree.disk("sdb", removable=True, sdb1=partition(b"stick"))
    tree.smbios(b"io.systemd.credential:other=1", b"io.systemd.credential:holdfast.seed=" + DOCUMENT)
    assert sources.find() == sources.Source("the SMBIOS string holdfast.seed", DOCUMENT)


def test_smbios_base64(tree: HostTree) -> None:
    tree.smbios(b"io.systemd.credential.binary:holdfast.seed=" + base64.b64encode(DOCUMENT))
    found = sources.find()
    assert found is not None and found.document == DOCUMENT


def test_wrong_base64_is_refused(tree: HostTree) -> None:
    tree.smbios(b"io.systemd.credential.binary:holdfast.seed=%%%")
    with pytest.raises(sources.SourceError, match="SMBIOS string holdfast.seed: not valid base64"):
        sources.find()


@pytest.mark.parametrize("raw", [b"", b"\x0b", b"\x0b\xff", b"\x0b\x05\0\0\x01", b"\x0b\x05\0\0\x01no end"])
def test_torn_smbios_structures_hold_nothing(tree: HostTree, raw: bytes) -> None:
    tree.write("sys/firmware/dmi/entries/11-0/raw", raw)
    assert sources.find() is None


def test_sticks_come_before_other_disks_and_the_system_disk_last(tree: HostTree) -> None:
    tree.disk("nvme0n1", nvme0n1p1=partition(b"system"), nvme0n1p2=("holdfast-data", b""))
    found = sources.find()
    assert found is not None and found.document == b"system"
    tree.disk("sda", sda1=partition(b"other"))
    found = sources.find()
    assert found == sources.Source("the partition sda1", b"other")
    tree.disk("sdz", removable=True, sdz9=partition(b"stick"))
    found = sources.find()
    assert found == sources.Source("the partition sdz9", b"stick")


def test_an_empty_seed_partition_is_passed_over(tree: HostTree) -> None:
    tree.disk("sda", removable=True, sda1=(seed.PARTITION_NAME, bytes(4096)))
    tree.disk("sdb", sdb1=partition(DOCUMENT))
    found = sources.find()
    assert found is not None and found.name == "the partition sdb1"


def test_a_damaged_seed_is_refused_and_not_passed_over(tree: HostTree) -> None:
    title, content = partition(DOCUMENT)
    tree.disk("sda", removable=True, sda1=(title, content.replace(b"version", b"Version")))
    tree.disk("sdb", sdb1=partition(DOCUMENT))
    with pytest.raises(sources.SourceError) as caught:
        sources.find()
    assert caught.value.message == "the partition sda1: the seed is damaged: its SHA-256 does not match"
    assert caught.value.source == "the partition sda1"


def test_a_whole_device_may_hold_the_seed_but_not_behind_partitions(tree: HostTree) -> None:
    tree.disk("sda", seed.pack(b"hidden"), sda1=("data", b""))
    tree.disk("loop0", seed.pack(b"loop"))
    assert sources.find() is None
    tree.disk("sr0", seed.pack(DOCUMENT), removable=True)
    assert sources.find() == sources.Source("the device sr0", DOCUMENT)
