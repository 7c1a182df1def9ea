"""What an event of the kernel's means: the record that it becomes, or none."""

from __future__ import annotations

import errno
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from vmm.audit.client import Actor, Entry, Object
from vmm.clock import rfc3339
from vmm.kernel.joining import Event
from vmm.kernel.parse import Fields, number, plain, text
from vmm.kernel.rules import FIRST_UID, LAST_UID, NAMES

SYSCALL, PATH, CONFIG_CHANGE, CWD, EXECVE = 1300, 1302, 1305, 1307, 1309
NETFILTER_PKT, SECCOMP, KERN_MODULE, TIME_INJOFFSET, TIME_ADJNTPVAL = 1324, 1326, 1330, 1332, 1333
AVC, ABEND = 1400, 1701

Type = Literal[
    "kernel.denied",
    "kernel.open",
    "kernel.module",
    "kernel.exec",
    "kernel.identity",
    "kernel.time",
    "kernel.seccomp",
    "kernel.crash",
    "kernel.packet",
    "kernel.config",
]

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PROFILE = re.compile(rf"libvirt-({UUID.pattern})(?://.*)?")
QUIET = re.compile(r"/proc/\d+/cmdline|/dev/shm/lttng-ust-wait-.*|/etc/(?:nsswitch\.conf|passwd|group)")
"""What each QEMU tries and is denied without a record (abstractions/libvirt-qemu, its lines of deny)."""
_STARTS = frozenset(
    {
        ("/usr/lib/systemd/systemd-executor", "/dev/console"),
        ("/usr/lib/systemd/systemd-networkd", "/sys/fs/bpf"),
        ("/usr/bin/networkctl", "/proc/1/environ"),
    }
)
"""What systemd's programs try whenever they start, and their own units (DevicePolicy=, User=) keep them from."""
_QEMU = "/usr/bin/qemu-system-x86_64"
_TIME_DAEMON = "/usr/lib/systemd/systemd-timesyncd"
_BESIDE = ("openat", "openat2", "execveat")
"""Calls that take a name in an open folder, which the kernel's records do not name."""
_FROM_HERE = ("ffffff9c", "ffffffffffffff9c")  # AT_FDCWD
_MOST_ARGUMENTS = 8
_MOST_KNOWN = 10_000


class Machines:
    """Which machine a process belongs to: by its AppArmor profile, or else by its uid, as libvirt told of late."""

    def __init__(self) -> None:
        self._by_uid: dict[int, str] = {}

    def learn(self, uid: int, uuid: str) -> None:
        """libvirt gives a machine this uid."""
        if FIRST_UID <= uid <= LAST_UID and len(self._by_uid) < _MOST_KNOWN:
            self._by_uid[uid] = uuid

    def of(self, profile: str, uid: int | None) -> str:
        """A machine's UUID, "" for what belongs to none."""
        if match := _PROFILE.fullmatch(profile):
            if uid is not None:
                self.learn(uid, match[1])
            return match[1]
        return self._by_uid.get(uid, "") if uid is not None else ""


class Finding(NamedTuple):
    """A record to be, and whose: what the same one causes is counted together when it is too much."""

    entry: Entry
    who: str


class Judge:
    """Makes records of events."""

    def __init__(self, machines: Machines, readers: Callable[[], set[int]]) -> None:
        """Arguments: ``readers`` are the process ids that this daemon has, and had before it was started again."""
        self._machines = machines
        self._readers = readers

    def judge(self, event: Event) -> Finding | None:
        """What an event is put on record as; None when it is nothing."""
        call = event.first(SYSCALL) or {}
        if any(avc.get("apparmor") == '"DENIED"' for avc in event.all(AVC)):
            return self._denied(event, call)
        for type_, make in (
            (SECCOMP, self._seccomp),
            (ABEND, self._crash),
            (NETFILTER_PKT, self._packet),
            (CONFIG_CHANGE, self._config),
        ):
            if (fields := event.first(type_)) is not None:
                return make(event, fields)
        by_rule: Mapping[str, Callable[[Event, Fields], Finding | None]] = {
            "module": self._module,
            "open": self._open,
            "exec": self._exec,
            "root": self._identity,
            "identity": self._identity,
            "time": self._time,
        }
        # More than one rule may have fitted; the first does.
        key = text(call.get("key")).split("\\x01")[0]
        return by_rule[key](event, call) if key in by_rule else None

    def _finding(
        self, type: Type, event: Event, process: Fields, extra: dict[str, Any], *, failed: bool = True, reason: str = ""
    ) -> Finding:
        uid = number(process.get("uid", process.get("fsuid")))
        profile = text(process.get("subj", process.get("profile")))
        machine = self._machines.of(profile, uid)
        known = {
            "at": rfc3339(event.time / 1000),
            "serial": event.serial,
            "uid": uid,
            "pid": number(process.get("pid")),
            "program": text(process.get("exe")),
            "process": text(process.get("comm")),
            "profile": profile,
            **extra,
        }
        return Finding(
            Entry(
                type=type,
                actor=Actor(id="-" if uid is None else f"uid {uid}"),
                object=Object(kind="machine", id=machine) if machine else Object(),
                outcome="failure" if failed else "success",
                reason=reason,
                extra={name: value for name, value in known.items() if value not in (None, "", [])},
            ),
            machine or f"uid {uid}",
        )

    def _denied(self, event: Event, call: Fields) -> Finding:
        avc = next(avc for avc in event.all(AVC) if avc.get("apparmor") == '"DENIED"')
        profile = text(avc.get("profile"))
        net = "/".join(filter(None, (text(avc.get("family")), text(avc.get("sock_type")))))
        extra = {
            "policy": f"AppArmor profile {profile}",
            "profile": profile,
            "operation": text(avc.get("operation")),
            "path": text(avc.get("name")),
            "denied": text(avc.get("denied_mask")) or text(avc.get("capname")),
            "peer": text(avc.get("peer")),
            "network_component": net,
            "denials": len(event.all(AVC)),
        }
        # The label of the process may be another one already; the denial names the profile that it came of.
        return self._finding("kernel.denied", event, {**avc, **call, "subj": avc.get("profile", "")}, extra)

    def _seccomp(self, event: Event, fields: Fields) -> Finding:
        wanted = number(fields.get("syscall"))
        extra = {"call": _name(wanted), "signal": number(fields.get("sig")), "policy": "system call filter"}
        return self._finding("kernel.seccomp", event, fields, extra)

    def _crash(self, event: Event, fields: Fields) -> Finding:
        return self._finding("kernel.crash", event, fields, {"signal": number(fields.get("sig"))})

    def _packet(self, event: Event, fields: Fields) -> Finding:
        # The rule marks the packet with the uid that it is of (etc/nftables.conf); the kernel names no process.
        process = {"uid": str(number(fields.get("mark"), 16))}
        extra = {
            "policy": "packet filter, chain output",
            "network_component": plain(fields.get("daddr", "")),
            "source": plain(fields.get("saddr", "")),
            "protocol": number(fields.get("proto")),
        }
        return self._finding("kernel.packet", event, process, extra)

    def _config(self, event: Event, fields: Fields) -> Finding | None:
        reader = number(fields.get("audit_pid"))
        done = fields.get("res") == "1"
        if done and (reader is None or reader in {0, *self._readers()}):
            return None  # our own doing: once that is done, the kernel lets nobody change anything else
        named = {name: value for name, value in fields.items() if name not in ("auid", "ses", "subj", "res")}
        what = " ".join(f"{name}={plain(value)}" for name, value in list(named.items())[:12])
        process = {**fields, **(event.first(SYSCALL) or {})}
        reason = "another process reads the kernel's audit" if done else "the kernel refused it"
        return self._finding("kernel.config", event, process, {"change": what[:300]}, failed=not done, reason=reason)

    def _module(self, event: Event, call: Fields) -> Finding:
        names = [text(one.get("name")) for one in event.all(KERN_MODULE)]
        extra = {"module": next(iter(names), ""), "call": _called(call), "error": _error(call)}
        return self._finding("kernel.module", event, call, extra, failed=not _worked(call))

    def _open(self, event: Event, call: Fields) -> Finding | None:
        path = _path(event, call)
        uid = number(call.get("uid"))
        if uid is not None and FIRST_UID <= uid <= LAST_UID and QUIET.fullmatch(path):
            return None
        if (text(call.get("exe")), path) in _STARTS:
            return None
        return self._finding("kernel.open", event, call, {"path": path, "call": _called(call), "error": _error(call)})

    def _exec(self, event: Event, call: Fields) -> Finding | None:
        program = text(call.get("exe"))
        if program == _QEMU and _worked(call):
            return None  # how each machine begins: libvirt takes on its uid, then becomes QEMU
        given = event.first(EXECVE) or {}
        arguments = [text(given.get(f"a{i}")) for i in range(_MOST_ARGUMENTS) if f"a{i}" in given]
        extra = {"path": _path(event, call), "arguments": arguments, "error": _error(call)}
        return self._finding("kernel.exec", event, call, extra, failed=not _worked(call))

    def _identity(self, event: Event, call: Fields) -> Finding:
        extra = {
            "call": _called(call),
            "error": _error(call),
            "effective_uid": number(call.get("euid")),
            "arguments": [plain(call[name]) for name in ("a0", "a1", "a2") if name in call],
        }
        return self._finding("kernel.identity", event, call, extra, failed=not _worked(call))

    def _time(self, event: Event, call: Fields) -> Finding | None:
        step, tuned = event.first(TIME_INJOFFSET), event.all(TIME_ADJNTPVAL)
        worked = _worked(call)
        if worked and step is None and (not tuned or text(call.get("exe")) == _TIME_DAEMON):
            return None  # read, or steered as the time servers say
        extra: dict[str, Any] = {"call": _called(call), "error": _error(call)}
        if step is not None:
            extra |= {"seconds": number(step.get("sec")), "nanoseconds": number(step.get("nsec"))}
        extra["changes"] = [
            " ".join(f"{name}={plain(one[name])}" for name in ("op", "old", "new") if name in one) for one in tuned
        ]
        return self._finding("kernel.time", event, call, extra, failed=not worked)


def _worked(call: Fields) -> bool:
    return call.get("success") == "yes"


def _name(number_: int | None) -> str:
    return "" if number_ is None else NAMES.get(number_, str(number_))


def _called(call: Fields) -> str:
    return _name(number(call.get("syscall")))


def _error(call: Fields) -> str:
    code = number(call.get("exit"))
    return errno.errorcode.get(-code, str(code)) if code is not None and code < 0 else ""


def _path(event: Event, call: Fields) -> str:
    """What was to be opened: absolute where that can be known, else as the process named it."""
    paths = [one for one in event.all(PATH) if one.get("nametype") != "PARENT"] or event.all(PATH)
    path = text(paths[0].get("name")) if paths else ""
    if path and not path.startswith("/") and (_called(call) not in _BESIDE or call.get("a0") in _FROM_HERE):
        here = text((event.first(CWD) or {}).get("cwd"))
        return posixpath.normpath(posixpath.join(here, path)) if here else path
    return path
