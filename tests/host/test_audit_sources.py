"""Second sources of the trail: the kernel's audit events and libvirt's, joined by machine and operation."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pytest

from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.waiting import poll
from tests.host.conftest import Guests
from tests.host.test_api import records

T = TypeVar("T")

pytestmark = pytest.mark.sfr("FAU_GEN.1")

_AS = """
import ctypes, os, socket
read, write = os.pipe()
child = os.fork()
if child == 0:
    said = "nothing"
    try:
        if argument.get("profile"):
            apparmor = ctypes.CDLL("libapparmor.so.1", use_errno=True)
            assert apparmor.aa_change_profile(argument["profile"].encode()) == 0, ctypes.get_errno()
        os.setgroups(argument["groups"]); os.setgid(argument["uid"]); os.setuid(argument["uid"])
        said = "worked"
        exec(argument["code"])
    except OSError as error:
        said = os.strerror(error.errno)
    except BaseException as error:
        said = repr(error)
    os.write(write, said.encode())
    os._exit(0)
os.close(write)
data = b""
while chunk := os.read(read, 65536):
    data += chunk
os.waitpid(child, 0)
result = data.decode()
"""
"""Runs Python code as another user and in another AppArmor profile; says "worked", or why not."""

_DESTROY = """
import libvirt
connection = libvirt.open("qemu:///system")
connection.lookupByUUIDString(argument).destroy()
connection.close()
result = True
"""


def act(host: Host, code: str, uid: int, profile: str = "", *, groups: tuple[int, ...] = ()) -> str:
    """What came of code that a process of that user, in that profile, ran."""
    who = {"code": code, "uid": uid, "profile": profile, "groups": groups}
    return str(host.agent.python(_AS, who, seconds=120))


class Trail:
    """The audit trail, read by an administrator, and waited for."""

    def __init__(self, host: Host, api: Api) -> None:
        self._host = host
        self._api = api

    def of(self, *types: str, about: str = "") -> list[dict[str, Any]]:
        """The records of some types, those about one machine if given by its UUID."""
        return [r for r in records(self._api) if r["type"] in types and about in ("", r["object"]["id"])]

    def newest(
        self, type: str, about: str = "", fits: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> dict[str, Any]:
        """The newest record of a type, about a machine, that fits, once it is there."""
        return self.until(lambda: next((r for r in reversed(self.of(type, about=about)) if fits(r)), None), type)

    def until(self, condition: Callable[[], T | None], what: str) -> T:
        """Wait for a condition. Raises: Expired."""
        return poll(condition, 30 * self._host.acceleration.scale, what)


@pytest.fixture
def trail(host: Host, admin: Api) -> Trail:
    """The host's trail."""
    return Trail(host, admin)


def reader(host: Host) -> int:
    """The process id of the reader."""
    shown = host.agent.exec(["systemctl", "show", "--property=MainPID", "--value", "holdfast-kernel.service"])
    return int(shown.out)


def names(path: str, record: dict[str, Any]) -> bool:
    """Whether a record is about a file."""
    return bool(record["extra"].get("path") == path)


def counted(found: list[dict[str, Any]]) -> int:
    """How many events records stand for, with those that were left out."""
    return sum(1 + record["extra"].get("suppressed", 0) for record in found)


def check(api: Api, name: str) -> dict[str, Any]:
    """One check of the host's health."""
    checks: list[dict[str, Any]] = api.call("GET", "/v1/health")["checks"]
    return next(one for one in checks if one["name"] == name)


def test_the_reader_is_registered_and_a_quiet_host_is_quiet(admin: Api, trail: Trail) -> None:
    """From the start on it reads; nothing was lost, and nothing of what a host does by itself looks like an attack."""
    assert check(admin, "kernel-audit")["ok"], check(admin, "kernel-audit")
    started = trail.newest("kernel.start")
    assert started["outcome"] == "success" and started["extra"]["rules"] > 5, started
    assert started["producer"] == {"uid": 909, "unit": "holdfast-kernel"}
    # The test agent sets the clock of a host that goes on from a checkpoint.
    expected = ("kernel.start", "kernel.module", "kernel.time", "libvirt.control")
    sources = ("kernel.", "libvirt.")
    assert [r for r in records(admin) if r["type"].startswith(sources) and r["type"] not in expected] == []


@pytest.mark.sfr("FDP_PPR_EXT.1", "FDP_VNC_EXT.1")
def test_what_a_captured_qemu_tries_is_on_record_with_its_machine(host: Host, guests: Guests, trail: Trail) -> None:
    """A process with a guest's user and profile opens foreign files, a network connection, a program, another user."""
    view = guests.run("vm1")
    other = guests.run("vm2")
    assert trail.of("kernel.open", "kernel.denied", "kernel.exec") == [], "a guest that only starts tries nothing"
    uid, profile = view["uid"], f"libvirt-{view['uuid']}"
    for path in ("/etc/shadow", f"/var/lib/holdfast/core/nvram/{other['uuid']}.fd"):
        assert act(host, f"os.open({path!r}, os.O_RDONLY)", uid, profile) == "Permission denied"
        record = trail.newest("kernel.open", view["uuid"], partial(names, path))
        assert record["object"] == {"kind": "machine", "id": view["uuid"], "name": ""}, record
        assert record["outcome"] == "failure" and record["actor"]["id"] == f"uid {uid}", record
        assert record["extra"]["error"] == "EACCES" and record["extra"]["profile"] == profile, record
        assert record["extra"]["serial"] > 0 and record["extra"]["pid"] > 0, record
    # A file that everybody may read, but for AppArmor.
    assert act(host, "os.open('/etc/fstab', os.O_RDONLY)", uid, profile) == "Permission denied"
    record = trail.newest("kernel.denied", view["uuid"], partial(names, "/etc/fstab"))
    assert record["extra"]["policy"] == f"AppArmor profile {profile}" and record["extra"]["operation"] == "open", record
    assert record["extra"]["denied"] == "r" and record["outcome"] == "failure", record
    act(host, "socket.create_connection(('127.0.0.1', 8443), 3)", uid, profile)
    record = trail.newest("kernel.denied", view["uuid"], lambda r: "network_component" in r["extra"])
    assert record["extra"]["network_component"].startswith("inet"), record
    assert act(host, "os.execv('/usr/bin/dash', ['dash', '-c', 'true'])", uid, profile) == "Permission denied"
    record = trail.newest("kernel.denied", view["uuid"], partial(names, "/usr/bin/dash"))
    assert record["extra"]["operation"] == "exec", record
    assert act(host, "os.setuid(0)", uid, profile) == "Operation not permitted"
    record = trail.newest("kernel.identity", view["uuid"])
    assert record["extra"]["call"] in ("setuid", "setresuid") and record["extra"]["error"] == "EPERM", record


@pytest.mark.sfr("FDP_VNC_EXT.1", "FPT_EEM_EXT.1")
def test_what_a_guests_user_does_without_its_profile_is_on_record(host: Host, guests: Guests, trail: Trail) -> None:
    """Should AppArmor fail: its packets are dropped, its programs and crashes recorded, by the machine's uid."""
    view = guests.run("vm1")
    act(host, "socket.create_connection(('127.0.0.1', 8443), 3)", view["uid"])
    record = trail.newest("kernel.packet", view["uuid"])
    assert record["extra"]["uid"] == view["uid"] and record["extra"]["network_component"] == "127.0.0.1", record
    assert record["extra"]["protocol"] == 6 and record["extra"]["policy"] == "packet filter, chain output", record
    act(host, "os.execv('/usr/bin/dash', ['dash', '-c', 'true'])", view["uid"])
    record = trail.newest("kernel.exec", view["uuid"])
    assert record["extra"]["arguments"][:2] == ["dash", "-c"] and record["outcome"] == "success", record
    act(host, "os.abort()", view["uid"])
    record = trail.newest("kernel.crash", view["uuid"])
    assert record["extra"]["signal"] == 6, record


def test_modules_and_the_clock(host: Host, trail: Trail) -> None:
    """Loading a module, failing to, and setting the clock are records with who did it."""
    host.agent.exec(["modprobe", "dummy"])
    record = trail.newest("kernel.module", fits=lambda r: r["extra"].get("module") == "dummy")
    assert record["outcome"] == "success" and record["actor"]["id"] == "uid 0", record
    assert record["extra"]["program"] == "/usr/bin/kmod" and record["extra"]["call"].endswith("init_module"), record
    failed = len([r for r in trail.of("kernel.module") if r["outcome"] == "failure"])
    # --force strips what the signature covers.
    assert host.agent.exec(["modprobe", "--force", "ifb"], check=False).rc != 0
    trail.until(lambda: len([r for r in trail.of("kernel.module") if r["outcome"] == "failure"]) > failed, "a failure")
    host.agent.python("import time; time.clock_settime(time.CLOCK_REALTIME, argument)", time.time() + 3600)
    record = trail.newest("kernel.time", fits=lambda r: 3500 < r["extra"].get("seconds", 0) < 3700)
    assert record["outcome"] == "success" and record["extra"]["call"] == "clock_settime", record
    host.agent.set_clock()
    trail.newest("kernel.time", fits=lambda r: r["extra"].get("seconds", 0) < -3500)


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_what_is_done_behind_the_service_shows_and_what_goes_through_it_does_not(
    host: Host, admin: Api, guests: Guests, trail: Trail
) -> None:
    """The same end of a guest by the API carries the call's request; by root's hand at libvirt it is unasked."""

    def request(type: str) -> str:
        return str([r for r in trail.of(type) if r["phase"] == "intent"][-1]["request"])

    def did(operation: str) -> Callable[[dict[str, Any]], bool]:
        return lambda record: bool(record["extra"]["operation"] == operation)

    uuid = guests.run("vm1")["uuid"]
    record = trail.newest("libvirt.control", uuid, did("start"))
    assert record["request"] == request("machine.start") and record["extra"]["cause"] == "booted", record
    assert record["object"]["name"] == "vm1" and record["extra"]["vm_pid"] == guests.process(uuid), record
    assert any(resource.startswith("disk ") for resource in record["extra"]["resources"]), record
    admin.call("POST", "/v1/machines/vm1/force-off", seconds=60)
    record = trail.newest("libvirt.control", uuid, did("stop"))
    assert record["request"] == request("machine.force-off") and record["extra"]["cause"] == "destroyed", record
    admin.call("POST", "/v1/machines/vm1/start", seconds=60)
    trail.until(lambda: len(trail.of("libvirt.control", about=uuid)) == 3, "the second start")
    assert trail.of("libvirt.unasked") == []
    # An open console is an operation, too, but none that ends guests.
    console = admin.console("vm1")
    host.agent.python(_DESTROY, uuid, seconds=60)
    record = trail.newest("libvirt.unasked", uuid)
    console.close()
    assert (record["outcome"], record["request"]) == ("failure", ""), record
    assert (record["extra"]["operation"], record["extra"]["cause"]) == ("stop", "destroyed"), record
    assert record["reason"] == "nobody asked the service for it" and record["object"]["name"] == "vm1", record


def test_nobody_speaks_in_libvirts_name_nor_changes_the_kernels_audit(host: Host, admin: Api, trail: Trail) -> None:
    """Root's message of libvirt's kind is told from libvirt's own; rules and reader are locked, attempts recorded."""
    outcome = host.agent.python(
        """
import os, socket, struct

def ask(type_, payload):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9) as audit:
        audit.settimeout(5)
        audit.sendto(struct.pack("=IHHII", 16 + len(payload), type_, 5, 1, 0) + payload, (0, 0))
        while True:
            data = audit.recv(9000)
            if struct.unpack_from("=IHHII", data)[1] == 2:
                return struct.unpack_from("=i", data, 16)[0]

def status(mask, enabled, pid):
    return struct.pack("=10I", mask, enabled, 0, pid, 0, 0, 0, 0, 0, 0)

said = b"virt=kvm op=start reason=booted vm=\\"x\\" uuid=00000000-0000-4000-8000-000000000000 vm-pid=1 res=success\\0"
result = {
    "disable": ask(1001, status(1, 0, 0)),
    "take over": ask(1001, status(4, 0, os.getpid())),
    "end": ask(1001, status(4, 0, 0)),
    "rule": ask(1012, struct.pack("=3I64I", 4, 2, 0, *[0] * 64) + bytes(772)),
    "forge": ask(2500, said),
}
"""
    )
    assert outcome["forge"] == 0
    assert {name for name, code in outcome.items() if code == 0} == {"forge"}, outcome
    record = trail.newest("libvirt.unasked")
    assert record["reason"] == "another process spoke in libvirt's name", record
    assert record["object"]["id"] == "00000000-0000-4000-8000-000000000000" and record["extra"]["uid"] == 0, record
    record = trail.newest("kernel.config", fits=lambda r: "audit_enabled=0" in r["extra"]["change"])
    assert record["outcome"] == "failure" and record["reason"] == "the kernel refused it", record
    assert check(admin, "kernel-audit")["ok"]


@pytest.mark.sfr("FAU_STG_EXT.1")
def test_a_killed_reader_comes_back_and_what_happened_meanwhile_is_there(
    host: Host, admin: Api, guests: Guests, trail: Trail
) -> None:
    """systemd starts it again, it is the kernel's reader again, and the kernel kept the events in between."""
    view = guests.run("vm1")
    before = reader(host)
    host.agent.exec(["systemctl", "stop", "holdfast-kernel.service"], seconds=60)
    health = check(admin, "kernel-audit")
    assert not health["ok"] and "does not run" in health["detail"], health
    act(host, "os.open('/etc/shadow', os.O_RDONLY)", view["uid"])
    host.agent.exec(["systemctl", "start", "holdfast-kernel.service"], seconds=60)
    record = trail.newest("kernel.open", fits=lambda r: r["actor"]["id"] == f"uid {view['uid']}")
    assert record["extra"]["path"] == "/etc/shadow", record
    again = reader(host)
    host.agent.exec(["systemctl", "kill", "--signal=KILL", "holdfast-kernel.service"])
    act(host, "os.open('/etc/gshadow', os.O_RDONLY)", view["uid"])
    trail.until(lambda: reader(host) not in (0, before, again), "another reader")
    trail.newest("kernel.open", fits=partial(names, "/etc/gshadow"))
    starts = trail.of("kernel.start")
    assert [r["extra"]["again"] for r in starts] == [False, True, True], starts
    assert {r["outcome"] for r in starts} == {"success"}, starts
    assert len(trail.of("kernel.stop")) == 1
    trail.until(lambda: check(admin, "kernel-audit")["ok"], "health")


@pytest.mark.sfr("FAU_STG_EXT.1")
def test_a_flood_is_counted_and_hides_nobody_else(host: Host, guests: Guests, trail: Trail) -> None:
    """One machine's process is refused thousands of times; the trail has few records of it, and another's at once."""
    view, other = guests.run("vm1"), guests.run("vm2")
    flood = """
for turn in range(5000):
    try:
        os.open('/etc/shadow', os.O_RDONLY)
    except OSError:
        pass
"""
    assert act(host, flood, view["uid"], f"libvirt-{view['uuid']}") == "worked"
    act(host, "os.open('/etc/shadow', os.O_RDONLY)", other["uid"], f"libvirt-{other['uuid']}")
    trail.newest("kernel.open", other["uuid"])
    trail.until(lambda: counted(trail.of("kernel.open", about=view["uuid"])) >= 5000 or None, "all are counted")
    written = trail.of("kernel.open", about=view["uuid"])
    assert counted(written) == 5000 and len(written) < 50, len(written)
    assert trail.of("kernel.lost") == []


@pytest.mark.sfr("FIA_UIA_EXT.1")
def test_requests_without_a_certificate_are_on_record(host: Host, trail: Trail) -> None:
    """Who asks for more than the banner without a certificate: from where, for what; many become few with a count."""
    stranger = host.api()
    assert stranger.request("POST", "/v1/machines/secret/start").status == 401
    record = trail.newest("api.unauthenticated")
    assert (record["outcome"], record["reason"]) == ("failure", "no client certificate"), record
    assert record["extra"] == {"verb": "POST", "path": "/v1/machines/secret/start"}, record
    assert record["actor"]["id"] == "-" and record["actor"]["origin"].rpartition(":")[0], record
    assert record["producer"]["unit"] == "holdfast-api" and record["request"], record
    for _ in range(20):
        assert stranger.request("GET", "/v1/machines").status == 401
    trail.until(lambda: counted(trail.of("api.unauthenticated")) == 21 or None, "all are counted")
    assert len(trail.of("api.unauthenticated")) < 21


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_who_may_not_call_the_updater_is_refused_on_record(host: Host, trail: Trail) -> None:
    """The console's user gets as far as the updater's socket, and no further."""
    code = """
import json, struct
client = socket.socket(socket.AF_UNIX)
client.settimeout(60)
client.connect("/run/holdfast/update/update.sock")
call = json.dumps({"method": "apply", "params": {}}).encode()
client.sendall(struct.pack(">cI", b"Q", len(call)) + call)
answer = client.recv(4096)
assert answer[:1] == b"P" and b"may not use the updater" in answer, answer
"""
    assert act(host, code, 905, groups=(900,)) == "worked"
    record = trail.newest("update.foreign-peer")
    assert (record["actor"]["id"], record["outcome"]) == ("uid 905", "failure"), record
    assert record["extra"] == {"method": "apply"} and "may not use the updater" in record["reason"], record
