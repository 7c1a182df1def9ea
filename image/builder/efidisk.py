"""Raw disk images with a GPT and an EFI system partition, made without mounting anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from image.builder.layout import SOURCE_DATE_EPOCH
from vmm.errors import UserError
from vmm.process import run

MIB = 1 << 20
ESP_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
_SECTOR = 512
_ESP_START = 1 * MIB
_TIME = {"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)}
"""mtools stamps files and folders with it, so that equal inputs give equal disks."""


@dataclass(frozen=True)
class FatPartition:
    """A FAT file system inside a disk image; ``offset`` and ``size`` are in bytes."""

    disk: Path
    offset: int
    size: int

    @property
    def _drive(self) -> str:
        return f"{self.disk}@@{self.offset}"

    def put(self, source: Path, name: str) -> None:
        """Copy a file to ``name`` (a path with slashes), making its folders and replacing an older one.

        Raises: UserError when the file does not fit.
        """
        for folder in reversed(PurePosixPath(name).parents[:-1]):
            # -D s: an existing folder is left alone instead of asking the terminal what to do.
            run(["mmd", "-i", self._drive, "-D", "s", f"::{folder}"], check=False, env=_TIME)
        run(["mcopy", "-i", self._drive, "-o", source, f"::{name}"], env=_TIME)

    def get(self, name: str, target: Path) -> None:
        """Copy the file ``name`` out to ``target``. Raises: UserError when it does not exist."""
        run(["mcopy", "-i", self._drive, "-n", "-o", f"::{name}", target])

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it. Raises: UserError when it does not exist."""
        run(["mdeltree", "-i", self._drive, f"::{name}"])

    def names(self, folder: str = "") -> list[str]:
        """Paths of everything below ``folder``, folders with a slash at their end."""
        listing = run(["mdir", "-i", self._drive, "-/", "-b", f"::{folder}"]).stdout
        return [line.removeprefix("::/") for line in listing.split("\n") if line.startswith("::/")]


def find_esp(disk: Path) -> FatPartition:
    """The EFI system partition of a raw disk image. Raises: UserError when there is none."""
    table = json.loads(run(["sfdisk", "--json", disk]).stdout)["partitiontable"]
    sector = int(table.get("sectorsize", _SECTOR))
    for partition in table["partitions"]:
        if partition["type"].lower() == ESP_TYPE:
            return FatPartition(disk, partition["start"] * sector, partition["size"] * sector)
    raise UserError(f"{disk} has no EFI system partition")


def make_efi_disk(disk: Path, files: Mapping[str, Path]) -> None:
    """Write a raw GPT image whose single partition, a FAT ESP, holds ``files`` (target name → source).

    Its size follows the files': tests upload these images through an emulated machine, so they stay small,
    which leaves the choice between FAT12, 16 and 32 to mkfs (firmware reads all three).
    Raises: UserError when a tool fails.
    """
    content = sum(source.stat().st_size for source in files.values())
    esp_size = (content * 9 // 8 // MIB + 2) * MIB
    disk.unlink(missing_ok=True)
    with disk.open("wb") as image:
        image.truncate(_ESP_START + esp_size + 1 * MIB)
    # Fixed identifiers: the same inputs give the same image.
    script = (
        "label: gpt\nlabel-id: 8d2c3f54-3f0b-4b7e-9a0e-6a1f0c5d7e01\n"
        f"start={_ESP_START // _SECTOR}, size={esp_size // _SECTOR}, type={ESP_TYPE}, "
        "uuid=8d2c3f54-3f0b-4b7e-9a0e-6a1f0c5d7e02, name=esp\n"
    )
    run(["sfdisk", "--quiet", disk], input=script)
    run(
        ["mkfs.vfat", "-i", "484f4c44", "-n", "ESP", "--invariant",
         "--offset", str(_ESP_START // _SECTOR), disk, str(esp_size // 1024)]
    )  # fmt: skip
    esp = FatPartition(disk, _ESP_START, esp_size)
    for name, source in files.items():
        esp.put(source, name)
