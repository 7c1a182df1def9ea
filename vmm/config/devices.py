"""Disks and their partitions as /sys shows them; and the partition that brings releases on a stick.

Whatever a stick brings lies raw in a partition that is found by its name. Nothing is mounted: file system parsers are
the kernel's, and an attacker writes sticks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UPDATE_PARTITION = "HOLDFAST-UPDATE"
"""The name of a partition that holds a bundle (a tar of an update repository), from its first byte on."""
UPDATE_PARTITION_TYPE = "c4b1d0a6-52f7-4b0e-9d35-8e6a70f2b91d"

# Devices that only the host itself makes (or, the floppy, that take seconds to say they are empty).
_NOT_MEDIA = re.compile(r"(?:dm-|loop|ram|zram|md|nbd|fd|mtdblock)")


@dataclass(frozen=True)
class Device:
    """A block device: a disk, or a partition of one. ``node`` is its file in /dev."""

    name: str
    node: Path
    disk: str
    partition_name: str
    is_partition: bool
    removable: bool


def block_devices(root: Path) -> Iterator[Device]:
    """All disks and partitions, in no order. Arguments: ``root`` is where /sys and /dev lie."""
    for entry in (root / "sys/class/block").glob("*"):
        if _NOT_MEDIA.match(entry.name):
            continue
        # /sys/class/block/sda1 is a link to .../block/sda/sda1.
        directory = entry.resolve()
        is_partition = (directory / "partition").exists()
        disk = directory.parent if is_partition else directory
        uevent = dict(line.split("=", 1) for line in _text(directory / "uevent").splitlines() if "=" in line)
        yield Device(
            name=entry.name,
            # The kernel writes the / of names such as cciss/c0d0 as !.
            node=root / "dev" / entry.name.replace("!", "/"),
            disk=disk.name,
            partition_name=uevent.get("PARTNAME", ""),
            is_partition=is_partition,
            removable=_text(disk / "removable").strip() == "1",
        )


def below(root: Path, mapped: str) -> list[str]:
    """The partitions that an open volume of the device mapper lies on; none if it is not open. Raises: OSError."""
    for entry in (root / "sys/class/block").glob("dm-*"):
        if (entry / "dm/name").read_text().strip() == mapped:
            return sorted(slave.name for slave in (entry / "slaves").iterdir())
    return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
