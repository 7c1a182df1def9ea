"""Health and version out of made-up /proc, /sys and /dev trees, and the watch over unknown domains."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from tests.unit.test_core_rig import FakeAudit, Rig, make_host
from vmm import wire
from vmm.audit.client import AuditClient, Entry
from vmm.core import version
from vmm.core.daemon import Watch
from vmm.core.export import Exports, Server, View
from vmm.core.health import Platform, judge
from vmm.export.status import ServerStatus, Status
from vmm.guard import status as guard
from vmm.hypervisor.types import Domain, State
from vmm.kernel.daemon import Said

SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
GOOD = {
    "sys/module/apparmor/parameters/enabled": "Y\n",
    "proc/77/comm": "libvirtd\n",
    "proc/77/attr/current": "libvirtd (enforce)\n",
    "sys/devices/system/cpu/smt/active": "0\n",
    "sys/devices/system/cpu/vulnerabilities/meltdown": "Not affected\n",
    "sys/devices/system/cpu/vulnerabilities/spectre_v2": "Mitigation: Retpolines; SMT vulnerable\n",
    "sys/kernel/mm/ksm/run": "0\n",
    "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
    SECURE_BOOT: "\x06\0\0\0\x01",
    "sys/class/tpm/tpm0/tpm_version_major": "2\n",
    # The last line is how a unit's InaccessiblePaths= looks.
    "proc/self/mountinfo": """\
22 1 254:0 / / ro,relatime - erofs /dev/mapper/root ro
30 22 254:1 / /var rw,relatime - ext4 /dev/mapper/data rw
31 30 254:2 / /var/lib/holdfast-audit rw,relatime - ext4 /dev/mapper/audit rw
40 31 0:24 /systemd/inaccessible/dir /var/lib/holdfast-audit ro - tmpfs tmpfs rw
""",
    "sys/dev/block/254:1/dm/uuid": "CRYPT-LUKS2-0123-data\n",
    "sys/dev/block/254:2/dm/uuid": "CRYPT-LUKS2-4567-audit\n",
    "sys/dev/block/254:0/dm/uuid": "CRYPT-VERITY-89ab-root\n",
}


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_host(tmp_path)
    for path, text in GOOD.items():
        put(tmp_path, path, text)
    put(tmp_path, "run/holdfast/kernel/status.json", kernel_status())
    put(tmp_path, "run/holdfast/guard/status.json", guard_status())
    return tmp_path


def kernel_status(**said: Any) -> str:
    """What the reader of the kernel's audit leaves for others: it is process 77's, too, as good as any."""
    status = Said(int(time.monotonic()), 77, "", 5, 0, (77,))
    return msgspec.json.encode(msgspec.structs.replace(status, **said)).decode()


def guard_status(**said: Any) -> str:
    """What the guard leaves for others."""
    status = guard.Status(int(time.monotonic()), 77, 5)
    return msgspec.json.encode(msgspec.structs.replace(status, **said)).decode()


def bad(root: Path) -> dict[str, str]:
    health = judge(Platform(root).verdicts())
    assert (health.status == "ok") == all(check.ok for check in health.checks)
    return {check.name: check.detail for check in health.checks if not check.ok}


def test_a_host_as_it_should_be(root: Path) -> None:
    assert bad(root) == {}


@pytest.mark.parametrize(
    ("path", "text", "check"),
    [
        ("sys/module/apparmor/parameters/enabled", "N\n", "apparmor"),
        ("proc/77/attr/current", "libvirtd (complain)\n", "apparmor"),
        ("proc/77/comm", "other\n", "apparmor"),
        ("sys/devices/system/cpu/smt/active", "1\n", "smt"),
        ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable: no microcode\n", "vulnerabilities"),
        ("sys/devices/system/cpu/vulnerabilities/itlb", "KVM: Vulnerable\n", "vulnerabilities"),
        ("sys/kernel/mm/ksm/run", "1\n", "ksm"),
        ("sys/kernel/security/lockdown", "[none] integrity confidentiality\n", "lockdown"),
        (SECURE_BOOT, "\x06\0\0\0\0", "secure-boot"),
        ("sys/class/tpm/tpm0/tpm_version_major", "1\n", "tpm"),
        ("sys/module/kvm_amd/parameters/npt", "N\n", "kvm"),
        ("sys/dev/block/254:2/dm/uuid", "LVM-0123\n", "volumes-encrypted"),
        ("sys/dev/block/254:1/dm/uuid", "CRYPT-PLAIN-data\n", "volumes-encrypted"),
    ],
)
def test_each_fault_is_found(root: Path, path: str, text: str, check: str) -> None:
    put(root, path, text)
    assert list(bad(root)) == [check]


def test_a_reader_of_the_kernels_audit_that_is_not_there_is_found(root: Path) -> None:
    """Dead, hanging, not the kernel's reader, without a status or with a damaged one."""
    for said, reason in (
        ({"pid": 79}, "does not run"),
        ({"at": int(time.monotonic()) - 61}, "does not run"),
        ({"problem": "the kernel's audit does not take us for its reader: File exists"}, "File exists"),
    ):
        put(root, "run/holdfast/kernel/status.json", kernel_status(**said))
        assert list(found := bad(root)) == ["kernel-audit"] and reason in found["kernel-audit"]
    put(root, "run/holdfast/kernel/status.json", "{")
    assert list(bad(root)) == ["kernel-audit"]
    (root / "run/holdfast/kernel/status.json").unlink()
    assert bad(root) == {"kernel-audit": "the reader of the kernel's audit events does not run"}


def test_a_guard_that_does_not_follow_the_trail_is_found(root: Path) -> None:
    """Dead, hanging, held up, without a status or with a damaged one."""
    path = "run/holdfast/guard/status.json"
    for said, reason in (
        ({"pid": 79}, "does not run"),
        ({"at": int(time.monotonic()) - 61}, "does not run"),
        ({"problem": "core went away"}, "core went away"),
    ):
        put(root, path, guard_status(**said))
        assert list(found := bad(root)) == ["guard"] and reason in found["guard"]
    put(root, path, "{")
    assert list(bad(root)) == ["guard"]
    (root / path).unlink()
    assert bad(root) == {"guard": "the guard does not run"}


def test_what_cannot_be_read_has_failed(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    # Page merging may be missing from a kernel, servers of the trail from a configuration; everything else may not.
    missing = {"ksm", "audit-export"}
    assert set(bad(tmp_path)) == Platform(tmp_path).verdicts().keys() - missing


def test_an_export_that_is_wanted_and_behind_is_found(root: Path) -> None:
    """Not running, or with a server that cannot be had; the view for administrators says the same."""

    async def view() -> View:
        audit = FakeAudit()
        async with await wire.serve(root / "audit.sock", audit.handle):
            audit.entries = [Entry(type="version.read")] * 9
            return await Exports(AuditClient(root / "audit.sock"), root).show()

    assert asyncio.run(view()) == View(9, "", "", ())
    put(root, "run/holdfast/export.json", "{}")
    assert bad(root) == {"audit-export": "the export does not run"}
    assert asyncio.run(view()) == View(9, "", "the export does not run", ())
    one = ServerStatus("192.0.2.9:6514", "logs", "idle", 1000, 7, 5, "")
    said = Status(int(time.monotonic()), 77, "pem", (one,))
    put(root, "run/holdfast/export/status.json", msgspec.json.encode(said).decode())
    assert bad(root) == {}
    assert asyncio.run(view()) == View(9, "pem", "", (Server("192.0.2.9:6514", "logs", "idle", 1000, 2, 7, 5, ""),))
    said = Status(said.at, 77, "pem", (one, msgspec.structs.replace(one, server="192.0.2.8:1", problem="refused")))
    put(root, "run/holdfast/export/status.json", msgspec.json.encode(said).decode())
    assert bad(root) == {"audit-export": "192.0.2.8:1: refused"}
    for state, since, found in (
        ("sending", 601, {"audit-export": "192.0.2.9:6514: behind for more than 10 minutes"}),
        ("sending", 590, {}),
        ("idle", 601, {}),
    ):
        behind = msgspec.structs.replace(one, state=state, since=int(time.time()) - since)
        said = Status(said.at, 77, "pem", (behind,))
        put(root, "run/holdfast/export/status.json", msgspec.json.encode(said).decode())
        assert bad(root) == found


HASH = "0123456789abcdef" * 4


def test_version_and_slot(tmp_path: Path) -> None:
    put(tmp_path, "etc/os-release", 'ID=debian\nIMAGE_ID=holdfast\nIMAGE_VERSION="1.2.3"\n')
    put(tmp_path, "proc/cmdline", f"quiet roothash={HASH} lockdown=integrity\n")
    assert version.read(tmp_path) == version.Version("holdfast", "1.2.3", "", HASH)
    for number, slot in (("2", "a"), ("5", "b"), ("6", "b")):
        put(tmp_path, "sys/class/block/vda2/partition", f"{number}\n")
        put(tmp_path, "sys/class/block/dm-0/dm/name", "root\n")
        put(tmp_path, "sys/class/block/dm-0/slaves/vda2", "")
        assert version.read(tmp_path).slot == slot
    put(tmp_path, "proc/cmdline", "quiet\n")
    assert version.read(tmp_path) == version.Version("holdfast", "1.2.3", "", "")


def test_an_unknown_domain_is_reported_once_recorded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("core")

    async def watch() -> None:
        rig, audit = Rig(directory), FakeAudit()
        server = await wire.serve(directory / "audit.sock", audit.handle)
        watch = Watch(Platform(root), rig.hypervisor, rig.machines, AuditClient(directory / "audit.sock"))
        assert (await watch.health()).status == "ok"
        stranger = Domain(uuid4(), "stranger", State.RUNNING, None, None)
        rig.hypervisor.domains[stranger.uuid] = stranger
        audit.refuse_from = 0
        assert (await watch.health()).status == "degraded"
        audit.refuse_from = 9
        for _ in range(2):
            failed = [check for check in (await watch.health()).checks if not check.ok]
            assert [check.name for check in failed] == ["unknown-domains"] and "stranger" in failed[0].detail
        assert [(entry.type, entry.object.id) for entry in audit.entries] == [("machine.unknown", str(stranger.uuid))]
        rig.hypervisor.connected = False
        failed = [check for check in (await watch.health()).checks if not check.ok]
        assert [check.name for check in failed] == ["libvirt", "unknown-domains"]
        audit.anchor_failure = "the TPM does not answer"
        failed = [check for check in (await watch.health()).checks if not check.ok]
        assert (failed[0].name, failed[0].detail) == ("audit-anchor", "the TPM does not answer")
        # A volume without fs-verity is said, and no failure.
        audit.unprotected = "the file system has none"
        (check,) = (check for check in (await watch.health()).checks if check.name == "audit")
        assert check.ok and check.detail.endswith("not under fs-verity: the file system has none")
        server.close()
        rig.database.close()

    asyncio.run(watch())
