"""UEFI firmware with Secure Boot and its variable store."""

from __future__ import annotations

from pathlib import Path

from vmm.process import run

CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd")
_EMPTY_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


def create_variables(target: Path) -> None:
    """Write an empty variable store: no keys enrolled, so the boot loader may enrol its own.

    It is qcow2, as QEMU's snapshots need it. Raises: UserError when OVMF is not installed.
    """
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", _EMPTY_VARIABLES, target])


def arguments(variables: Path) -> list[str]:
    """QEMU's options for the firmware; the machine needs ``pflash0=code,pflash1=variables`` and SMM."""
    return [
        "-global", "driver=cfi.pflash01,property=secure,value=on",
        "-blockdev", f"driver=raw,node-name=code,read-only=on,file.driver=file,file.filename={CODE}",
        "-blockdev", f"driver=qcow2,node-name=variables,file.driver=file,file.filename={variables}",
    ]  # fmt: skip
