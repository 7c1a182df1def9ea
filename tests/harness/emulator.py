"""Which QEMU runs the host under test.

Without KVM a host runs guests on SVM that QEMU emulates, and Debian's QEMU 10 has a fault there: a guest's write
to CR8 (every timer tick of OVMF does one) while a virtual interrupt waits raises that interrupt without QEMU's big
lock, which a debugging check in tcg_handle_interrupt then ends the whole machine for ("assertion failed:
(bql_locked())", target/i386/tcg/system/misc_helper.c, helper_write_crN; still so in 11.1). The interrupt is already
pending on the same processor, so nothing is lost by going on: a copy of the emulator without that one check is used.
It is the test rig's emulator only; the image has Debian's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from elftools.elf.elffile import ELFFile

QEMU = Path("/usr/bin/qemu-system-x86_64")
_CHECKING = "tcg_handle_interrupt"
_CHECK = re.compile(rb"\xe8....\x84\xc0(\x74.)", re.DOTALL)
"""call bql_locked; test %al,%al; je to the failure."""


def emulator(accelerator: str) -> Path:
    """The program for "kvm" or "tcg"; the copy for TCG is made beside the original when it is missing or older."""
    copy = QEMU.with_name(f"{QEMU.name}-nested")
    if accelerator != "tcg":
        return QEMU
    if not copy.exists() or copy.stat().st_mtime < QEMU.stat().st_mtime:
        fresh = copy.with_suffix(".new")
        fresh.write_bytes(without_check(QEMU))
        fresh.chmod(0o755)
        os.replace(fresh, copy)
    return copy


def without_check(program: Path) -> bytes:
    """The program's bytes with the check's jump to its failure taken out; unchanged if it has no such check."""
    content = bytearray(program.read_bytes())
    with program.open("rb") as stream:
        elf = ELFFile(stream)
        # By the hash table, as the dynamic linker does: to read all 25,000 symbols takes half a second.
        symbol = elf.get_section_by_name(".gnu.hash").get_symbol(_CHECKING)
        if symbol:
            start = next(iter(elf.address_offsets(symbol["st_value"], 1)))
            found = _CHECK.search(content, start, start + 64)
            if found:
                content[found.start(1) : found.end(1)] = b"\x90\x90"
    return bytes(content)
