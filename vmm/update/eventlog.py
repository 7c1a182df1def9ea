"""The TPM's event log: what the firmware says it measured, and what a register must hold then.

TCG PC Client Platform Firmware Profile, "Event Logging", the crypto agile form. The log is ordinary memory that anybody
before us could write to, so it proves nothing until what it adds up to is compared with the register.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vmm.update.errors import Refused

LAYER = "TPM event log"

NO_ACTION = 0x3
"""The type of events that say something and measure nothing."""

_MOST = 4 << 20
_MOST_ALGORITHMS = 16
_SHA256 = 0x000B
_SIGNATURE = b"Spec ID Event03\0"
_ALGORITHM = struct.Struct("<HH")
_EVENT = struct.Struct("<III")


@dataclass(frozen=True)
class Event:
    """One measurement: what was extended into the SHA-256 bank of a register, and what it was made of."""

    register: int
    type: int
    digest: bytes
    data: bytes


def read(path: Path) -> list[Event]:
    """The log of this start, as Linux shows it. Raises: Refused."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST + 1)
    except OSError as error:
        raise Refused(LAYER, f"it cannot be read: {error.strerror}") from None
    if len(content) > _MOST:
        raise Refused(LAYER, f"it has more than {_MOST} bytes")
    return parse(content)


def parse(log: bytes) -> list[Event]:
    """Take a log apart. Raises: Refused when any of it makes no sense, or SHA-256 is not among its hashes."""
    try:
        return _parse(log)
    except struct.error:
        raise Refused(LAYER, "it ends in the middle of an event") from None


def _parse(log: bytes) -> list[Event]:
    # The first event has the form of TPM 1.2, so that everybody can read which hashes the others come with.
    _, kind, size = struct.unpack_from("<II20xI", log)
    header, start = log[32 : 32 + size], 32 + size
    if kind != NO_ACTION or not header.startswith(_SIGNATURE) or start > len(log):
        raise Refused(LAYER, "it does not begin as a log of TPM 2.0")
    (count,) = struct.unpack_from("<I", header, 24)
    if not 1 <= count <= _MOST_ALGORITHMS:
        raise Refused(LAYER, f"it has {count} hashes an event")
    sizes = dict(_ALGORITHM.unpack_from(header, 28 + number * _ALGORITHM.size) for number in range(count))
    if sizes.get(_SHA256) != hashlib.sha256().digest_size:
        raise Refused(LAYER, "the firmware does not measure with SHA-256")
    events = []
    while start < len(log):
        register, kind, count = _EVENT.unpack_from(log, start)
        start += _EVENT.size
        if not 1 <= count <= len(sizes):
            raise Refused(LAYER, f"an event has {count} hashes")
        digests = {}
        for _ in range(count):
            (algorithm,) = struct.unpack_from("<H", log, start)
            if algorithm not in sizes:
                raise Refused(LAYER, f"an event has a hash of unknown kind {algorithm:#x}")
            digests[algorithm] = log[start + 2 : start + 2 + sizes[algorithm]]
            start += 2 + sizes[algorithm]
        (size,) = struct.unpack_from("<I", log, start)
        data, start = log[start + 4 : start + 4 + size], start + 4 + size
        if _SHA256 not in digests or start > len(log):
            raise Refused(LAYER, "an event is incomplete")
        events.append(Event(register, kind, digests[_SHA256], data))
    return events


def replay(events: Iterable[Event], register: int) -> bytes:
    """What a register's SHA-256 bank holds after these events."""
    value = bytes(32)
    for event in events:
        if event.register == register and event.type != NO_ACTION:
            value = hashlib.sha256(value + event.digest).digest()
    return value


def register(number: int, folder: Path) -> bytes:
    """What a register holds now. Arguments: ``folder`` has the SHA-256 bank in files. Raises: Refused."""
    try:
        value = bytes.fromhex((folder / str(number)).read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise Refused(LAYER, f"register {number} of the TPM cannot be read: {error}") from None
    if len(value) != hashlib.sha256().digest_size:
        raise Refused(LAYER, f"register {number} of the TPM has {len(value)} bytes")
    return value
