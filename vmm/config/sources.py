"""Where a host looks for its seed: SMBIOS strings, then partitions and devices; nothing is mounted."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vmm import paths
from vmm.config import seed
from vmm.config.devices import Device, block_devices
from vmm.errors import UserError

# A disk with this partition is the one the host was installed on; a stick put in must win over it.
SYSTEM_PARTITION = "holdfast-data"

_CREDENTIAL = re.compile(rb"io\.systemd\.credential(\.binary)?:holdfast\.seed=(.*)", re.DOTALL)
_MAX_SMBIOS = 256 * 1024


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
    devices = sorted(block_devices(paths.ROOT), key=lambda device: device.name)
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


def _has_magic(device: Device) -> bool:
    try:
        with device.node.open("rb", buffering=0) as file:
            return file.read(len(seed.MAGIC)) == seed.MAGIC
    except OSError:
        return False


def _read(device: Device, name: str) -> bytes | None:
    try:
        with device.node.open("rb") as file:
            return seed.read(file)
    except UserError as error:
        raise SourceError(name, error.message) from None
    except OSError as error:
        raise SourceError(name, error.strerror or "cannot be read") from None
