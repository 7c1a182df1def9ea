"""The binary form of the kernel's audit rules, compared with what auditctl 3.0.9 sends (strace, little-endian)."""

from __future__ import annotations

import errno

import pytest

from vmm.kernel.rules import NAMES, RULES, SYSCALLS, Condition, comparable, leave_out, record

_MASK, _FIELDS, _VALUES, _OPERATORS, _STRINGS = 12, 268, 524, 780, 1036
"""Where the parts of struct audit_rule_data begin."""

UID, EUID, EXIT, COMPARE = 1, 2, 103, 111
EQUAL, NOT_EQUAL, AT_LEAST, AT_MOST = 0x40000000, 0x30000000, 0x60000000, 0x50000000

# auditctl -a always,exit -F arch=b64 ... ; parts without the zeros behind them.
KNOWN = [
    (
        "-S init_module,finit_module,delete_module -k module",
        record("module", ["init_module", "finit_module", "delete_module"]),
        (
            "040000000200000002000000",
            "00000000000000000000000000000000000000000080010000000000000000000000000000000002",
            "0b000000d2000000",
            "3e0000c006000000",
            "0000004000000040",
            "060000006d6f64756c650000",
        ),
    ),
    (
        "-S open,creat,openat,openat2,truncate -F exit=-EACCES -k open",
        record("open", ["open", "creat", "openat", "openat2", "truncate"], Condition(EXIT, EQUAL, -errno.EACCES)),
        (
            "040000000200000003000000",
            "0400000000000000001020" + "00" * 21 + "02" + "00" * 21 + "20",
            "0b00000067000000d2",
            "3e0000c0f3ffffff04",
            "000000400000004000000040",
            "040000006f70656e",
        ),
    ),
    (
        "-S execve,execveat -F uid>=70000 -F uid<=79999 -k guest-exec",
        record("guest-exec", ["execve", "execveat"], Condition(UID, AT_LEAST, 70000), Condition(UID, AT_MOST, 79999)),
        (
            "040000000200000004000000",
            "0000000000000008000000000000000000000000000000000000000000000000000000000000000004",
            "0b0000000100000001000000d2",
            "3e0000c0701101007f3801000a",
            "00000040000000600000005000000040",
            "0a00000067756573742d657865630000",
        ),
    ),
    (
        "-S execve,execveat -F euid=0 -C uid!=euid -k root-exec",
        record("root-exec", ["execve", "execveat"], Condition(EUID, EQUAL, 0), Condition(COMPARE, NOT_EQUAL, 11)),
        (
            "040000000200000004000000",
            "0000000000000008000000000000000000000000000000000000000000000000000000000000000004",
            "0b000000020000006f000000d2",
            "3e0000c0000000000b00000009",
            "00000040000000400000003000000040",
            "09000000726f6f742d65786563000000",
        ),
    ),
    (
        "-a never,exclude -F msgtype>=1100 -F msgtype<=1199",
        leave_out(1100, 1199),
        ("050000000000000002000000", "ff" * 256, "0c0000000c", "4c040000af04", "0000006000000050", "00000000"),
    ),
]


@pytest.mark.parametrize(("command", "made", "known"), KNOWN, ids=[command for command, _, _ in KNOWN])
def test_rules_are_auditctls_to_the_byte(command: str, made: bytes, known: tuple[str, ...]) -> None:
    expected = bytes.fromhex(known[0])
    for part, end in zip(known[1:5], (_FIELDS, _VALUES, _OPERATORS, _STRINGS), strict=True):
        expected += bytes.fromhex(part)
        expected += bytes(end - len(expected))
    assert made == expected + bytes.fromhex(known[5])


def test_a_rule_is_found_among_those_that_the_kernel_lists() -> None:
    """The kernel gives no padding back and clears the bits of classes; nothing else may differ."""
    for rule in RULES:
        listed = bytearray(rule)
        length = int.from_bytes(rule[_STRINGS : _STRINGS + 4], "little")
        del listed[_STRINGS + 4 + length :]
        listed[_FIELDS - 2 : _FIELDS] = bytes(2)
        assert comparable(bytes(listed)) == comparable(rule)
    assert len({comparable(rule) for rule in RULES}) == len(RULES)
    assert comparable(record("a", ["open"])) != comparable(record("b", ["open"]))


def test_the_rules_fit_and_their_calls_have_one_name_each() -> None:
    assert len(NAMES) == len(SYSCALLS)
    assert all(number < 32 * 63 for number in NAMES), "the last word is not compared"
    assert all(len(rule) % 4 == 0 for rule in RULES)
