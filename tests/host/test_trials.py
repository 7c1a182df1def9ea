"""A host that breaks starts again by itself, and a version that breaks it is left for the one before."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from signing.keys import make_development_keys
from tests.faults.stages import Update
from tests.harness import esp, releases
from tests.harness.altering import alter
from tests.harness.checkpoint import Checkpoint
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.publishing import Publisher
from tests.harness.seed import Identity
from tests.harness.updates import Updates, slot
from tests.harness.waiting import poll

_BAD = "0.1.3"
"""The version of releases that do not get far."""


def _on_trial(host: Host, drop_in: str) -> None:
    """Have the gate, changed by a drop-in, judge a start as if it were a trial, and do not wait for it."""
    gate, failed = (f"/run/systemd/system/{unit}.service.d" for unit in ("holdfast-gate", "holdfast-gate-failed"))
    host.agent.exec(["mkdir", "-p", gate, failed])
    host.agent.write(f"{gate}/test.conf", drop_in.encode())
    # Only the boot loader can make a real trial.
    never = b"[Unit]\nConditionPathExists=\n"
    host.agent.write(f"{failed}/test.conf", never)
    host.agent.exec(["systemctl", "daemon-reload"])
    host.agent.exec(["systemctl", "--no-block", "restart", "holdfast-gate.service"])


@pytest.mark.sfr("FPT_TUD_EXT.1")
@pytest.mark.parametrize(
    "drop_in",
    [
        pytest.param("[Service]\nExecStart=\nExecStart=/usr/bin/sleep infinity\nTimeoutStartSec=2s\n", id="it-hangs"),
        pytest.param(
            "[Unit]\nRequires=hangs.service\nAfter=hangs.service\nJobTimeoutSec=2s\n", id="its-turn-never-comes"
        ),
    ],
)
def test_a_trial_whose_gate_does_not_decide_ends(host: Host, drop_in: str) -> None:
    """The host restarts, so that the boot loader counts a try."""
    hangs = b"[Service]\nType=oneshot\nExecStart=/usr/bin/sleep infinity\n"
    host.agent.write("/run/systemd/system/hangs.service", hangs)
    _on_trial(host, drop_in)
    host.wait_reset(30)


_STOP_THE_SERVICE_MANAGER = """
import ctypes
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
result = [ptrace(PTRACE_SEIZE, 1, None, None), ptrace(PTRACE_INTERRUPT, 1, None, None)]
"""


@pytest.mark.sfr("FPT_TUD_EXT.1")
def test_a_host_whose_service_manager_stands_still_is_restarted_by_its_watchdog(host: Host) -> None:
    """The watchdog is the machine's own (iTCO), so it would also see a kernel that stands still."""
    manager = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"]
    seconds = host.agent.exec(["busctl", "get-property", *manager, "RuntimeWatchdogUSec"]).out
    assert seconds.split() == ["t", "120000000"]
    # So that the test need not last two minutes.
    host.agent.exec(["busctl", "set-property", *manager, "RuntimeWatchdogUSec", "t", "5000000"])
    assert host.agent.python(_STOP_THE_SERVICE_MANAGER) == [0, 0]
    host.wait_reset(30)


@pytest.mark.sfr("FPT_TUD_EXT.1")
def test_a_host_whose_service_manager_crashes_restarts(host: Host) -> None:
    """Otherwise it would stand there, half alive."""
    host.agent.python("import os, signal; result = os.kill(1, signal.SIGSEGV)")
    host.wait_reset(10)


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FPT_TUD_EXT.2", "FAU_GEN.1")
def test_a_slot_that_is_damaged_before_its_first_start_is_left(
    updates: Updates, host: Host, offered: Publisher
) -> None:
    """It was whole when it was read back; dm-verity ends each of its tries, and the version before tells of it."""
    with host.serve(offered.folder):
        updates.do("check")
        updates.do("download")
    updates.do("apply")
    before = updates.records("update.apply")[-1]["boot"]
    # The first block, with the superblock, is read at every start.
    alter(host, "holdfast_0.1.1", 0)
    updates.restart()
    for _ in range(3):
        host.wait_reset(60)
    host.wait_ready(updates.admin, 120)
    status = updates.settled()
    assert (status["running"], slot(status, "b")["state"]) == ("0.1.0", "bad")
    (failed,) = status["failed"]
    assert (failed["version"], failed["reason"]) == (
        "0.1.1",
        f"it did not reach its health gate in 3 tries after boot {before}; 0.1.0 was started again",
    )
    (record,) = updates.records("update.failed")
    assert (record["outcome"], record["reason"], record["object"]["id"]) == ("failure", failed["reason"], "0.1.1")
    host.serial.expect("UPDATE FAILED: 0.1.1: it did not reach its health gate")
    assert "corrupt" in (host.files.directory / "serial.log").read_text(errors="replace")


_FAILURES = """
from vmm.update import gate
result = gate.first_failure(gate.host_checks(), 5)
"""
_IMPATIENT = """\
[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I -c "from vmm.update import gate; print(gate.judge(gate.host_checks(), 5))"
"""
_FILL = """
import os
descriptor = os.open(argument, os.O_WRONLY | os.O_CREAT, 0o600)
found = os.fstatvfs(descriptor)
os.posix_fallocate(descriptor, 0, found.f_bavail * found.f_frsize)
os.close(descriptor)
"""
_QEMU, _FILLER = "/usr/bin/qemu-system-x86_64", "/var/lib/holdfast-audit/filler"


def _hold_gate(host: Host) -> None:
    """End the gate of a host on trial before it decides, without what ends such a trial."""
    host.agent.exec(["systemctl", "kill", "--signal=SIGSTOP", "holdfast-gate.service"])
    folder = "/run/systemd/system/holdfast-gate-failed.service.d"
    host.agent.exec(["mkdir", "-p", folder])
    host.agent.write(f"{folder}/test.conf", b"[Unit]\nConditionPathExists=/nowhere\n")
    host.agent.exec(["systemctl", "daemon-reload"])
    host.agent.exec(["systemctl", "stop", "holdfast-gate.service"])


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_the_gate_names_what_does_not_work(
    booted: Checkpoint, clients: dict[str, Identity], next_release: releases.Built, workdir: Path
) -> None:
    """On a real trial: audit cannot write, the API does not answer, no guest starts, the network is not as configured.

    The first three are mended again, so that one trial serves for all; over the last one the gate itself decides, with
    less patience than it has. That no recovery key opened the volumes need not be asked: the initrd takes none, and
    where the TPM does not open them the host does not get here (below, "sealed").
    """
    admin = clients["admin"]
    host = Update(booted, admin, next_release).at("trial").host(workdir)
    with host:
        _hold_gate(host)
        host.agent.set_clock()
        host.wait_ready(admin, 120)
        updates = Updates(host, admin)
        on_trial = slot(updates.status(), "b")
        assert (on_trial["state"], on_trial["tries"]) == ("running", 2), on_trial
        tried = host.agent.read("/proc/sys/kernel/random/boot_id").decode().strip()
        seconds = 60 * host.acceleration.scale

        def refuses() -> bool:
            return updates.api.request("GET", "/v1/version").status == 503

        host.agent.python(_FILL, _FILLER, seconds=60)
        poll(refuses, seconds, "the audit volume takes no records")
        assert re.match("audit: .* full", host.agent.python(_FAILURES, seconds=60))
        host.agent.exec(["rm", _FILLER])
        poll(lambda: not refuses(), seconds, "the audit volume takes records again")

        host.agent.exec(["systemctl", "stop", "holdfast-api.service"], seconds=60)
        assert host.agent.python(_FAILURES, seconds=60).startswith("api: the API does not answer: ")
        host.agent.exec(["systemctl", "start", "holdfast-api.service"], seconds=60)

        host.agent.exec(["mount", "--bind", "/usr/bin/true", _QEMU])
        assert re.match("guest: .", host.agent.python(_FAILURES, seconds=180))
        host.agent.exec(["umount", _QEMU])

        shown = host.agent.exec(["ip", "-oneline", "address", "show", "to", "10.0.2.15"]).out
        (interface,) = re.findall(r"^\d+: (\S+)", shown)
        host.agent.exec(["ip", "address", "del", "10.0.2.15/24", "dev", interface])
        _on_trial(host, _IMPATIENT)
        host.wait_reset(60)
        host.wait_ready(admin, 120)
        status = updates.settled()
        assert (status["running"], slot(status, "b")["state"]) == ("0.1.0", "bad")
        (failed,) = status["failed"]
        said = rf"network: the management interface has .*, not 10\.0\.2\.15/24 \(boot {tried}\)"
        assert re.fullmatch(said, failed["reason"]), failed
        (record,) = updates.records("update.failed")
        assert (record["outcome"], record["reason"]) == ("failure", failed["reason"])
        assert record["extra"]["boots"] == [tried]
        host.serial.expect("UPDATE FAILED: 0.1.1: network: the management interface has")
    host.files.discard()


def _panics(sources: Path) -> None:
    with (sources / "image/cmdline").open("a") as line:
        line.write("rdinit=/nowhere\n")


def _hangs(sources: Path) -> None:
    with (sources / "image/cmdline").open("a") as line:
        line.write("rd.systemd.unit=basic.target\n")
    unit = sources / "image/initrd/rootfs/usr/lib/systemd/system/holdfast-trial.service"
    text = unit.read_text()
    assert "RuntimeMaxSec=10min" in text
    unit.write_text(text.replace("RuntimeMaxSec=10min", "RuntimeMaxSec=20s"))


@pytest.fixture(scope="session")
def foreign_policy(built_image: Image) -> Path:
    """Keys that the firmware knows, with a policy key that the volumes are not sealed to."""
    own, keys = built_image.build / "keys", releases.FOLDER / "foreign-policy-keys"
    if not keys.exists():
        fresh = keys.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        make_development_keys(fresh)
        for name in ("db.key", "db.crt", "verity.key", "verity.crt"):
            shutil.copy2(own / name, fresh / name)
        fresh.rename(keys)
    return keys


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FPT_ML_EXT.1", "FAU_GEN.1")
@pytest.mark.parametrize(
    ("change", "sign"),
    [
        pytest.param(_panics, "Kernel panic", id="panics"),
        # It says nothing, so what is counted is that it gives up.
        pytest.param(_hangs, "reboot: Restarting system", id="hangs"),
        pytest.param(None, "Failed to unseal", id="sealed"),
        pytest.param(None, "Failed to mount sysroot-var.mount", id="hollow"),
    ],
)
def test_a_release_that_does_not_get_far_is_left(
    request: pytest.FixtureRequest,
    updates: Updates,
    host: Host,
    foreign_policy: Path,
    change: releases.Change | None,
    sign: str,
) -> None:
    """A kernel panic, a hanging initrd, volumes that stay closed, a root with nothing in it: each uses up its tries.

    Each is properly signed and comes through the updater, which tells afterwards what became of it, on the console, in
    its answer and in the trail, and takes it again only when it is told to.
    """
    name = request.node.callspec.id
    keys = foreign_policy if name == "sealed" else None
    release = releases.build_hollow(name, _BAD, change=change, keys=keys)
    publisher = Publisher(releases.FOLDER / f"offered-{name}")
    publisher.publish(release.folder)
    with host.serve(publisher.folder):
        updates.do("check")
        updates.do("download")
    assert slot(updates.do("apply"), "b")["tries"] == 3
    before = updates.records("update.apply")[-1]["boot"]
    updates.restart()
    for _ in range(3):
        host.wait_reset(60)
    host.wait_ready(updates.admin, 120)
    status = updates.settled()
    assert (status["running"], status["installed"], slot(status, "b")["state"]) == ("0.1.0", "", "bad")
    (failed,) = status["failed"]
    reason = f"it did not reach its health gate in 3 tries after boot {before}; 0.1.0 was started again"
    assert (failed["version"], failed["reason"]) == (_BAD, reason)
    (record,) = updates.records("update.failed")
    assert (record["outcome"], record["reason"], record["object"]["id"]) == ("failure", reason, _BAD)
    host.serial.expect(f"UPDATE FAILED: {_BAD}: it did not reach its health gate")
    assert f"holdfast_{_BAD}+0-3.efi" in [entry for entry, _ in esp.entries(host.agent)]
    assert (host.files.directory / "serial.log").read_text(errors="replace").count(sign) >= 3
    with host.serve(publisher.folder):
        assert updates.do("check")["available"] == ""
        updates.refused("download", f"{_BAD} failed here before")
        assert updates.do("download", version=_BAD, retry_failed=True)["staged"] == _BAD
