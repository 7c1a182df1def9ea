"""The firmware's db on this machine: what PCR 7 will hold when it grows or another of its keys counts; growing it."""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from vmm.update import eventlog, firmware, foresight, signer
from vmm.update.addition import ATTRIBUTES, Addition, check_signed
from vmm.update.errors import Refused

LAYER = "Secure Boot keys"
_LOG = "sys/kernel/security/tpm0/binary_bios_measurements"
_REGISTERS = "sys/class/tpm/tpm0/pcr-sha256"
_LOADER = "efi/EFI/BOOT/BOOTX64.EFI"
_FS_IOC_SETFLAGS = 0x40086602
_IMMUTABLE = 0x10


@dataclass(frozen=True)
class Foreseen:
    """What PCR 7 may hold after a change: with the UKIs of now, and with those to come; ``db`` is its content then.

    ``certificate`` (DER) vouches for those to come.
    """

    pcr7: tuple[bytes, bytes]
    db: bytes
    certificate: bytes


def foresee(root: Path, running: Path, uki: Path, addition: Addition | None) -> Foreseen | None:
    """Find out what PCR 7 will hold.

    Arguments: ``running`` is the UKI of this start, ``uki`` the one to start next; ``addition`` is added to db.
    Returns: None if nothing changes: nothing is added and the same certificate vouches for both UKIs, or the firmware
    enforces nothing. Raises: Refused when nothing can be foreseen here; CommandFailed.
    """
    efivars = root / firmware.EFIVARS
    if not firmware.read(efivars).secure_boot:
        return None
    db = firmware.variable(efivars / firmware.DB)
    entries = _entries(db)
    present, coming = (signer.certificate(path, entries) for path in (running, uki))
    if present == coming and addition is None:
        return None
    if not present or not coming:
        raise Refused(LAYER, "no certificate of db vouches for both the running UKI and the new one")
    measured = foresight.understand(eventlog.read(root / _LOG), pcr7(root))
    loader = signer.certificate(root / _LOADER, entries)

    def value(content: bytes, certificate: bytes) -> bytes:
        return measured.foresee(content, _entries(content)[certificate], loader=loader, uki=present)

    if addition is None:
        return Foreseen((value(db, present), value(db, coming)), db, coming)
    if present != coming:
        raise Refused(LAYER, "a release that announces a key must be signed by the same one as the running system")
    check_signed(addition, _entries(firmware.variable(efivars / firmware.KEK)))
    after = db if addition.certificate in entries else db + addition.list
    return Foreseen((value(after, present), value(after, addition.certificate)), after, addition.certificate)


def pcr7(root: Path) -> bytes:
    """What PCR 7 holds. Raises: Refused."""
    return eventlog.register(foresight.REGISTER, root / _REGISTERS)


def _entries(content: bytes) -> dict[bytes, bytes]:
    """The certificates (DER) of a list of the firmware's, in its order, each with the entry that holds it."""
    found: dict[bytes, bytes] = {}
    for kind, entry in firmware.entries("a variable", content):
        if kind == firmware.X509:
            found.setdefault(entry[firmware.OWNER_BYTES :], entry)
    return found


def extend(variable: Path, addition: Addition) -> None:
    """Have the firmware append to db what was signed for that. Raises: OSError as the firmware refuses."""
    # Linux protects variables from slips of the hand, by the flag that chattr(1) calls +i.
    _set_flags(variable, 0)
    try:
        descriptor = os.open(variable, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # One write is one call of the firmware (Linux, Documentation/filesystems/efivarfs.rst).
            os.write(descriptor, struct.pack("<I", ATTRIBUTES) + addition.payload)
        finally:
            os.close(descriptor)
    finally:
        _set_flags(variable, _IMMUTABLE)


def _set_flags(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(descriptor)
