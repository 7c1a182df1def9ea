"""Where a host looks for its seed: SMBIOS strings, then partitions and devices; nothing is mounted."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmm import paths
from vmm.config import seed
from vmm.errors import UserError

# A disk with this partition is the one the host was installed on; a stick put in must win over it.
SYSTEM_PARTITION = "holdfast-data"

_CREDENTIAL = re.compile(rb"io\.systemd\.credential(\.binary)?:holdfast\.seed=(.*)", re.DOTALL)
_MAX_SMBIOS = 256 * 1024
# Devices that only the host itself makes (or, the floppy, that take seconds to say they are empty).
_NOT_MEDIA = re.compile(r"(?:dm-|loop|ram|zram|md|nbd|fd|mtdblock)")


@dataclass(frozen=True)
class Source:
    """A seed that was found: a name for people, and the document."""

    name: str
    document: bytes


class SourceError(UserError):
    """A seed was found and cannot be used; ``source`` says where it lies."""

    code = "seed-invalid"

    def __init__(self, source: str, message: str) -> None:
        super().__init__(f"{source}: {message}")
        self.source = source


@dataclass(frozen=True)
class _Device:
    """A block device as /sys shows it: a disk, or a partition of one."""

    name: str
    disk: str
    partition_name: str
    is_partition: bool
    removable: bool


def find() -> Source | None:
    """The first seed there is. A damaged one ends the search: which seed counts must not depend on luck.

    Raises: SourceError.
    """
    return next(_smbios(), None) or next(_devices(), None)


def _smbios() -> Iterator[Source]:
    for entry in sorted((paths.ROOT / "sys/firmware/dmi/entries").glob("11-*/raw")):
        try:
            with entry.open("rb") as file:
                raw = file.read(_MAX_SMBIOS)
        except OSError:
            continue
        for text in smbios_strings(raw):
            if credential := _CREDENTIAL.fullmatch(text):
                name = "the SMBIOS string holdfast.seed"
                document = credential[2]
                if credential[1]:
                    try:
                        document = base64.b64decode(document, validate=True)
                    except binascii.Error:
                        raise SourceError(name, "not valid base64") from None
                yield Source(name, document)


def smbios_strings(raw: bytes) -> list[bytes]:
    """The strings behind an SMBIOS structure's formatted part (whose length is its second byte)."""
    strings = []
    for text in raw[raw[1] :].split(b"\0") if len(raw) > 1 else []:
        if not text:
            break
        strings.append(text)
    return strings


def _devices() -> Iterator[Source]:
    devices = sorted(_block_devices(), key=lambda device: device.name)
    system = {device.disk for device in devices if device.partition_name == SYSTEM_PARTITION}
    partitioned = {device.disk for device in devices if device.is_partition}
    for device in sorted(devices, key=lambda device: (device.disk in system, not device.removable)):
        name = f"the {'partition' if device.is_partition else 'device'} {device.name}"
        whole_disk = not device.is_partition and device.disk not in partitioned
        if device.partition_name != seed.PARTITION_NAME and not (whole_disk and _has_magic(device)):
            continue
        document = _read(device, name)
        if document is not None:
            yield Source(name, document)


def _block_devices() -> Iterator[_Device]:
    for entry in (paths.ROOT / "sys/class/block").glob("*"):
        if _NOT_MEDIA.match(entry.name):
            continue
        # /sys/class/block/sda1 is a link to .../block/sda/sda1.
        directory = entry.resolve()
        is_partition = (directory / "partition").exists()
        disk = directory.parent if is_partition else directory
        uevent = dict(line.split("=", 1) for line in _text(directory / "uevent").splitlines() if "=" in line)
        yield _Device(
            name=entry.name,
            disk=disk.name,
            partition_name=uevent.get("PARTNAME", ""),
            is_partition=is_partition,
            removable=_text(disk / "removable").strip() == "1",
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _node(device: _Device) -> Path:
    # The kernel writes the / of names such as cciss/c0d0 as !.
    return paths.ROOT / "dev" / device.name.replace("!", "/")


def _has_magic(device: _Device) -> bool:
    try:
        with _node(device).open("rb", buffering=0) as file:
            return file.read(len(seed.MAGIC)) == seed.MAGIC
    except OSError:
        return False


def _read(device: _Device, name: str) -> bytes | None:
    try:
        with _node(device).open("rb") as file:
            return seed.read(file)
    except UserError as error:
        raise SourceError(name, error.message) from None
    except OSError as error:
        raise SourceError(name, error.strerror or "cannot be read") from None
