"""GUID partition tables in image files and on sticks: read, find, append, create.

Sectors are 512 bytes, as in every image this project makes. A table is rewritten so that a power cut
at any point leaves one valid copy: the backup first, then the primary.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import uuid
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from vmm.errors import UserError

SECTOR = 512
ALIGNMENT = 1 << 20

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_SIGNATURE = b"EFI PART"
_REVISION = 0x00010000
_MAX_ENTRIES = 1024
_NAME_UNITS = 36


@dataclass(frozen=True)
class Partition:
    """One entry of the table; addresses in sectors, ``last`` included."""

    number: int
    type: uuid.UUID
    id: uuid.UUID
    first: int
    last: int
    attributes: int
    name: str

    @property
    def offset(self) -> int:
        """Where it starts, in bytes."""
        return self.first * SECTOR

    @property
    def size(self) -> int:
        """How long it is, in bytes."""
        return (self.last - self.first + 1) * SECTOR


@dataclass(frozen=True)
class Table:
    """A disk's partitions, by number, and what its header says of the disk."""

    disk_id: uuid.UUID
    first_usable: int
    slots: int
    partitions: tuple[Partition, ...]

    def find(self, name: str) -> Partition | None:
        """The first partition with that name."""
        return next((partition for partition in self.partitions if partition.name == name), None)


def read(disk: BinaryIO) -> Table:
    """Read the table, from its backup at the end of the disk if the primary is damaged.

    Raises: UserError when neither copy is whole or the entries contradict each other.
    """
    total = _sectors(disk)
    for header_lba in (1, total - 1):
        try:
            return _read_copy(disk, header_lba, total)
        except _Damaged as damaged:
            reason = str(damaged)
    raise UserError(f"there is no usable partition table (GPT): {reason}")


def append(path: Path, size: int, type_id: uuid.UUID, name: str) -> Partition:
    """Add a partition of ``size`` bytes (rounded up to 1 MiB) behind the last one.

    An image file grows as needed; a device must have the room. The new partition's content is
    whatever the disk held there, so write it all.

    Raises: UserError when there is no table or no room.
    """
    if not 0 < len(name.encode("utf-16-le")) <= 2 * _NAME_UNITS or "\0" in name:
        raise UserError(f"not a partition name of 1 to {_NAME_UNITS} characters: {name!r}")
    with path.open("r+b") as disk:
        table = read(disk)
        used = {partition.number for partition in table.partitions}
        number = next((n for n in range(1, table.slots + 1) if n not in used), None)
        if number is None:
            raise UserError(f"{path}: the partition table has no free entry")
        step = ALIGNMENT // SECTOR
        behind = max((partition.last + 1 for partition in table.partitions), default=table.first_usable)
        first = -(-behind // step) * step
        last = first + -(-size // ALIGNMENT) * step - 1
        total = _sectors(disk)
        needed = last + 1 + _backup_sectors(table.slots)
        if needed > total:
            if not stat.S_ISREG(os.fstat(disk.fileno()).st_mode):
                raise UserError(
                    f"{path}: {(needed - total) * SECTOR} bytes of room are missing behind the last partition"
                )
            total = -(-needed // step) * step
            disk.truncate(total * SECTOR)
        partition = Partition(number, type_id, uuid.uuid4(), first, last, 0, name)
        partitions = tuple(sorted((*table.partitions, partition), key=lambda entry: entry.number))
        _write(disk, replace(table, partitions=partitions), total)
    return partition


def create(path: Path, size: int, type_id: uuid.UUID, name: str) -> Partition:
    """Make a new, sparse image file with one empty partition of ``size`` bytes (rounded up to 1 MiB).

    Raises: UserError if the file exists; OSError.
    """
    try:
        disk = path.open("x+b")
    except FileExistsError:
        raise UserError(f"{path} exists already") from None
    with disk:
        disk.truncate(2 * ALIGNMENT)
        slots = 128
        _write(disk, Table(uuid.uuid4(), 2 + _entry_sectors(slots), slots, ()), 2 * ALIGNMENT // SECTOR)
    return append(path, size, type_id, name)


def write_partition(path: Path, partition: Partition, content: bytes) -> None:
    """Fill a partition with ``content`` and zeros behind it. Raises: UserError if it is too long."""
    copy_into_partition(path, partition, io.BytesIO(content))


def copy_into_partition(path: Path, partition: Partition, content: BinaryIO) -> None:
    """Fill a partition with all of a file, and zeros behind it. Raises: UserError if it is too long; OSError."""
    length = content.seek(0, os.SEEK_END)
    if length > partition.size:
        raise UserError(f"the partition {partition.name} has {partition.size} bytes; {length} do not fit")
    content.seek(0)
    with path.open("r+b") as disk:
        disk.seek(partition.offset)
        shutil.copyfileobj(content, disk, ALIGNMENT)
        left = partition.size - length
        zeros = bytes(ALIGNMENT)
        while left:
            left -= disk.write(zeros[: min(left, ALIGNMENT)])
        disk.flush()
        os.fsync(disk.fileno())


def read_partition(path: Path, partition: Partition, limit: int) -> bytes:
    """The first ``limit`` bytes of a partition at most. Raises: OSError."""
    with path.open("rb") as disk:
        disk.seek(partition.offset)
        return disk.read(min(limit, partition.size))


class _Damaged(Exception):
    """One copy of the table cannot be used."""


def _sectors(disk: BinaryIO) -> int:
    # Works for devices too, whose st_size is 0.
    return disk.seek(0, os.SEEK_END) // SECTOR


def _entry_sectors(slots: int) -> int:
    return -(-slots * _ENTRY.size // SECTOR)


def _backup_sectors(slots: int) -> int:
    return _entry_sectors(slots) + 1


def _read_at(disk: BinaryIO, lba: int, length: int) -> bytes:
    disk.seek(lba * SECTOR)
    data = disk.read(length)
    if len(data) != length:
        raise _Damaged("the disk ends too early")
    return data


def _read_copy(disk: BinaryIO, header_lba: int, total: int) -> Table:
    if header_lba < 1:
        raise _Damaged("the disk is too small")
    sector = _read_at(disk, header_lba, SECTOR)
    (
        signature,
        revision,
        length,
        crc,
        _,
        own,
        _,
        first_usable,
        last_usable,
        disk_id,
        entries,
        slots,
        entry_size,
        entry_crc,
    ) = _HEADER.unpack_from(sector)
    if signature != _SIGNATURE or revision != _REVISION:
        raise _Damaged("no header was found")
    if not _HEADER.size <= length <= SECTOR:
        raise _Damaged("the header's length is wrong")
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:length]) != crc:
        raise _Damaged("the header's checksum is wrong")
    if own != header_lba:
        raise _Damaged("the header is in the wrong place")
    if not 0 < slots <= _MAX_ENTRIES or entry_size != _ENTRY.size or not 2 <= entries < total:
        raise _Damaged("the header describes a table of an unknown form")
    if not 2 <= first_usable <= last_usable < total:
        raise _Damaged("the header's usable range does not fit the disk")
    array = _read_at(disk, entries, slots * entry_size)
    if zlib.crc32(array) != entry_crc:
        raise _Damaged("the entries' checksum is wrong")
    partitions = tuple(_entries(array))
    end = first_usable
    for partition in sorted(partitions, key=lambda entry: entry.first):
        if not end <= partition.first <= partition.last <= last_usable:
            raise _Damaged(f"partition {partition.number} overlaps another or lies outside the disk")
        end = partition.last + 1
    return Table(uuid.UUID(bytes_le=disk_id), first_usable, slots, partitions)


def _entries(array: bytes) -> list[Partition]:
    found = []
    for index, (type_id, own_id, first, last, attributes, name) in enumerate(_ENTRY.iter_unpack(array)):
        if any(type_id):
            text = name.decode("utf-16-le", errors="replace").split("\0", 1)[0]
            found.append(
                Partition(
                    index + 1, uuid.UUID(bytes_le=type_id), uuid.UUID(bytes_le=own_id), first, last, attributes, text
                )
            )
    return found


def _write(disk: BinaryIO, table: Table, total: int) -> None:
    array = bytearray(table.slots * _ENTRY.size)
    for partition in table.partitions:
        _ENTRY.pack_into(
            array,
            (partition.number - 1) * _ENTRY.size,
            partition.type.bytes_le,
            partition.id.bytes_le,
            partition.first,
            partition.last,
            partition.attributes,
            partition.name.encode("utf-16-le"),
        )
    backup_entries = total - _backup_sectors(table.slots)
    for header_lba, other_lba, entries in ((total - 1, 1, backup_entries), (1, total - 1, 2)):
        disk.seek(entries * SECTOR)
        disk.write(array)
        disk.flush()
        os.fsync(disk.fileno())
        disk.seek(header_lba * SECTOR)
        disk.write(_header(table, bytes(array), header_lba, other_lba, entries, backup_entries - 1))
        disk.flush()
        os.fsync(disk.fileno())
    # Boot code, if any, stays.
    disk.seek(446)
    disk.write(struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(total - 1, 0xFFFFFFFF)))
    disk.write(bytes(48) + b"\x55\xaa")
    disk.flush()
    os.fsync(disk.fileno())


def _header(table: Table, array: bytes, own: int, other: int, entries: int, last_usable: int) -> bytes:
    def packed(crc: int) -> bytes:
        return _HEADER.pack(
            _SIGNATURE,
            _REVISION,
            _HEADER.size,
            crc,
            0,
            own,
            other,
            table.first_usable,
            last_usable,
            table.disk_id.bytes_le,
            entries,
            table.slots,
            _ENTRY.size,
            zlib.crc32(array),
        )

    return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")
