"""Which QEMU runs the host under test.

Without KVM a host runs guests on SVM that QEMU emulates, and Debian's QEMU 10 has two faults there that end or wreck
hosts at random. A copy of the emulator without them is used; it is the test rig's only, the image has Debian's.

tcg_handle_interrupt: a guest's write to CR8 (every timer tick of OVMF does one) while a virtual interrupt waits raises
that interrupt without QEMU's big lock, and a debugging check ends the whole machine for it ("assertion failed:
(bql_locked())", target/i386/tcg/system/misc_helper.c, helper_write_crN; still so in 11.1). The interrupt is already
pending on the same processor, so nothing is lost by going on: the check is left out.

cpu_clear_ignne: each FXRSTOR and XRSTOR on any processor clears a bit of the *first* processor's hflags2 that way:
read, change, write, without a lock (target/i386/tcg/fpu_helper.c, cpu_set_fpus). When the first one enters or leaves a
guest between the two, its nested paging is on in the host or off in the guest. The host's kernel then finds one of its
stacks overrun ("corrupted stack end detected inside scheduler"), or the guest stands still. Seen by tracing VMRUN and
#VMEXIT; two guests that start over and over met it within minutes. The bit (IGNNE#, errors of the FPU as a PC/AT had
them) is only ever set by a write to port F0h, which no kernel of ours does: the function returns at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from elftools.elf.elffile import ELFFile

QEMU = Path("/usr/bin/qemu-system-x86_64")
_REPAIRS = {
    # call bql_locked; test %al,%al; je to the failure, which two no-ops replace.
    "tcg_handle_interrupt": (re.compile(rb"\xe8....\x84\xc0(\x74.)", re.DOTALL), b"\x90\x90"),
    # Its first instruction, behind the mark of a branch target, becomes ret.
    "cpu_clear_ignne": (re.compile(rb"\A(?:\xf3\x0f\x1e\xfa)?(.)", re.DOTALL), b"\xc3"),
}
"""For each function what to look for near its start, and what takes the place of the group."""


def emulator(accelerator: str) -> Path:
    """The program for "kvm" or "tcg"; the copy for TCG is made beside the original when it is missing or older."""
    copy = QEMU.with_name(f"{QEMU.name}-nested")
    if accelerator != "tcg":
        return QEMU
    newest = max(QEMU.stat().st_mtime, Path(__file__).stat().st_mtime)
    if not copy.exists() or copy.stat().st_mtime < newest:
        fresh = copy.with_suffix(".new")
        fresh.write_bytes(repaired(QEMU))
        fresh.chmod(0o755)
        os.replace(fresh, copy)
    return copy


def repaired(program: Path) -> bytes:
    """The program's bytes without the faults; unchanged where it has no such function or nothing to replace."""
    content = bytearray(program.read_bytes())
    with program.open("rb") as stream:
        elf = ELFFile(stream)
        # By the hash table, as the dynamic linker does: to read all 25,000 symbols takes half a second.
        table = elf.get_section_by_name(".gnu.hash")
        for name, (pattern, replacement) in _REPAIRS.items():
            symbol = table.get_symbol(name)
            if not symbol:
                continue
            start = next(iter(elf.address_offsets(symbol["st_value"], 1)))
            found = pattern.search(bytes(content[start : start + 64]))
            if found:
                content[start + found.start(1) : start + found.end(1)] = replacement
    return bytes(content)
