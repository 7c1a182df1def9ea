"""Whether the host still is what it claims to be: one check for each property that isolation rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from vmm import status
from vmm.core import export
from vmm.errors import Unavailable
from vmm.guard.status import Status as GuardStatus
from vmm.machines.host import Host
from vmm.paths import AUDIT_STORE, CORE_STATE, GUARD_STATUS, KERNEL_STATUS, ROOT

_SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"

Verdict = tuple[bool, str]


class _KernelStatus(msgspec.Struct, frozen=True):
    """What is read of the reader's status: when it wrote that (monotonic seconds), and how it stands."""

    at: int
    pid: int
    problem: str
    serial: int
    lost: int


class Check(msgspec.Struct, frozen=True):
    """One property: whether it holds, and what was seen."""

    name: str
    ok: bool
    detail: str


class Health(msgspec.Struct, frozen=True):
    """All properties; "degraded" when any does not hold."""

    status: Literal["ok", "degraded"]
    checks: tuple[Check, ...]


def judge(verdicts: Mapping[str, Verdict]) -> Health:
    """Sum up the checks, by name."""
    checks = tuple(Check(name, ok, detail) for name, (ok, detail) in verdicts.items())
    return Health("ok" if all(check.ok for check in checks) else "degraded", checks)


class Platform:
    """The checks of kernel and firmware; ``root`` is where /proc, /sys and /dev lie (tests have their own)."""

    def __init__(self, root: Path = ROOT, data: Path = CORE_STATE, audit: Path = AUDIT_STORE) -> None:
        self._root = root
        self._volumes = {"data": data, "audit": audit}

    def verdicts(self) -> dict[str, Verdict]:
        """Run every check; one that cannot be made has failed."""
        checks: dict[str, Callable[[], Verdict]] = {
            "kvm": self._kvm,
            "apparmor": self._apparmor,
            "smt": lambda: self._equals("sys/devices/system/cpu/smt/active", "0", "hyperthreads"),
            "vulnerabilities": self._vulnerabilities,
            "ksm": self._ksm,
            "lockdown": self._lockdown,
            "secure-boot": self._secure_boot,
            "tpm": self._tpm,
            "volumes-encrypted": self._encrypted,
            "kernel-audit": self._kernel_audit,
            "guard": self._guard,
            "audit-export": lambda: export.verdict(self._root),
        }
        return {name: self._guarded(check) for name, check in checks.items()}

    @staticmethod
    def _guarded(check: Callable[[], Verdict]) -> Verdict:
        try:
            return check()
        except (OSError, ValueError) as error:
            return False, f"cannot be read: {error}"

    def _text(self, path: str) -> str:
        return (self._root / path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")

    def _equals(self, path: str, wanted: str, what: str) -> Verdict:
        value = self._text(path)
        return (True, f"{what} off") if value == wanted else (False, f"{what} on (/{path} is {value})")

    def _kvm(self) -> Verdict:
        try:
            return True, Host(self._root).virtualisation()
        except Unavailable as error:
            return False, error.message

    def _apparmor(self) -> Verdict:
        if self._text("sys/module/apparmor/parameters/enabled") != "Y":
            return False, "AppArmor is off"
        label = self._label_of("libvirtd")
        return label == "libvirtd (enforce)", f"libvirtd is {label or 'not running'}"

    def _label_of(self, program: str) -> str:
        for process in (self._root / "proc").iterdir():
            if process.name.isdigit():
                try:
                    if self._text(f"proc/{process.name}/comm") == program:
                        return self._text(f"proc/{process.name}/attr/current")
                except OSError:
                    continue  # it ended meanwhile
        return ""

    def _vulnerabilities(self) -> Verdict:
        directory = self._root / "sys/devices/system/cpu/vulnerabilities"
        texts = {path.name: path.read_text(encoding="utf-8").strip() for path in sorted(directory.iterdir())}
        bad = [f"{name}: {text}" for name, text in texts.items() if "Vulnerable" in text]
        return not bad, "; ".join(bad) or f"{len(texts)} known, none open"

    def _ksm(self) -> Verdict:
        # A kernel without page merging has no such file.
        if not (self._root / "sys/kernel/mm/ksm/run").exists():
            return True, "page merging is not built in"
        return self._equals("sys/kernel/mm/ksm/run", "0", "page merging")

    def _lockdown(self) -> Verdict:
        modes = self._text("sys/kernel/security/lockdown")
        return "[integrity]" in modes or "[confidentiality]" in modes, modes

    def _secure_boot(self) -> Verdict:
        # Four bytes of attributes, then the value.
        on = (self._root / _SECURE_BOOT).read_bytes()[4:] == b"\x01"
        return on, "on" if on else "off"

    def _tpm(self) -> Verdict:
        version = self._text("sys/class/tpm/tpm0/tpm_version_major")
        return version == "2", f"TPM {version}"

    def _kernel_audit(self) -> Verdict:
        """Whether the kernel's audit events are read, as their reader says, if it lives (vmm/kernel/daemon.py)."""
        said = status.read(KERNEL_STATUS, _KernelStatus, self._root)
        if said is None or said.problem:
            return False, said.problem if said else "the reader of the kernel's audit events does not run"
        return True, f"read up to event {said.serial}; the kernel lost {said.lost}"

    def _guard(self) -> Verdict:
        """Whether the guard follows the trail, as it says, if it lives (vmm/guard/daemon.py)."""
        said = status.read(GUARD_STATUS, GuardStatus, self._root)
        if said is None or said.problem:
            return False, said.problem if said else "the guard does not run"
        return True, f"went by the trail up to record {said.seq}"

    def _encrypted(self) -> Verdict:
        plain = [name for name, path in self._volumes.items() if not self._is_encrypted(path)]
        return not plain, "not encrypted: " + ", ".join(plain) if plain else "LUKS2"

    def _is_encrypted(self, path: Path) -> bool:
        uuid = self._root / f"sys/dev/block/{self._device_of(path)}/dm/uuid"
        return uuid.exists() and uuid.read_text(encoding="ascii").startswith("CRYPT-LUKS2")

    def _device_of(self, path: Path) -> str:
        """The "major:minor" under a path. The unit may bar the path itself; its mount is still listed."""
        found, device = Path(), ""
        for line in self._text("proc/self/mountinfo").splitlines():
            fields = line.split()  # proc_pid_mountinfo(5): 2 is the device, 4 the mount point
            point = Path(fields[4])
            on_a_disk = not fields[2].startswith("0:")
            if on_a_disk and path.is_relative_to(point) and len(point.parts) >= len(found.parts):
                found, device = point, fields[2]
        return device
