"""Builds the Linux test guest: a bootable disk with one unified kernel image and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from image.builder.efidisk import make_efi_disk
from tests.guest.initrd import build_initrd
from vmm.errors import UserError
from vmm.process import run

GUEST_READY = "HOLDFAST-GUEST READY"
# Regular expression; the group is the exit code of the command before.
GUEST_PROMPT = r"guest\[(\d+)\]# "
_COMMAND_LINE = "console=ttyS0 quiet panic=-1"


@dataclass(frozen=True)
class GuestSources:
    """Where the guest's parts come from; the defaults are what `make image` leaves behind."""

    kernel: Path = Path("build/image/vmlinuz")
    root: Path = Path("build/mkosi/root")
    busybox: Path = Path("/usr/bin/busybox")


def build_linux_disk(target: Path, sources: GuestSources) -> None:
    """Write the guest as a raw disk image.

    Raises: UserError when a part is missing or a tool fails.
    """
    if not sources.kernel.exists():
        raise UserError(f"{sources.kernel} is missing", hint="run make image")
    with TemporaryDirectory() as temporary:
        initrd, image = Path(temporary, "initrd"), Path(temporary, "guest.efi")
        version = build_initrd(initrd, sources.root, sources.busybox)
        run(
            ["ukify", "build", f"--linux={sources.kernel}", f"--initrd={initrd}", f"--cmdline={_COMMAND_LINE}",
             f"--uname={version}", "--os-release=ID=holdfast-guest\nPRETTY_NAME=Holdfast test guest\n",
             f"--output={image}"]
        )  # fmt: skip
        make_efi_disk(target, {"EFI/BOOT/BOOTX64.EFI": image})
