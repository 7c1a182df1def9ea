"""One slot's content (root, hash tree, signature: what a release ships), and the disk that is flashed with it."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image.builder.layout import SOURCE_DATE_EPOCH, Layout
from signing.keys import KeySet
from vmm.process import Argument, run

_SEED = "3fca1f4f-2b9c-4a5b-8d5d-6c9f2d7c1e02"
"""Partition and file system UUIDs derive from it, so that equal inputs give equal disks (systemd-repart(8))."""

_PARTS = {"root": "10-root.conf", "verity": "11-root-verity.conf", "signature": "12-root-signature.conf"}


@dataclass(frozen=True)
class Slot:
    """The root's hash, and each part's partition UUID; the parts lie in ``layout.release_folder``."""

    root_hash: str
    uuids: dict[str, str]


def make_slot(layout: Layout, keys: KeySet) -> Slot:
    """Make root.raw, verity.raw and signature.raw out of the installed tree. Raises: CommandFailed."""
    work = layout.build / "slot"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    made = _repart(
        layout,
        layout.repository / "image/repart/slot",
        work / "slot.raw",
        "--split=yes",
        f"--private-key={keys.key('verity')}",
        f"--certificate={keys.certificate('verity')}",
        f"--copy-source={layout.root}",
        env={"SYSTEMD_REPART_MKFS_OPTIONS_EROFS": f"-T{SOURCE_DATE_EPOCH} -zlz4hc,9 -C65536"},
    )
    by_file = {Path(partition["file"]).name: partition for partition in made}
    layout.release_folder.mkdir(parents=True, exist_ok=True)
    for name in _PARTS:
        (work / f"slot.{name}.raw").replace(layout.release_folder / f"{name}.raw")
    shutil.rmtree(work)
    root_hash = str(by_file[_PARTS["root"]]["roothash"])
    uuids = {name: str(by_file[file]["uuid"]) for name, file in _PARTS.items()}
    # systemd-repart takes the first two from the root's hash; two slots' signatures must differ as well.
    uuids["signature"] = str(uuid.uuid5(uuid.UUID(_SEED), root_hash))
    return Slot(root_hash, uuids)


def make_disk(layout: Layout, slot: Slot, esp: Path) -> None:
    """Make the disk: ESP with the content of ``esp``, and slot A. Raises: CommandFailed."""
    definitions = layout.build / "disk.repart"
    shutil.rmtree(definitions, ignore_errors=True)
    shutil.copytree(layout.repository / "image/repart/disk", definitions)
    for name, file in _PARTS.items():
        # %A would be the version of the system that builds.
        text = (definitions / file).read_text().replace("%A", layout.version)
        blocks = f"UUID={slot.uuids[name]}\nCopyBlocks={layout.release_folder / f'{name}.raw'}\n"
        (definitions / file).write_text(text + blocks)
    fresh = layout.disk.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    _repart(layout, definitions, fresh, f"--copy-source={esp}")
    fresh.replace(layout.disk)
    shutil.rmtree(definitions)


def _repart(
    layout: Layout, definitions: Path, target: Path, *options: Argument, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    result = run(
        [
            "systemd-repart",
            f"--definitions={definitions}",
            f"--seed={_SEED}",
            "--offline=yes",
            "--dry-run=no",
            "--no-pager",
            "--json=short",
            "--size=auto",
            "--empty=create",
            *options,
            target,
        ],
        env={"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH), **(env or {})},
    )
    partitions: list[dict[str, Any]] = json.loads(result.stdout)
    return partitions
