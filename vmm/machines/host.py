"""What the host has for machines: processors, memory, hardware virtualisation."""

from __future__ import annotations

import os
from pathlib import Path

from vmm.errors import Unavailable
from vmm.paths import ROOT

MIB = 1 << 20
# What the host keeps for itself: its kernel, daemons and the caches they cannot do without.
_RESERVE = 512 * MIB


class Host:
    """Facts about this host; ``root`` is where /proc, /sys and /dev lie (tests have their own)."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def cpus(self) -> int:
        """Processors that machines may use."""
        return len(os.sched_getaffinity(0))

    def memory(self) -> int:
        """Bytes that all machines together may be promised."""
        for line in (self._root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemTotal:"):
                return max(int(line.split()[1]) * 1024 - _RESERVE, 0)
        raise Unavailable("/proc/meminfo does not say how much memory there is")

    def boot(self) -> str:
        """The kernel's id of this boot."""
        return (self._root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    def virtualisation(self) -> str:
        """How guests are isolated by hardware, in words for people. Raises: Unavailable when they cannot be."""
        if not (self._root / "dev/kvm").exists():
            raise Unavailable(
                "no hardware virtualisation: /dev/kvm does not exist",
                hint="Switch on Intel VT-x or AMD-V in the firmware's setup.",
            )
        for vendor, parameter in (("kvm_amd", "npt"), ("kvm_intel", "ept")):
            path = self._root / "sys/module" / vendor / "parameters" / parameter
            if path.exists():
                if path.read_text(encoding="ascii").strip() not in ("Y", "1"):
                    raise Unavailable(f"no hardware virtualisation: nested paging ({parameter}) of {vendor} is off")
                return f"{vendor} with {parameter}"
        raise Unavailable("no hardware virtualisation: /dev/kvm is there, but neither kvm_amd nor kvm_intel is loaded")
