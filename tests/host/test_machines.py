"""Guests: their life, their console, their confinement."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.linux import GUEST_PROMPT, GUEST_READY
from tests.harness.api import Api, ApiError
from tests.harness.host import Host
from tests.harness.waiting import Expired
from tests.host.conftest import Guests
from vmm.process import run

QEMU_FACTS = """
import os, pathlib
folder = pathlib.Path("/proc", str(argument))
status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
scope = (folder / "cgroup").read_text().strip().split("::")[1]
levels = [pathlib.Path("/sys/fs/cgroup", *pathlib.Path(scope).parts[1:end]) for end in (3, 4)]
result = {
    "uid": status["Uid"].split(), "seccomp": status["Seccomp"].strip(), "groups": status["Groups"].split(),
    "caps": status["CapEff"].strip(), "no_new_privs": status["NoNewPrivs"].strip(),
    "label": (folder / "attr/current").read_text().strip(),
    "dev": sorted(os.listdir(folder / "root/dev")),
    "limits": {name: [(level / name).read_text().split()[0] for level in levels if (level / name).exists()]
               for name in ("memory.max", "cpu.max", "pids.max")},
    "core": [line for line in (folder / "limits").read_text().splitlines() if "core file" in line],
    "command": (folder / "cmdline").read_bytes().replace(b"\\0", b" ").decode(),
}
"""


@pytest.mark.sfr("FMT_MOF_EXT.1", "FTP_UIF_EXT.1")
def test_a_linux_guest_lives_its_life(admin: Api, guests: Guests) -> None:
    """Created, started, listed, watched on its console, stopped by ACPI, deleted."""
    view = guests.create("vm1")
    assert view["state"] == "stopped"
    assert admin.call("POST", "/v1/machines/vm1/start", seconds=60)["state"] == "running"
    assert [(m["name"], m["state"]) for m in admin.call("GET", "/v1/machines")] == [("vm1", "running")]
    console = admin.console("vm1")
    console.expect(GUEST_READY, 60)
    console.close()
    console = guests.shell("vm1")
    assert "Linux" in console.run("uname -a", GUEST_PROMPT)
    assert "kvm" not in console.run(
        "cat /sys/devices/system/clocksource/clocksource0/available_clocksource", GUEST_PROMPT
    )
    console.close()
    admin.call("DELETE", "/v1/machines/vm1", expect=409)
    assert admin.call("POST", "/v1/machines/vm1/stop", seconds=90)["state"] == "stopped"
    admin.call("DELETE", "/v1/machines/vm1")
    admin.call("DELETE", "/v1/volumes/vm1-disk")
    assert admin.call("GET", "/v1/machines") == []
    assert admin.call("GET", "/v1/volumes") == []


@pytest.mark.sfr("FDP_VMS_EXT.1", "FPT_EEM_EXT.1", "FPT_VIV_EXT.1", "FPT_HAS_EXT.1")
def test_a_guests_process_is_confined(host: Host, admin: Api, guests: Guests) -> None:
    """Two guests run under users of their own, without capabilities, each in its AppArmor profile, seccomp filter,
    private /dev and limited cgroup, on KVM; their files belong to them while they run and to nobody else's guest."""
    views = [guests.run("vm1"), guests.run("vm2")]
    facts = [host.agent.python(QEMU_FACTS, guests.process(view["uuid"])) for view in views]
    for view, fact in zip(views, facts, strict=True):
        assert fact["uid"] == [str(view["uid"])] * 4
        assert 70000 <= view["uid"] <= 79999
        assert int(fact["caps"], 16) == 0
        assert fact["seccomp"] == "2"
        assert fact["no_new_privs"] == "1"
        assert fact["label"] == f"libvirt-{view['uuid']} (enforce)"
        assert set(fact["dev"]) <= {
            "null", "full", "zero", "random", "urandom", "ptmx", "kvm", "pts", "shm", "mqueue", "hugepages",
            "net", "vhost-net",
        }, fact["dev"]  # fmt: skip
        # libvirt sets some on the guest's scope and some on the group that it makes inside.
        for name, values in fact["limits"].items():
            assert any(value != "max" for value in values), (name, values)
        assert fact["core"][0].split()[4:6] == ["0", "0"]
        assert "-accel kvm" in fact["command"]
    assert facts[0]["uid"] != facts[1]["uid"]
    owners = host.agent.python(
        """
import os, pathlib
core = pathlib.Path("/var/lib/holdfast/core")
result = sorted([s.st_uid, s.st_mode & 0o777] for p in core.glob("*/*") if (s := p.stat()).st_uid >= 70000)
"""
    )
    assert owners == sorted([view["uid"], 0o600] for view in views for _ in ("disk", "variables"))


@pytest.mark.sfr("FDP_VMS_EXT.1", "FDP_PPR_EXT.1")
def test_a_captured_qemu_reaches_nothing(host: Host, admin: Api, guests: Guests) -> None:
    """A process that takes on a guest's user and AppArmor profile opens no other guest's disk, no account file,
    no socket of libvirt or core, and no network connection."""
    view = guests.run("vm1")
    other = guests.run("vm2")
    outcome = host.agent.python(
        """
import ctypes, os, socket
read, write = os.pipe()
child = os.fork()
if child == 0:
    library = ctypes.CDLL(None, use_errno=True)
    apparmor = ctypes.CDLL("libapparmor.so.1", use_errno=True)
    assert apparmor.aa_change_profile(("libvirt-" + argument["uuid"]).encode()) == 0, ctypes.get_errno()
    os.setgroups([]); os.setgid(argument["uid"]); os.setuid(argument["uid"])
    tried = {}
    def attempt(name, action):
        try:
            action()
            tried[name] = "worked"
        except OSError as error:
            tried[name] = os.strerror(error.errno) if error.errno else str(error)
    for path in argument["paths"]:
        attempt(path, lambda: os.close(os.open(path, os.O_RDONLY)))
    for path in ("/run/libvirt/libvirt-sock", "/run/holdfast/core/core.sock", "/run/holdfast/audit/audit.sock"):
        attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path))
    attempt("tcp", lambda: socket.create_connection(("127.0.0.1", 8443), 3))
    attempt("exec", lambda: os.execv("/usr/bin/dash", ["dash"]))
    os.write(write, repr(tried).encode())
    os._exit(0)
os.close(write)
data = b""
while chunk := os.read(read, 65536):
    data += chunk
os.waitpid(child, 0)
result = data.decode()
""",
        {
            "uuid": view["uuid"],
            "uid": view["uid"],
            "paths": [
                "/etc/shadow",
                "/etc/passwd",
                "/var/lib/holdfast/api/server.key",
                "/var/lib/holdfast/core/core.db",
                f"/var/lib/holdfast/core/nvram/{other['uuid']}.fd",
            ],
        },
    )
    assert outcome, "the captured process said nothing"
    assert "worked" not in outcome, outcome
    assert outcome.count("Permission denied") >= 8, outcome


@pytest.mark.sfr("FMT_SMO_EXT.1", "FDP_VNC_EXT.1")
def test_a_guest_cannot_reach_the_host(host: Host, admin: Api, guests: Guests) -> None:
    """On an operational network nothing answers for the host: no ARP, no ping, no API; the wire hears the guest."""
    guests.run("vm1", networks=["lan"])
    wire = host.link
    console = guests.shell("vm1")
    console.run("net 10.0.2.99/24", GUEST_PROMPT)
    console.send("ping -c 3 -w 5 10.0.2.15\n")
    console.expect(r"0 packets received|0 received|100% packet loss", 30)
    console.send("nc -w 3 10.0.2.15 8443 </dev/null && echo REACHED || echo UNREACHED\n")
    console.expect("UNREACHED", 30)
    asked = bytes.fromhex("08060001080006040001")
    frame = wire.receive(30, matches=lambda data: asked in data and bytes([10, 0, 2, 15]) in data)
    assert frame[:6] == b"\xff" * 6
    wire.send(
        b"\xff" * 6 + bytes.fromhex("525400aabbcc") + asked + bytes.fromhex("525400aabbcc")
        + bytes([10, 0, 2, 98]) + bytes(6) + bytes([10, 0, 2, 15]) + bytes(18)
    )  # fmt: skip
    answer = bytes.fromhex("08060001080006040002")
    with pytest.raises(Expired):
        wire.receive(3, matches=lambda data: answer in data)
    console.close()


@pytest.mark.sfr("FPT_HAS_EXT.1")
def test_without_kvm_a_start_is_refused(host: Host, admin: Api, guests: Guests) -> None:
    """A host whose processor lost its hardware assist starts no guest, and says why."""
    guests.create("vm1")
    host.agent.exec(["modprobe", "--remove", "kvm_amd"])
    with pytest.raises(ApiError, match=r"503.*/dev/kvm"):
        admin.call("POST", "/v1/machines/vm1/start")
    assert admin.call("GET", "/v1/machines/vm1")["state"] == "stopped"


@pytest.mark.sfr("FDP_PPR_EXT.1")
def test_hostile_images_are_refused(host: Host, admin: Api, workdir: Path) -> None:
    """An image that leads to another file, or lies about itself, leaves nothing behind."""
    base = workdir / "base.raw"
    base.write_bytes(bytes(1 << 20))
    backing, data, cut = workdir / "backing.qcow2", workdir / "data.qcow2", workdir / "cut.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", backing, "1M"])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={base},data_file_raw=on", data, "1M"])
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, cut])
    cut.write_bytes(cut.read_bytes()[:70000])
    for path, reason in ((backing, "backing"), (data, "data"), (cut, ""), (base, "qcow2")):
        answer = admin.request("PUT", "/v1/volumes/evil/content?format=qcow2", path.read_bytes(), seconds=60)
        assert answer.status // 100 == 4, (path, answer)
        assert reason in answer.json()["detail"], answer
    assert admin.call("GET", "/v1/volumes") == []
    left = host.agent.python(
        "import os; result = [f for d in ('volumes', 'staging') for f in os.listdir('/var/lib/holdfast/core/' + d)]"
    )
    assert left == []


def test_a_qcow2_image_is_imported_as_it_reads(host: Host, admin: Api, workdir: Path) -> None:
    """The raw volume holds what the qcow2 image held, and zeros beyond."""
    content = bytes(range(256)) * 4096
    raw, packed = workdir / "in.raw", workdir / "in.qcow2"
    raw.write_bytes(content)
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, packed])
    query = f"format=qcow2&size={2 << 20}"
    view = admin.call("PUT", f"/v1/volumes/v1/content?{query}", packed.read_bytes(), seconds=60)
    assert view["size"] == 2 << 20
    stored = host.agent.read(f"/var/lib/holdfast/core/volumes/{view['uuid']}.raw")
    assert stored == content + bytes((2 << 20) - len(content))


def test_guests_run_on_while_the_services_restart(host: Host, admin: Api, guests: Guests) -> None:
    """Core and libvirt are killed; the same QEMU goes on, is found again, and obeys."""
    view = guests.run("vm1")
    before = guests.process(view["uuid"])
    host.agent.exec(["systemctl", "kill", "--signal=KILL", "libvirtd.service"])
    host.agent.exec(["systemctl", "kill", "--signal=KILL", "holdfast-core.service"])
    host.agent.exec(["systemctl", "restart", "libvirtd.service", "holdfast-core.service"], seconds=90)
    assert admin.call("GET", "/v1/machines/vm1", seconds=60)["state"] == "running"
    assert guests.process(view["uuid"]) == before
    assert admin.call("POST", "/v1/machines/vm1/force-off", seconds=60)["state"] == "stopped"
