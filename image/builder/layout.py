"""Where the build reads and writes, and what it is told; the only place that knows the environment."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import vmm
from vmm.errors import die

REPOSITORY = Path(__file__).resolve().parents[2]

SOURCE_DATE_EPOCH = 1767225600
"""The one time stamp of every file in the image (2026-01-01, UTC), so that equal inputs build equal bits."""


MAX_EPOCH = 64
"""The floor in the TPM is a field of 64 bits, one an epoch."""


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes above which a build fails (image/limits.json)."""

    uki_bytes: int
    payload_bytes: int
    root_slot_bytes: int
    root_slot_fill_percent: int


@dataclass(frozen=True)
class Layout:
    """One build: its folders and its settings."""

    repository: Path = REPOSITORY
    version: str = vmm.VERSION
    mirror: str = ""
    keys: Path = REPOSITORY / "build/keys"
    release: bool = False
    epoch: int = 1
    built: int = SOURCE_DATE_EPOCH
    minimum_source: str = vmm.VERSION

    @classmethod
    def from_environment(cls) -> Layout:
        """Read MIRROR, VERSION, EPOCH, KEYS, RELEASE and SOURCE_DATE_EPOCH.

        A release states when it was built, or SOURCE_DATE_EPOCH to build the same bits again; a host does not believe
        that it is earlier. Others state always the same.

        Raises: UserError when one of them cannot be used, naming it.
        """
        version = os.environ.get("VERSION", "") or vmm.VERSION
        if not all(part.isdigit() for part in version.split(".")) or version.count(".") != 2:
            die(f"VERSION is {version!r}, which is not three numbers", hint="for example VERSION=1.4.0")
        stated = json.loads((REPOSITORY / "image/release.json").read_text())
        epoch = os.environ.get("EPOCH", "") or str(stated["epoch"])
        if not epoch.isdigit() or not 0 < int(epoch) <= MAX_EPOCH:
            die(f"EPOCH is {epoch!r}, which is not a number from 1 to {MAX_EPOCH}")
        release = os.environ.get("RELEASE", "") == "1"
        built = os.environ.get("SOURCE_DATE_EPOCH", "") or str(int(time.time()) if release else SOURCE_DATE_EPOCH)
        if not built.isdigit() or not SOURCE_DATE_EPOCH <= int(built) <= time.time():
            die(f"SOURCE_DATE_EPOCH is {built!r}, which is no time between 2026 and now, in seconds")
        keys = Path(os.environ.get("KEYS", "") or REPOSITORY / "build/keys").absolute()
        return cls(
            version=version,
            epoch=int(epoch),
            minimum_source=stated["minimum_source"],
            mirror=os.environ.get("MIRROR", "").rstrip("/"),
            keys=keys,
            release=release,
            built=int(built),
        )

    @property
    def build(self) -> Path:
        """Everything that is made, and nothing else; ignored by git."""
        return self.repository / "build"

    @property
    def tools(self) -> Path:
        """The Debian trixie tree in which everything runs."""
        return self.build / "tools"

    @property
    def mkosi_output(self) -> Path:
        """Where mkosi puts the installed tree and its package manifest."""
        return self.build / "mkosi"

    @property
    def root(self) -> Path:
        """The installed tree."""
        return self.mkosi_output / "root"

    @property
    def image(self) -> Path:
        """The results: disk, UKI, manifest."""
        return self.build / "image"

    @property
    def disk(self) -> Path:
        """The disk that is flashed: ESP and slot A."""
        return self.image / "holdfast.raw"

    @property
    def uki(self) -> Path:
        """The signed unified kernel image."""
        return self.image / "holdfast.efi"

    @property
    def manifest(self) -> Path:
        """What was built: version, root hash, predicted PCR 11, sizes."""
        return self.image / "manifest.json"

    @property
    def release_folder(self) -> Path:
        """What `holdfast-release publish` takes: the slot's parts, the UKI and the manifest."""
        return self.image / "release"

    @cached_property
    def limits(self) -> Limits:
        """The sizes above which a build fails."""
        return Limits(**json.loads((self.repository / "image/limits.json").read_text()))


def digest(paths: Iterable[Path], *words: str) -> str:
    """SHA-256 over files (folders with all that is in them), their names and modes, and some words.

    Where the repository lies makes no difference.
    """
    state = hashlib.sha256(json.dumps(words).encode())
    for path in paths:
        files = sorted(p for p in path.rglob("*") if "__pycache__" not in p.parts) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path.parent)
            if file.is_symlink():
                state.update(f"{name}\0{os.readlink(file)}\0".encode())
            elif file.is_file():
                state.update(f"{name}\0{file.stat().st_mode & 0o777:o}\0".encode())
                state.update(hashlib.sha256(file.read_bytes()).digest())
    return state.hexdigest()
