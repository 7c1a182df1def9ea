"""What an update that was cut off left on the disk, read from outside: whole, or a host that cannot start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image.builder.efidisk import find_esp
from vmm.config import gpt
from vmm.process import CommandFailed, run

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Found:
    """``stage`` is how far the update came; ``broken`` says what is wrong, "" when nothing is.

    ``acknowledged`` is the last number that a guest was told to be on its disk.
    """

    stage: str
    broken: str = ""
    acknowledged: int = 0


def inspect(disk: Path, old: Path, new: Path, scratch: Path) -> Found:
    """Look at a disk with slot A of the release folder ``old``, on which ``new`` was being written to slot B.

    Whatever the boot loader would find must be whole: a boot entry without its complete slot is a mixed version, and
    without the old version's entry and slot the host could not start at all.
    """
    with disk.open("rb") as file:
        table = gpt.read(file)
    esp = find_esp(disk)
    names = [name.removeprefix("EFI/Linux/") for name in esp.names("EFI/Linux") if name.endswith(".efi")]
    versions = {version(folder): folder for folder in (old, new)}
    for wanted, folder in versions.items():
        entries = [name for name in names if name.startswith((f"holdfast_{wanted}.efi", f"holdfast_{wanted}+"))]
        if folder == old and not entries:
            return Found("", f"the boot entry of {wanted} is gone: {names}")
        for entry in entries:
            copy = scratch / "uki.efi"
            esp.get(f"EFI/Linux/{entry}", copy)
            if _sha(copy) != _sha(folder / "uki.efi"):
                return Found("", f"{entry} is not the UKI of {wanted}")
            if broken := _slot_broken(disk, table, wanted, _manifest(folder), scratch):
                return Found("", f"{entry} is there, but {broken}")
    return Found(_stage(table, version(new), names))


def version(folder: Path) -> str:
    """The version of a release folder."""
    return str(_manifest(folder)["version"])


def _manifest(folder: Path) -> Mapping[str, Any]:
    manifest: Mapping[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def _stage(table: gpt.Table, wanted: str, names: list[str]) -> str:
    for name in names:
        if name == f"holdfast_{wanted}.efi":
            return "kept"
        if name.startswith(f"holdfast_{wanted}+"):
            return f"boot entry with {name.split('+')[1][0]} tries"
    labels = [f"holdfast_{wanted}{part}" for part in ("_signature", "_verity", "")]
    return f"{sum(table.find(label) is not None for label in labels)} of 3 partitions named"


def _slot_broken(disk: Path, table: gpt.Table, wanted: str, manifest: Mapping[str, Any], scratch: Path) -> str:
    parts = {}
    for part in ("root", "verity"):
        label = f"holdfast_{wanted}" + ("" if part == "root" else f"_{part}")
        partition = table.find(label)
        if partition is None:
            return f"no partition {label}"
        if str(partition.id) != manifest[f"{part}_uuid"]:
            return f"{label} has the UUID {partition.id}"
        parts[part] = scratch / part
        size = manifest["sizes"]["root"] if part == "root" else partition.size
        _extract(disk, partition.offset, min(size, partition.size), parts[part])
    try:
        run(["veritysetup", "verify", parts["root"], parts["verity"], manifest["root_hash"]])
    except CommandFailed as error:
        return f"its slot does not verify: {error.message}"
    return ""


def _extract(disk: Path, offset: int, size: int, target: Path) -> None:
    with disk.open("rb") as source, target.open("wb") as out:
        source.seek(offset)
        while size and (data := source.read(min(size, _CHUNK))):
            out.write(data)
            size -= len(data)


def _sha(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
