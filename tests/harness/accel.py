"""Whether KVM works here, found out by booting something, and what to use otherwise."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from image.builder.probe import PROBE_READY, build_probe_disk
from tests.harness import firmware
from vmm.process import run

_PROBE_SECONDS = 5
_CACHE = Path("build/test/accel.json")


@dataclass(frozen=True)
class Acceleration:
    """How QEMU runs a host: its options, and by how much deadlines grow against a machine with KVM."""

    name: str
    arguments: tuple[str, ...]
    scale: float


# kvm_amd inside runs on QEMU's emulated SVM with nested paging. More CPU features make everything slower.
TCG = Acceleration("tcg", ("-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"), 8.0)
KVM = Acceleration("kvm", ("-accel", "kvm", "-cpu", "host"), 1.0)


def nested_enabled(modules: Path = Path("/sys/module")) -> bool:
    """Whether KVM's guests get virtualisation of their own, which a host needs to run machines."""
    switches = (modules / f"{module}/parameters/nested" for module in ("kvm_amd", "kvm_intel"))
    return any(switch.exists() and switch.read_text().strip() in ("1", "Y") for switch in switches)


def boots(acceleration: Acceleration, seconds: float = _PROBE_SECONDS) -> bool:
    """Boot the UEFI probe on the machine type that hosts get, and see whether it says that it is ready.

    A boot sector would not do: there are machines on which real mode runs under KVM, but neither SMM
    nor a kernel does. Raises: UserError when QEMU or the firmware is not installed.
    """
    with TemporaryDirectory() as temporary:
        disk, variables = Path(temporary, "probe.raw"), Path(temporary, "variables.qcow2")
        build_probe_disk(disk)
        firmware.create_variables(variables)
        result = run(
            ["timeout", "--signal=KILL", str(seconds), "qemu-system-x86_64", "-nodefaults", "-display", "none",
             "-machine", "q35,smm=on,pflash0=code,pflash1=variables", "-m", "256", *acceleration.arguments,
             *firmware.arguments(variables), "-drive", f"if=virtio,format=raw,file={disk}", "-serial", "stdio"],
            check=False,
        )  # fmt: skip
    return PROBE_READY in result.stdout


@functools.cache
def acceleration(cache: Path = _CACHE) -> Acceleration:
    """KVM when it boots a guest and can be nested, else TCG; the finding is kept until this machine reboots."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        found = json.loads(cache.read_text())
        if found["boot_id"] == boot_id:
            return Acceleration(found["name"], tuple(found["arguments"]), found["scale"])
    except (FileNotFoundError, ValueError, KeyError):
        pass  # Not probed yet, or by a different version of this code.
    chosen = KVM if Path("/dev/kvm").exists() and nested_enabled() and boots(KVM) else TCG
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"boot_id": boot_id, **asdict(chosen)}))
    return chosen
