"""What the kernel is to record: rules in its binary form, struct audit_rule_data of linux/audit.h."""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

FIRST_UID, LAST_UID = 70000, 79999
"""The uids of machines."""

_EXIT_LIST, _EXCLUDE_LIST = 4, 5
_NEVER, _ALWAYS = 0, 2
_WORDS, _FIELDS = 64, 64
_UID, _EUID, _ARCH, _MSGTYPE, _EXIT, _COMPARE, _KEY = 1, 2, 11, 12, 103, 111, 210
_X86_64 = 0xC000003E
_EQUAL, _NOT_EQUAL, _AT_LEAST, _AT_MOST = 0x40000000, 0x30000000, 0x60000000, 0x50000000
_UID_TO_EUID = 11

SYSCALLS: Mapping[str, int] = {
    "open": 2,
    "execve": 59,
    "truncate": 76,
    "creat": 85,
    "setuid": 105,
    "setgid": 106,
    "setreuid": 113,
    "setregid": 114,
    "setgroups": 116,
    "setresuid": 117,
    "setresgid": 119,
    "setfsuid": 122,
    "setfsgid": 123,
    "adjtimex": 159,
    "settimeofday": 164,
    "init_module": 175,
    "delete_module": 176,
    "clock_settime": 227,
    "openat": 257,
    "open_by_handle_at": 304,
    "clock_adjtime": 305,
    "finit_module": 313,
    "execveat": 322,
    "openat2": 437,
}
"""Numbers of the system calls in the rules (x86-64)."""
NAMES = {number: name for name, number in SYSCALLS.items()}

_MODULE = ("init_module", "finit_module", "delete_module")
_OPEN = ("open", "creat", "openat", "openat2", "open_by_handle_at", "truncate")
_EXEC = ("execve", "execveat")
_IDENTITY = (
    *("setuid", "setgid", "setreuid", "setregid", "setgroups", "setresuid", "setresgid", "setfsuid", "setfsgid"),
)
_TIME = ("adjtimex", "settimeofday", "clock_settime", "clock_adjtime")


class Condition(NamedTuple):
    """A field of the kernel's, how it is compared, and with what."""

    field: int
    operator: int
    value: int


def encode(list_: int, action: int, syscalls: Sequence[str], conditions: Sequence[Condition], key: str = "") -> bytes:
    """A rule as the kernel takes it; without system calls, it is for all."""
    mask = [0] * _WORDS if syscalls else [0xFFFFFFFF] * _WORDS
    for number in (SYSCALLS[name] for name in syscalls):
        mask[number // 32] |= 1 << number % 32
    text = key.encode("ascii")
    fields = [*conditions, *([Condition(_KEY, _EQUAL, len(text))] if text else [])]
    packed = struct.pack(f"=3I{_WORDS}I", list_, action, len(fields), *mask)
    for column in (
        [one.field for one in fields],
        [one.value & 0xFFFFFFFF for one in fields],
        [one.operator for one in fields],
    ):
        packed += struct.pack(f"={_FIELDS}I", *column, *[0] * (_FIELDS - len(fields)))
    return packed + struct.pack("=I", len(text)) + text + bytes(-len(text) % 4)


def record(key: str, syscalls: Sequence[str], *conditions: Condition) -> bytes:
    """Record these calls where all conditions hold, under a name."""
    return encode(_EXIT_LIST, _ALWAYS, syscalls, (Condition(_ARCH, _EQUAL, _X86_64), *conditions), key)


def leave_out(first: int, last: int) -> bytes:
    """Record no messages of these types."""
    if first == last:
        return encode(_EXCLUDE_LIST, _NEVER, (), (Condition(_MSGTYPE, _EQUAL, first),))
    between = (Condition(_MSGTYPE, _AT_LEAST, first), Condition(_MSGTYPE, _AT_MOST, last))
    return encode(_EXCLUDE_LIST, _NEVER, (), between)


RULES = (
    record("module", _MODULE),
    record("open", _OPEN, Condition(_EXIT, _EQUAL, -errno.EACCES)),
    record("open", _OPEN, Condition(_EXIT, _EQUAL, -errno.EPERM)),
    record("exec", _EXEC, Condition(_UID, _AT_LEAST, FIRST_UID), Condition(_UID, _AT_MOST, LAST_UID)),
    # Nothing here is setuid: a program that begins as root though its user is another is somebody's work.
    record("root", _EXEC, Condition(_EUID, _EQUAL, 0), Condition(_COMPARE, _NOT_EQUAL, _UID_TO_EUID)),
    # Who may change its user is what systemd and libvirt start as root; all others are refused by the kernel.
    record("identity", _IDENTITY, Condition(_EXIT, _EQUAL, -errno.EPERM)),
    record("time", _TIME),
    # What nobody here reads: what programs say themselves (systemd about each unit), but for libvirt's, which lie at
    # 2500; addresses; each change of the packet filter; command lines, which are in EXECVE; BPF; promiscuous devices.
    leave_out(1100, 1199),
    leave_out(1306, 1306),
    leave_out(1325, 1325),
    leave_out(1327, 1327),
    leave_out(1334, 1334),
    leave_out(1700, 1700),
)
"""All there are. The kernel looks at each of the first kind at the end of every system call, so they are few."""

_LAST_WORD = slice(12 + 4 * (_WORDS - 1), 12 + 4 * _WORDS)


def comparable(rule: bytes) -> bytes:
    """A rule in the form in which ours and those that the kernel lists are equal.

    The kernel gives no padding back, and clears the bits that stand for classes of system calls.
    """
    end = 12 + 4 * (_WORDS + 3 * _FIELDS)
    length = int.from_bytes(rule[end : end + 4], "little")
    cut = bytearray(rule[: end + 4 + length])
    cut[_LAST_WORD] = bytes(len(cut[_LAST_WORD]))
    return bytes(cut)
