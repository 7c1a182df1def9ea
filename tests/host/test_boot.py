"""What the booted host is: measured, confined, encrypted, with nothing to log in to."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
from pathlib import Path

import pytest

from image.builder.layout import Layout
from signing.keys import KeySet
from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.waiting import poll
from vmm.update import firmware

MANIFEST = Path("build/image/manifest.json")
EXPOSED = {
    **dict.fromkeys(("holdfast-api", "holdfast-audit", "holdfast-console", "holdfast-core", "holdfast-guests"), 20),
    **dict.fromkeys(("holdfast-fetch@x", "holdfast-import@x", "holdfast-update"), 20),
    **dict.fromkeys(("holdfast-anchor", "holdfast-export", "holdfast-guard", "holdfast-kernel"), 20),
    "holdfast-gate": 21,
    "holdfast-configure": 23,
    "holdfast-gate-failed": 28,
}
"""How exposed services may be, in tenths of systemd's points."""


@pytest.mark.sfr("FPT_ML_EXT.1")
def test_pcr_11_equals_the_prediction_of_the_build(host: Host) -> None:
    """The UKI that runs, measured section by section, is the one that was built, and all boot phases were entered."""
    measured = host.agent.read("/sys/class/tpm/tpm0/pcr-sha256/11").decode().strip().lower()
    assert measured == json.loads(MANIFEST.read_text())["pcr11"]


def test_the_enrolled_keys_are_the_builds(host: Host) -> None:
    """PK, KEK and db hold one certificate each, of the key set; db one more, of the tests' firmware only."""
    keys = KeySet(Layout.from_environment().keys)
    for variable, owner, names in (
        ("PK", firmware.GLOBAL, ["PK"]),
        ("KEK", firmware.GLOBAL, ["KEK"]),
        ("db", firmware.IMAGE_SECURITY, ["db", "test"]),
    ):
        content = host.agent.read(f"/sys/firmware/efi/efivars/{variable}-{owner}")[4:]
        enrolled = firmware.parse(variable, content).certificates
        assert enrolled == {ssl.PEM_cert_to_DER_cert(keys.certificate(name).read_text()) for name in names}, variable


def test_a_start_counts_once_the_gate_was_passed(host: Host) -> None:
    """boot-complete.target, which stands for a good start, is behind the gate."""
    assert host.agent.exec(["systemctl", "is-active", "boot-complete.target"]).out.strip() == "active"
    needs = host.agent.exec(["systemctl", "show", "--property=Requires,After", "boot-complete.target"]).out
    assert needs.count("holdfast-gate.service") == 2, needs


def test_the_running_version_names_slot_and_root_hash(host: Host, admin: Api) -> None:
    """The API tells which image runs, from which slot."""
    manifest = json.loads(MANIFEST.read_text())
    expected = {"product": "holdfast", "version": manifest["version"], "slot": "a", "root_hash": manifest["root_hash"]}
    assert admin.call("GET", "/v1/version") == expected
    # Below that time no clock is believed.
    assert f"HOLDFAST_BUILT={manifest['built']}\n" in host.agent.read("/usr/lib/os-release").decode()


def test_health_reports_every_invariant(admin: Api) -> None:
    """All checks are good but the one that emulated processors cannot pass: they carry no microcode."""
    checks = {check["name"]: check for check in admin.call("GET", "/v1/health")["checks"]}
    failed = {name for name, check in checks.items() if not check["ok"]}
    assert failed <= {"vulnerabilities"}, checks
    assert {"kvm", "apparmor", "lockdown", "secure-boot", "tpm", "volumes-encrypted", "audit", "libvirt"} <= set(checks)


def test_the_root_is_verified_and_the_volumes_are_encrypted(host: Host) -> None:
    """The root is read-only on dm-verity; /var and the audit volume are on dm-crypt with LUKS2, and execute nothing."""
    mounts = {
        fields[1]: (fields[0], fields[2], set(fields[3].split(",")))
        for fields in (line.split() for line in host.agent.read("/proc/mounts").decode().splitlines())
    }
    assert mounts["/"][:2] == ("/dev/mapper/root", "erofs")
    assert "ro" in mounts["/"][2]
    for place in ("/var", "/var/lib/holdfast-audit"):
        assert mounts[place][2] >= {"nosuid", "nodev", "noexec"}, mounts[place]
    kinds = host.agent.python(
        """
import pathlib
result = {}
for folder in pathlib.Path("/sys/class/block").glob("dm-*/dm"):
    result[(folder / "name").read_text().strip()] = (folder / "uuid").read_text().strip()
"""
    )
    assert kinds["root"].startswith("CRYPT-VERITY-")
    assert kinds["data"].startswith("CRYPT-LUKS2-")
    assert kinds["audit"].startswith("CRYPT-LUKS2-")


def test_the_volume_keys_are_sealed_for_the_initrd_only(host: Host) -> None:
    """Root on the running host cannot unseal the volumes: the PCR policy was signed for the initrd's phase only."""
    done = host.agent.exec(
        [
            "systemd-cryptsetup",
            "attach",
            "again",
            "/dev/disk/by-partlabel/holdfast-audit",
            "-",
            "headless=1,tpm2-device=auto",
        ],
        check=False,
        seconds=60,
    )
    assert done.rc != 0
    assert not host.agent.python("import os; result = os.path.exists('/dev/mapper/again')")


@pytest.mark.sfr("FPT_EEM_EXT.1")
def test_no_program_changes_its_user_and_nobody_can_log_in(host: Host) -> None:
    """No setuid or setgid file and no file capability in the image; every account is locked and has no shell."""
    found = host.agent.python(
        """
import os, stat
result = []
for folder, _, files in os.walk("/usr"):
    for name in files:
        path = os.path.join(folder, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) and (mode & 0o6000 or "security.capability" in os.listxattr(path, follow_symlinks=False)):
            result.append(path)
""",
        seconds=60,
    )
    assert found == []
    for line in host.agent.read("/etc/passwd").decode().splitlines():
        assert line.endswith(":/usr/sbin/nologin"), line
    for line in host.agent.read("/etc/shadow").decode().splitlines():
        assert line.split(":")[1].startswith("!"), line
    names = host.agent.python(
        "import os; result = sorted({p for d in ('/usr/bin', '/usr/sbin') for p in os.listdir(d)})"
    )
    assert not {"sshd", "login", "agetty", "getty", "su", "sudo", "bash", "pkexec", "sulogin"} & set(names)


@pytest.mark.sfr("FTP_TRP.1", "FMT_SMO_EXT.1")
def test_the_api_is_the_only_listener(host: Host) -> None:
    """No socket of the host accepts or receives from the network but the API's port."""
    listening = host.agent.python(
        """
result = []
for table, states in (("tcp", ("0A",)), ("tcp6", ("0A",)), ("udp", ("07",)), ("udp6", ("07",))):
    for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
        fields = line.split()
        if fields[3] in states:
            result.append([table, int(fields[1].split(":")[1], 16)])
"""
    )
    assert {port for _, port in listening} == {8443}, listening


@pytest.mark.sfr("FPT_EEM_EXT.1")
def test_kernel_hardening_is_in_force(host: Host) -> None:
    """Lockdown, module signatures, and the settings that isolation rests on."""
    assert "[integrity]" in host.agent.read("/sys/kernel/security/lockdown").decode()
    values = {
        "kernel/kexec_load_disabled": "1",
        "kernel/io_uring_disabled": "2",
        "kernel/unprivileged_bpf_disabled": "1",
        "kernel/yama/ptrace_scope": "2",
        "kernel/randomize_va_space": "2",
        "net/ipv4/ip_forward": "0",
    }
    for name, value in values.items():
        assert host.agent.read(f"/proc/sys/{name}").decode().strip() == value, name
    assert host.agent.read("/sys/module/kvm_amd/parameters/nested").decode().strip() in ("0", "N")
    assert host.agent.read("/sys/kernel/mm/ksm/run").decode().strip() == "0"
    status = host.agent.python("import os; s = os.stat('/dev/kvm'); result = [s.st_mode & 0o777, s.st_uid]")
    assert status == [0o660, 0]
    # --force strips what the signature covers; the same module as it was signed loads.
    assert host.agent.exec(["modprobe", "--force", "dummy"], check=False).rc != 0
    host.agent.exec(["modprobe", "dummy"])


@pytest.mark.sfr("FPT_EEM_EXT.1")
@pytest.mark.parametrize("unit", EXPOSED)
def test_services_are_confined(host: Host, unit: str) -> None:
    """systemd's own exposure score of every service of ours is below its limit."""
    command = ["systemd-analyze", "security", "--no-pager", f"--threshold={EXPOSED[unit]}", f"{unit}.service"]
    overall = host.agent.exec(command, check=False, seconds=60)
    assert overall.rc == 0, overall.out


@pytest.mark.sfr("FTA_TAB.1")
def test_the_console_shows_the_status_screen(host: Host, admin: Api, booted_serial: str) -> None:
    """Banner, version, address and the API's fingerprint are on the console; there is no login prompt."""
    log = host.files.directory / "serial.log"

    def single(text: str) -> str:
        # QEMU's serial port sometimes gives a byte twice while the machine below it is busy ("does nnot exist").
        return re.sub(r"(.)\1+", r"\1", text)

    def shown() -> str | None:
        # It is drawn once it is known, which may be before the checkpoint that this host continues from.
        text = single(booted_serial + log.read_text(errors="replace"))
        known = single("https://10.0.2.15:8443") in text and single("Health:      not known") not in text[-500:]
        return text if known else None

    text = poll(shown, 60 * host.acceleration.scale, "the status screen")
    assert "Authorised use only." in text
    assert single(f"Holdfast {admin.call('GET', '/v1/version')['version']} (slot A)") in text
    certificate = host.agent.read("/var/lib/holdfast/api/server.crt").decode()
    digits = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest().upper()
    assert single(":".join(digits[i : i + 2] for i in range(0, 32, 2))) in text
    assert "login:" not in text


def test_the_power_button_shuts_down(host: Host) -> None:
    """A press of the button ends in an orderly power-off."""
    host.press_power_button()
    host.wait_off(60)
