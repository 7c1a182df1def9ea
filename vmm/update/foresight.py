"""What PCR 7 will hold at the next starts, when db has grown or another certificate vouches for the UKI.

The firmware measures its lists of keys, and then each certificate of db that vouches for a program, once, in the order
of the programs (TCG PC Client Platform Firmware Profile, "PCR[7] – Secure Boot Policy Measurements"). Both are known
before they happen, as far as the log of this start adds up to what PCR 7 holds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from vmm.update import eventlog, firmware
from vmm.update.errors import Refused
from vmm.update.eventlog import Event

LAYER = "PCR 7"
REGISTER = 7
DRIVER_CONFIG = 0x80000001
"""EV_EFI_VARIABLE_DRIVER_CONFIG: one of the lists of keys."""
AUTHORITY = 0x800000E0
"""EV_EFI_VARIABLE_AUTHORITY: an entry of such a list that vouched for a program."""
_VARIABLE = struct.Struct("<16sQQ")
_DB = UUID(firmware.IMAGE_SECURITY).bytes_le, "db"


@dataclass(frozen=True)
class Measured:
    """The events of PCR 7 in this start, which are known to add up to what it holds."""

    events: tuple[Event, ...]

    def foresee(self, db: bytes, entry: bytes, *, loader: bytes, uki: bytes) -> bytes:
        """What PCR 7 will hold when the content of db is ``db``, whatever it was in this start, and an entry of it
        vouches for the UKI.

        Arguments: ``entry`` is owner and certificate; ``loader`` and ``uki`` are the certificates that vouch for boot
        loader and UKI of this start.
        Raises: Refused when the log does not name them.
        """
        events = [
            _event(DRIVER_CONFIG, db) if event.type == DRIVER_CONFIG and _is_db(event) else event
            for event in self.events
        ]
        if entry[firmware.OWNER_BYTES :] != uki:
            events = self._with_other_uki(events, entry, loader, uki)
        return eventlog.replay(events, REGISTER)

    def _with_other_uki(self, events: Sequence[Event], entry: bytes, loader: bytes, uki: bytes) -> list[Event]:
        vouched = [_certificate(event) for event in events]
        if loader not in vouched or uki not in vouched:
            raise Refused(LAYER, "the log does not name the certificates that vouched for boot loader and UKI")
        place = vouched.index(uki)
        # Named once for both if it is the loader's as well; the UKI is what starts next after that.
        before, after = events[: place + (uki == loader)], events[place + 1 :]
        coming = entry[firmware.OWNER_BYTES :]
        if coming in vouched[: len(before)]:
            return [*before, *after]
        return [*before, _event(AUTHORITY, entry), *(event for event in after if _certificate(event) != coming)]


def understand(events: Sequence[Event], value: bytes) -> Measured:
    """Find what matters in the log of this start. Arguments: ``value`` is what PCR 7 holds.

    Raises: Refused when the log does not explain that value, so that nothing can be foreseen.
    """
    own = tuple(event for event in events if event.register == REGISTER and event.type != eventlog.NO_ACTION)
    if eventlog.replay(own, REGISTER) != value:
        raise Refused(LAYER, "this firmware's log does not explain what PCR 7 holds")
    if any(hashlib.sha256(event.data).digest() != event.digest for event in own if _is_db(event)):
        raise Refused(LAYER, "this firmware's log does not hold what was measured of db")
    count = sum(event.type == DRIVER_CONFIG and _is_db(event) for event in own)
    if count != 1:
        raise Refused(LAYER, f"this firmware's log has db {count} times")
    return Measured(own)


def _variable(data: bytes) -> tuple[bytes, str, bytes]:
    """UEFI_VARIABLE_DATA: vendor, name, content; of anything else, what can be nobody's."""
    if len(data) < _VARIABLE.size:
        return b"", "", b""
    vendor, characters, size = _VARIABLE.unpack_from(data)
    start = _VARIABLE.size + 2 * characters
    if start + size != len(data):
        return b"", "", b""
    return vendor, data[_VARIABLE.size : start].decode("utf-16-le", "replace"), data[start:]


def _is_db(event: Event) -> bool:
    return event.type in (DRIVER_CONFIG, AUTHORITY) and _variable(event.data)[:2] == _DB


def _certificate(event: Event) -> bytes:
    """What vouched, as far as it is an entry of db; empty for all other events."""
    return _variable(event.data)[2][firmware.OWNER_BYTES :] if event.type == AUTHORITY and _is_db(event) else b""


def _event(type: int, content: bytes) -> Event:
    """The event that the firmware will make of db or an entry of it: measured with name and lengths in front."""
    vendor, name = _DB
    data = _VARIABLE.pack(vendor, len(name), len(content)) + name.encode("utf-16-le") + content
    return Event(REGISTER, type, hashlib.sha256(data).digest(), data)
