"""Predicts PCR 11, which systemd-stub and systemd-pcrextend fill (systemd-measure(1), UAPI's UKI specification)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pefile

_MEASURED = (
    ".linux",
    ".osrel",
    ".cmdline",
    ".initrd",
    ".ucode",
    ".splash",
    ".dtb",
    ".uname",
    ".sbat",
    ".pcrpkey",
)
"""Sections in the order in which the stub measures them; .pcrsig is not measured, it signs the rest."""

BOOT_PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready")
"""What is extended on the way to a host that is up."""


def predict_pcr11(uki: Path, phases: tuple[str, ...] = BOOT_PHASES) -> str:
    """The SHA-256 bank's PCR 11 once these phases were entered, in hex."""
    sections = {}
    for section in pefile.PE(str(uki), fast_load=True).sections:
        name = section.Name.rstrip(b"\0").decode()
        # The stub measures what the section holds, not the padding up to the file's alignment.
        sections[name] = section.get_data()[: section.Misc_VirtualSize]
    value = bytes(32)
    for name in _MEASURED:
        if name in sections:
            value = _extend(value, name.encode() + b"\0")
            value = _extend(value, sections[name])
    for phase in phases:
        value = _extend(value, phase.encode())
    return value.hex()


def _extend(value: bytes, data: bytes) -> bytes:
    return hashlib.sha256(value + hashlib.sha256(data).digest()).digest()
