"""Which record an event of the kernel's becomes, field by field, from records as the kernel writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmm.audit.client import Entry
from vmm.audit.events import EVENTS
from vmm.kernel.joining import Event, Joiner
from vmm.kernel.judge import QUIET, Finding, Judge, Machines
from vmm.kernel.libvirt import Change, Gatherer
from vmm.kernel.parse import parse

UUID = "5f1c7a9e-8a1b-4b7c-9f3e-0d2c4b6a8e10"
QEMU = (
    f"pid=4242 auid=4294967295 uid=70001 gid=105 euid=70001 suid=70001 fsuid=70001 tty=(none) ses=4294967295 "
    f'comm="qemu-system-x86" exe="/usr/bin/qemu-system-x86_64" subj=libvirt-{UUID}'
)
ROOT = 'pid=77 auid=4294967295 uid=0 gid=0 euid=0 comm="modprobe" exe="/usr/bin/kmod" subj=unconfined'
EXTRA = {
    "at": "2023-11-14T22:13:20Z",
    "serial": 9,
    "uid": 70001,
    "pid": 4242,
    "program": "/usr/bin/qemu-system-x86_64",
    "process": "qemu-system-x86",
    "profile": f"libvirt-{UUID}",
}


def call(number: int, key: str, exit: int, process: str = QEMU, a0: str = "ffffff9c") -> tuple[int, str]:
    success = "yes" if exit >= 0 else "no"
    return 1300, (
        f"arch=c000003e syscall={number} success={success} exit={exit} a0={a0} a1=7f a2=0 a3=0 items=1 ppid=1 "
        f'{process} key="{key}"'
    )


def event(*records: tuple[int, str], joiner: Joiner | None = None) -> Event:
    joiner = joiner or Joiner()
    for type_, body in records:
        line = parse(f"audit(1700000000.123:9): {body}".encode())
        assert line is not None
        assert not list(joiner.add(type_, line, 0.0))
    (whole,) = joiner.ripe(9.0)
    return whole


def judged(*records: tuple[int, str], judge: Judge | None = None) -> Finding | None:
    finding = (judge or Judge(Machines(), lambda: {500})).judge(event(*records))
    if finding is not None:
        # As it comes out of the frame on its way to the audit daemon.
        EVENTS.check(msgspec.convert(msgspec.to_builtins(finding.entry), Entry), "holdfast-kernel")
    return finding


def found(*records: tuple[int, str]) -> Entry:
    finding = judged(*records)
    assert finding is not None
    return finding.entry


def test_a_denial_of_apparmors_is_its_machines() -> None:
    denied = (
        f'apparmor="DENIED" operation="open" class="file" profile="libvirt-{UUID}" name="/var/lib/x" pid=4242 '
        'comm="qemu-system-x86" requested_mask="r" denied_mask="r" fsuid=70001 ouid=0'
    )
    finding = judged((1400, denied), call(257, "open", -13), (1302, 'item=0 name="/var/lib/x" nametype=UNKNOWN'))
    assert finding is not None and finding.who == UUID
    entry = finding.entry
    assert (entry.type, entry.outcome, entry.actor.id) == ("kernel.denied", "failure", "uid 70001")
    assert (entry.object.kind, entry.object.id) == ("machine", UUID)
    assert entry.extra == {
        **EXTRA,
        "policy": f"AppArmor profile libvirt-{UUID}",
        "operation": "open",
        "path": "/var/lib/x",
        "denied": "r",
        "denials": 1,
    }


def test_a_denial_outside_of_a_call_has_what_apparmor_says() -> None:
    denied = (
        f'apparmor="DENIED" operation="create" class="net" profile="libvirt-{UUID}" pid=4242 comm=7120 '
        'family="inet" sock_type="stream" protocol=6 requested_mask="create" denied_mask="create"'
    )
    entry = found((1400, denied))
    assert (entry.extra["network_component"], entry.extra["process"]) == ("inet/stream", "q ")
    assert entry.object.id == UUID and entry.actor.id == "-"


@pytest.mark.parametrize("status", ['apparmor="STATUS" operation="profile_load"', 'apparmor="ALLOWED"', ""])
def test_what_apparmor_does_not_deny_is_nothing(status: str) -> None:
    assert judged((1400, f'{status} profile="unconfined" name="libvirt-{UUID}" pid=9 comm="apparmor_parser"')) is None


@pytest.mark.parametrize(
    ("name", "cwd", "a0", "path"),
    [
        ('"/etc/shadow"', '"/"', "ffffff9c", "/etc/shadow"),
        ('"../etc/shadow"', '"/var"', "ffffff9c", "/etc/shadow"),
        ('"shadow"', '"/var"', "ffffffffffffff9c", "/var/shadow"),
        ('"shadow"', '"/var"', "7", "shadow"),
        ("2F746D702F61206200", '"/"', "ffffff9c", "/tmp/a b\\x00"),
        ("(null)", '"/"', "ffffff9c", ""),
    ],
)
def test_an_open_that_was_refused_names_the_file(name: str, cwd: str, a0: str, path: str) -> None:
    records = (call(257, "open", -13, a0=a0), (1307, f"cwd={cwd}"), (1302, f"item=0 name={name} nametype=UNKNOWN"))
    entry = found(*records)
    expected = {**EXTRA, "call": "openat", "error": "EACCES"} | ({"path": path} if path else {})
    assert (entry.type, entry.outcome, entry.object.id, entry.extra) == ("kernel.open", "failure", UUID, expected)


def test_what_each_qemu_tries_in_vain_is_no_record() -> None:
    """As the profile has it: denied without a record. The same by another process is one."""
    abstraction = Path("image/rootfs/etc/apparmor.d/abstractions/libvirt-qemu").read_text()
    denied = re.findall(r"^\s*deny (/\S+|@\S+) r,$", abstraction, re.MULTILINE)
    assert len(denied) == 5
    for pattern in denied:
        path = pattern.replace("@{PROC}/@{pid}", "/proc/4242").replace("*", "7")
        assert QUIET.fullmatch(path), path
        records = [(1307, 'cwd="/"'), (1302, f'item=0 name="{path}" nametype=NORMAL')]
        assert judged(call(257, "open", -13), *records) is None
        assert found(call(257, "open", -13, ROOT), *records).extra["path"] == path
    assert not QUIET.fullmatch("/etc/shadow")


def test_what_systemd_tries_at_each_start_is_no_record() -> None:
    """The same file by another program, and another file by the same one, are."""

    def opened(program: str, path: str) -> Finding | None:
        who = ROOT.replace("/usr/bin/kmod", program)
        return judged(call(257, "open", -1, who), (1307, 'cwd="/"'), (1302, f'item=0 name="{path}" nametype=NORMAL'))

    assert opened("/usr/lib/systemd/systemd-executor", "/dev/console") is None
    assert opened("/usr/lib/systemd/systemd-executor", "/etc/shadow") is not None
    assert opened("/usr/bin/python3.13", "/dev/console") is not None


def test_modules() -> None:
    entry = found(call(313, "module", 0, ROOT), (1330, 'name="dummy"'))
    assert (entry.type, entry.outcome, entry.extra["module"]) == ("kernel.module", "success", "dummy")
    assert entry.extra["call"] == "finit_module" and entry.actor.id == "uid 0" and not entry.object.id
    entry = found(call(175, "module", -1, QEMU))
    assert (entry.outcome, entry.extra["error"], entry.object.id) == ("failure", "EPERM", UUID)


def test_programs_that_a_guests_process_runs() -> None:
    assert judged(call(59, "exec", 0)) is None, "libvirt becomes QEMU so"
    shell = QEMU.replace("/usr/bin/qemu-system-x86_64", "/usr/bin/dash")
    path = (1302, 'name="/usr/bin/dash"')
    entry = found(call(59, "exec", 0, shell), (1309, 'argc=3 a0="dash" a1="-c" a2=726D202F'), path)
    assert (entry.type, entry.outcome) == ("kernel.exec", "success")
    assert (entry.extra["path"], entry.extra["arguments"]) == ("/usr/bin/dash", ["dash", "-c", "rm /"])
    assert found(call(59, "exec", -13), path).outcome == "failure"


def test_changes_of_user() -> None:
    entry = found(call(105, "identity", -1, a0="0"))
    assert (entry.type, entry.outcome, entry.extra["call"], entry.extra["error"]) == (
        *("kernel.identity", "failure", "setuid", "EPERM"),
    )
    became = QEMU.replace("euid=70001", "euid=0")
    entry = found(call(59, "root", 0, became))
    assert (entry.type, entry.outcome, entry.extra["effective_uid"]) == ("kernel.identity", "success", 0)


def test_time() -> None:
    step = (1332, "sec=3600 nsec=12")
    entry = found(call(227, "time", 0, ROOT), step)
    assert (entry.type, entry.outcome, entry.extra["call"]) == ("kernel.time", "success", "clock_settime")
    assert (entry.extra["seconds"], entry.extra["nanoseconds"]) == (3600, 12)
    daemon = ROOT.replace("/usr/bin/kmod", "/usr/lib/systemd/systemd-timesyncd")
    tuned = (1333, "op=freq old=123 new=456")
    assert judged(call(305, "time", 5, daemon), tuned) is None, "how time servers steer the clock"
    assert judged(call(305, "time", 5, ROOT)) is None, "the clock was read"
    assert found(call(305, "time", 5, ROOT), tuned).extra["changes"] == ["op=freq old=123 new=456"]
    assert found(call(305, "time", 0, daemon), step, tuned).extra["seconds"] == 3600
    assert found(call(227, "time", -1, QEMU)).outcome == "failure"


def test_filters_crashes_and_packets() -> None:
    entry = found((1326, f"{QEMU} sig=31 arch=c000003e syscall=59 compat=0 ip=0x7f code=0x80000000"))
    assert (entry.type, entry.object.id, entry.extra["call"], entry.extra["signal"]) == (
        *("kernel.seccomp", UUID, "execve", 31),
    )
    entry = found((1701, f"{QEMU} sig=11 res=1"))
    assert (entry.type, entry.object.id, entry.extra["signal"]) == ("kernel.crash", UUID, 11)
    machines = Machines()
    machines.learn(70001, UUID)
    finding = judged((1324, "mark=0x11171 saddr=192.0.2.10 daddr=192.0.2.1 proto=6"), judge=Judge(machines, set))
    assert finding is not None and (finding.entry.type, finding.entry.object.id, finding.who) == (
        *("kernel.packet", UUID, UUID),
    )
    assert finding.entry.extra["network_component"] == "192.0.2.1" and finding.entry.extra["protocol"] == 6


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("op=set audit_pid=500 old=0 auid=4294967295 ses=4294967295 subj=unconfined res=1", None),
        ("op=set audit_pid=0 old=500 auid=4294967295 ses=4294967295 res=1", None),
        ('op=add_rule key="module" list=4 res=1', None),
        ("op=set audit_enabled=2 old=1 auid=4294967295 ses=4294967295 res=1", None),
        ("op=set audit_pid=666 old=0 auid=4294967295 ses=4294967295 res=1", "success"),
        ("op=set audit_enabled=0 old=2 auid=4294967295 ses=4294967295 res=0", "failure"),
        ("pid=666 uid=0 auid=4294967295 ses=4294967295 op=remove_rule audit_enabled=2 res=0", "failure"),
    ],
)
def test_changes_of_the_kernels_audit_that_are_not_ours(body: str, outcome: str | None) -> None:
    finding = judged((1305, body))
    assert (finding.entry.outcome if finding else None) == outcome
    if finding:
        assert finding.entry.type == "kernel.config" and "op=" in finding.entry.extra["change"]


# libvirt


def virt(type_: int, said: str, *, uid: int = 0, subj: str = "libvirtd", res: str = "success") -> tuple[int, str]:
    return type_, (
        f"pid=900 uid={uid} auid=4294967295 ses=4294967295 subj={subj} msg='virt=kvm {said} "
        f'exe="/usr/sbin/libvirtd" hostname=? addr=? terminal=? res={res}\''
    )


ABOUT = f'vm="vm1" uuid={UUID}'


def changes(*messages: tuple[int, str], gatherer: Gatherer | None = None) -> list[Change]:
    gatherer = gatherer or Gatherer(Machines())
    made = [change for message in messages for change in gatherer.take(event(message))]
    for change in made:
        EVENTS.check(msgspec.convert(msgspec.to_builtins(change.entry), Entry), "holdfast-kernel")
    return made


def test_a_start_has_its_resources() -> None:
    machines = Machines()
    messages = [
        virt(2502, f"{ABOUT} vm-ctx=+70001:kvm img-ctx=+70001:kvm model=dac"),
        virt(2502, f"{ABOUT} vm-ctx=libvirt-{UUID} img-ctx=libvirt-{UUID} model=apparmor"),
        virt(2501, f'resrc=cgroup reason=allow {ABOUT} cgroup="/x" class=path path="/dev/null" rdev=01:03 acl=rw'),
        virt(2501, f'resrc=disk reason=start {ABOUT} old-disk="?" new-disk="/var/lib/x.raw"'),
        virt(2501, f'resrc=net reason=start {ABOUT} old-net="?" new-net="52:54:00:00:00:01"'),
        virt(2501, f"resrc=mem reason=start {ABOUT} old-mem=0 new-mem=262144"),
        virt(2500, f"op=start reason=booted {ABOUT} vm-pid=4242"),
    ]
    (change,) = changes(*messages, gatherer=Gatherer(machines))
    assert change.asked == ("machine.start", "gate.probe") and change.time == 1700000000123
    entry = change.entry
    assert (entry.type, entry.outcome) == ("libvirt.control", "success")
    assert (entry.object.id, entry.object.name) == (UUID, "vm1")
    assert entry.extra == {
        "at": "2023-11-14T22:13:20Z",
        "serial": 9,
        "uid": 0,
        "pid": 900,
        "profile": "libvirtd",
        "operation": "start",
        "cause": "booted",
        "vm_pid": 4242,
        "resources": [
            "disk old-disk=? new-disk=/var/lib/x.raw",
            "net old-net=? new-net=52:54:00:00:00:01",
            "mem old-mem=0 new-mem=262144",
        ],
    }
    assert machines.of("", 70001) == UUID


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("op=stop reason=destroyed", True),
        ("op=stop reason=saved", True),
        ("op=start reason=restored", True),
        ("op=stop reason=shutdown", None),
        ("op=stop reason=failed", None),
        ("op=start reason=migrated", False),
        ("op=start reason=from-snapshot", False),
        ("op=else reason=booted", False),
        ("op=stop", False),
    ],
)
def test_what_needs_somebody_who_asked(said: str, asked: bool | None) -> None:
    (change,) = changes(virt(2500, f"{said} {ABOUT} vm-pid=0"))
    assert (None if change.asked is None else bool(change.asked)) == asked


@pytest.mark.parametrize("reason", ["attach", "detach", "update", "whatever"])
def test_a_running_guests_resources_are_never_changed_by_us(reason: str) -> None:
    (change,) = changes(virt(2501, f'resrc=disk reason={reason} {ABOUT} old-disk="?" new-disk="/etc/shadow"'))
    assert change.asked == () and change.entry.type == "libvirt.resource"
    assert change.entry.extra["resources"] == ["disk old-disk=? new-disk=/etc/shadow"]


@pytest.mark.parametrize("who", [{"uid": 905}, {"subj": "unconfined"}, {"subj": f"libvirt-{UUID}"}])
def test_who_speaks_in_libvirts_name_is_told(who: dict[str, Any]) -> None:
    (change,) = changes(virt(2500, f"op=start reason=booted {ABOUT} vm-pid=1", **who))
    assert (change.entry.type, change.entry.outcome) == ("libvirt.unasked", "failure")
    assert change.entry.reason == "another process spoke in libvirt's name"
    assert change.entry.actor.id == f"uid {who.get('uid', 0)}"


def test_what_libvirt_says_is_bounded() -> None:
    gatherer = Gatherer(Machines())
    for number in range(1000):
        about = f'vm="x" uuid={number:08x}-8a1b-4b7c-9f3e-0d2c4b6a8e10'
        assert not changes(virt(2501, f"resrc=mem reason=start {about} old-mem=0 new-mem=1"), gatherer=gatherer)
    for _ in range(100):
        changes(virt(2501, f'resrc=disk reason=start {ABOUT} new-disk="{"x" * 999}"'), gatherer=gatherer)
    (change,) = changes(virt(2500, f"op=start reason=booted {ABOUT} vm-pid=1"), gatherer=gatherer)
    assert len(change.entry.extra["resources"]) == 24 and max(map(len, change.entry.extra["resources"])) == 200
    assert len(gatherer._resources) < 257
