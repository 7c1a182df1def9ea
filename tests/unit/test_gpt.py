"""Partition tables: read, append, create, survive damage and power cuts; sfdisk is the second opinion."""

from __future__ import annotations

import io
import json
import shutil
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from vmm import process
from vmm.config import gpt
from vmm.errors import UserError

MIB = 1 << 20
TYPE = uuid.UUID("6f1c2b0e-8d3a-4c57-9b62-1f0a7e5d4c31")
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


class MemoryDisk(io.BytesIO):
    """A disk in memory; what is flushed to it is there (see no_sync)."""

    def fileno(self) -> int:
        return -1


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def sfdisk(path: Path) -> dict[str, Any]:
    """What sfdisk reads; it must be in the tools tree, where the tests run."""
    assert shutil.which("sfdisk"), "sfdisk is missing"
    result = process.run(["sfdisk", "-J", path])
    assert "corrupt" not in result.stderr and "mismatch" not in result.stderr, result.stderr
    table: dict[str, Any] = json.loads(result.stdout)["partitiontable"]
    return table


def made_by_sfdisk(path: Path, size: int = 8 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    script = 'label: gpt\nsize=1MiB, name="esp"\nstart=3MiB, size=2MiB, name="root", attrs="GUID:63"\n'
    process.run(["sfdisk", "-q", path], input=script)
    return path


def table_of(path: Path) -> gpt.Table:
    with path.open("rb") as disk:
        return gpt.read(disk)


def test_what_sfdisk_made_is_read(tmp_path: Path) -> None:
    path = made_by_sfdisk(tmp_path / "disk")
    table, theirs = table_of(path), sfdisk(path)
    assert str(table.disk_id).upper() == theirs["id"]
    assert [(p.name, p.first, p.size // 512) for p in table.partitions] == [
        (p["name"], p["start"], p["size"]) for p in theirs["partitions"]
    ]
    root = table.find("root")
    assert root is not None and root.attributes == 1 << 63 and root.type == LINUX
    assert table.find("seed") is None


def test_sfdisk_reads_what_was_appended(tmp_path: Path) -> None:
    path = made_by_sfdisk(tmp_path / "disk")
    before = sfdisk(path)
    added = gpt.append(path, 64 * MIB, TYPE, "HOLDFAST-SEED")
    after = sfdisk(path)
    assert after["partitions"][:2] == before["partitions"]
    new = after["partitions"][2]
    assert (new["name"], new["type"], new["start"], new["size"]) == (
        "HOLDFAST-SEED",
        str(TYPE).upper(),
        5 * MIB // 512,
        64 * MIB // 512,
    )
    assert (added.number, added.offset, added.size) == (3, 5 * MIB, 64 * MIB)
    assert path.stat().st_size == 70 * MIB
    assert after["lastlba"] == path.stat().st_size // 512 - 34
    assert "verify" not in (errors := process.run(["sfdisk", "--verify", path]).stderr), errors


def test_appending_within_the_file_does_not_grow_it(tmp_path: Path) -> None:
    path = made_by_sfdisk(tmp_path / "disk", 64 * MIB)
    gpt.append(path, MIB, TYPE, "a")
    gpt.append(path, 1, TYPE, "b")
    assert path.stat().st_size == 64 * MIB
    assert [(p.name, p.offset) for p in table_of(path).partitions[2:]] == [("a", 5 * MIB), ("b", 6 * MIB)]


def test_a_created_image_holds_one_partition(tmp_path: Path) -> None:
    path = tmp_path / "stick"
    partition = gpt.create(path, MIB, TYPE, "HOLDFAST-SEED")
    theirs = sfdisk(path)
    assert [p["name"] for p in theirs["partitions"]] == ["HOLDFAST-SEED"]
    assert partition.offset == MIB
    with pytest.raises(UserError, match="exists already"):
        gpt.create(path, MIB, TYPE, "x")


def test_content_is_written_and_the_rest_zeroed(tmp_path: Path) -> None:
    path = tmp_path / "stick"
    partition = gpt.create(path, 2 * MIB, TYPE, "x")
    gpt.write_partition(path, partition, b"\xff" * (2 * MIB))
    gpt.write_partition(path, partition, b"new")
    data = path.read_bytes()
    assert data[partition.offset : partition.offset + partition.size] == b"new".ljust(2 * MIB, b"\0")
    assert table_of(path).find("x") == partition
    with pytest.raises(UserError, match="do not fit"):
        gpt.write_partition(path, partition, bytes(2 * MIB + 1))


@pytest.mark.parametrize("offset", [512 + 20, 512 + 56, 1024 + 16, 1024 + 128 + 40])
def test_the_backup_serves_when_the_primary_is_damaged(tmp_path: Path, offset: int) -> None:
    path = made_by_sfdisk(tmp_path / "disk")
    whole = table_of(path)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    assert table_of(path) == whole
    gpt.append(path, MIB, TYPE, "new")
    assert [p["name"] for p in sfdisk(path)["partitions"]] == ["esp", "root", "new"]


@pytest.mark.usefixtures("no_sync")
def test_every_flipped_bit_of_a_lone_header_is_noticed() -> None:
    disk = MemoryDisk(bytes(2 * MIB))
    gpt._write(disk, gpt.Table(uuid.uuid4(), 34, 128, ()), 2 * MIB // 512)
    data = disk.getvalue()[:MIB].ljust(2 * MIB, b"\0")
    gpt.read(io.BytesIO(data))
    for position in range(92 * 8):
        damaged = bytearray(data)
        damaged[512 + position // 8] ^= 1 << position % 8
        with pytest.raises(UserError, match="no usable partition table"):
            gpt.read(io.BytesIO(damaged))


@pytest.mark.parametrize("data", [b"", b"x" * 512, bytes(MIB), b"EFI PART" * 1000])
def test_what_has_no_table_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(data)
    with pytest.raises(UserError, match="no usable partition table"):
        gpt.append(path, MIB, TYPE, "x")
    assert path.read_bytes() == data


def overlapping() -> tuple[gpt.Partition, ...]:
    return (
        gpt.Partition(1, TYPE, uuid.uuid4(), 2048, 4095, 0, "a"),
        gpt.Partition(2, TYPE, uuid.uuid4(), 4095, 5000, 0, "b"),
    )


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize(
    "partitions",
    [
        overlapping(),
        (gpt.Partition(1, TYPE, uuid.uuid4(), 2048, 2047, 0, "a"),),
        (gpt.Partition(1, TYPE, uuid.uuid4(), 2048, 1 << 60, 0, "a"),),
        (gpt.Partition(1, TYPE, uuid.uuid4(), 1, 2047, 0, "a"),),
    ],
)
def test_entries_that_contradict_each_other_are_refused(partitions: tuple[gpt.Partition, ...]) -> None:
    disk = MemoryDisk(bytes(8 * MIB))
    gpt._write(disk, gpt.Table(uuid.uuid4(), 34, 128, partitions), 8 * MIB // 512)
    with pytest.raises(UserError, match="overlaps another or lies outside"):
        gpt.read(disk)


def test_a_full_table_and_bad_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    gpt.create(path, MIB, TYPE, "x")
    for name in ("", "x" * 37, "a\0b"):
        with pytest.raises(UserError, match="not a partition name"):
            gpt.append(path, MIB, TYPE, name)
    for _ in range(127):
        gpt.append(path, MIB, TYPE, "y" * 36)
    with pytest.raises(UserError, match="no free entry"):
        gpt.append(path, MIB, TYPE, "z")


class CutDisk(MemoryDisk):
    """A disk whose power is cut after a number of writes."""

    left = 0

    def write(self, data: Any, /) -> int:
        if self.left == 0:
            raise OSError("power cut")
        self.left -= 1
        return super().write(data)


@pytest.mark.usefixtures("no_sync")
def test_a_power_cut_at_any_write_leaves_a_whole_table() -> None:
    first = gpt.Partition(1, TYPE, uuid.uuid4(), 2048, 4095, 0, "a")
    second = gpt.Partition(2, TYPE, uuid.uuid4(), 4096, 6143, 0, "b")
    old = gpt.Table(uuid.uuid4(), 34, 128, (first,))
    new = gpt.Table(old.disk_id, 34, 128, (first, second))
    start = MemoryDisk(bytes(4 * MIB))
    gpt._write(start, old, 4 * MIB // 512)
    seen = set()
    for size in (4 * MIB, 8 * MIB):
        for writes in range(7):
            disk = CutDisk(start.getvalue().ljust(size, b"\0"))
            disk.left = writes
            finished = _try_write(disk, new, size)
            table = gpt.read(disk)
            assert table in (old, new)
            seen.add((finished, table == new))
    assert {(False, False), (False, True), (True, True)} <= seen


def _try_write(disk: BinaryIO, table: gpt.Table, size: int) -> bool:
    try:
        gpt._write(disk, table, size // 512)
    except OSError:
        return False
    return True
