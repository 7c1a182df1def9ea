"""The unified kernel images on the EFI system partition, whose names count their tries (systemd-boot(7))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vmm import atomic
from vmm.errors import UserError
from vmm.paths import ROOT
from vmm.update import pe
from vmm.update.types import version_key

LINUX = ROOT / "efi/EFI/Linux"
_NAME = re.compile(
    r"holdfast_((?:0|[1-9][0-9]{0,8})(?:\.(?:0|[1-9][0-9]{0,8})){2})(?:\+([0-9]{1,3})(?:-([0-9]{1,3}))?)?\.efi"
)


@dataclass(frozen=True)
class BootEntry:
    """One UKI. ``left`` and ``done`` count its tries; both None once it is blessed. ``uki`` is None if unreadable."""

    path: Path
    version: str
    left: int | None
    done: int | None
    uki: pe.Uki | None

    @property
    def bad(self) -> bool:
        """Whether systemd-boot has given up on it."""
        return self.left == 0

    @property
    def blessed(self) -> bool:
        """Whether it has proven itself."""
        return self.left is None


def entries(linux: Path = LINUX) -> list[BootEntry]:
    """All our UKIs, newest version first. Raises: OSError when the folder cannot be read."""
    found = []
    for path in linux.iterdir():
        if not (name := _NAME.fullmatch(path.name)):
            continue
        try:
            uki = pe.describe(path)
        except (UserError, OSError):
            uki = None
        left, done = (int(text) if text is not None else None for text in (name[2], name[3]))
        found.append(BootEntry(path, name[1], left, done, uki))
    return sorted(found, key=lambda entry: (version_key(entry.version), entry.path.name), reverse=True)


def started_by(entries: Iterable[BootEntry], root_hash: str) -> BootEntry | None:
    """The entry that starts the system with a root hash, or None."""
    return next((entry for entry in entries if entry.uki is not None and entry.uki.root_hash == root_hash), None)


def mark_bad(entry: BootEntry) -> BootEntry:
    """Make systemd-boot pass over an entry: no tries left. Raises: OSError."""
    name = f"holdfast_{entry.version}+0" + (f"-{entry.done}" if entry.done is not None else "") + ".efi"
    return replace(entry, path=_rename(entry.path, name), left=0)


def mark_good(entry: BootEntry) -> BootEntry:
    """Make systemd-boot start an entry without counting, as systemd-bless-boot(8) does. Raises: OSError."""
    return replace(entry, path=_rename(entry.path, f"holdfast_{entry.version}.efi"), left=None, done=None)


def _rename(path: Path, name: str) -> Path:
    target = path.with_name(name)
    os.replace(path, target)
    # Linux' vfat makes the new name without size and content, and fills them in when the file's own inode is written.
    # Syncing the folder first would put that on the disk, with the old name gone; the file first, and both go at once.
    atomic.sync_file(target)
    atomic.sync_folder(target.parent)
    return target
