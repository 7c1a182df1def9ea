"""The copy of QEMU for nested guests differs from Debian's in two functions and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests.harness.emulator import QEMU, repaired


def test_a_jump_and_a_function_are_taken_out() -> None:
    original, changed = QEMU.read_bytes(), repaired(QEMU)
    assert len(original) == len(changed)
    # By blocks first: to compare 30 MB byte by byte takes Python a second.
    blocks = [slice(at, at + 4096) for at in range(0, len(original), 4096)]
    different = {
        block.start + place: (a, b)
        for block in blocks
        if original[block] != changed[block]
        for place, (a, b) in enumerate(zip(original[block], changed[block], strict=True))
        if a != b
    }
    assert len(different) == 3, "this QEMU is another: see whether the copy is still needed, and whole"
    (function,) = (place for place, (_, b) in different.items() if b == 0xC3)
    check, other = sorted(different.keys() - {function})
    assert other == check + 1
    assert (different[check][0], different[check][1], different[other][1]) == (0x74, 0x90, 0x90)
    assert original[function - 4 : function] == b"\xf3\x0f\x1e\xfa", "ret is not the function's first instruction"


def test_other_programs_stay_as_they_are() -> None:
    program = Path("/usr/bin/true")
    assert repaired(program) == program.read_bytes()
