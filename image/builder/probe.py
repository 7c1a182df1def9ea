"""Builds the bare UEFI probe (probe.S): READY on the serial port, then power off."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from image.builder.efidisk import make_efi_disk
from vmm.process import run

PROBE_READY = "HOLDFAST-PROBE READY"
_SOURCE = Path(__file__).resolve().parents[1] / "probe/probe.S"


def build_probe_application(target: Path) -> None:
    """Assemble and link the UEFI application. Raises: UserError when binutils fail."""
    with TemporaryDirectory() as temporary:
        linked, unlinked = Path(temporary, "probe.exe"), Path(temporary, "probe.o")
        run(["as", "--64", "-o", unlinked, _SOURCE])
        # Sections apart by a page, so that firmware that enforces W^X can map them.
        run(
            ["ld", "-m", "i386pep", "--subsystem", "10", "--entry", "efi_main", "--image-base", "0",
             "--section-alignment", "4096", "--no-insert-timestamp", "--strip-all", "-o", linked, unlinked]
        )  # fmt: skip
        target.write_bytes(linked.read_bytes())


def build_probe_disk(target: Path) -> None:
    """Write the probe as a bootable raw disk image."""
    with TemporaryDirectory() as temporary:
        application = Path(temporary, "probe.efi")
        build_probe_application(application)
        make_efi_disk(target, {"EFI/BOOT/BOOTX64.EFI": application})
