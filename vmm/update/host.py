"""What this host is and how it was configured, as far as updates depend on it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vmm import release
from vmm.config.types import Update
from vmm.errors import Unavailable
from vmm.paths import ROOT
from vmm.update.errors import Refused
from vmm.update.types import version_key

ROOT_METADATA = "usr/share/holdfast/root.json"
_MOST = 1 << 20


class Running(msgspec.Struct, frozen=True):
    """The system that runs: version, epoch, root hash; ``built`` in seconds since 1970; ids of machine and boot."""

    version: str
    epoch: int
    root_hash: str
    built: int
    machine_id: str
    boot: str


def running(root: Path = ROOT) -> Running:
    """Read it. Raises: Unavailable when this is no image of ours."""
    try:
        fields, root_hash = release.os_release(root), release.root_hash(root)
        version = fields.get("IMAGE_VERSION", "")
        version_key(version)
        if not root_hash:
            raise ValueError("no root hash on the command line")
        return Running(
            version=version,
            epoch=_number(fields.get("HOLDFAST_EPOCH", "")),
            root_hash=root_hash,
            built=_number(fields.get("HOLDFAST_BUILT", "")),
            machine_id=(root / "etc/machine-id").read_text().strip(),
            boot=(root / "proc/sys/kernel/random/boot_id").read_text().strip(),
        )
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"this system cannot be updated: it is no image with a root hash and a version ({error})"
        ) from None


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0


def root_metadata(root: Path = ROOT) -> bytes:
    """The TUF root that the image carries. Raises: Refused."""
    try:
        return (root / ROOT_METADATA).read_bytes()
    except OSError as error:
        raise Refused("TUF root", f"the image has no root metadata: {error.strerror}") from None


class _Applied(msgspec.Struct, frozen=True):
    """The part of the applied configuration that matters here; all else in it may change shape."""

    update: Update | None = None


def configuration(path: Path) -> Update | None:
    """How updates are configured; None if they are not. Raises: Unavailable when the file cannot be read."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MOST), type=_Applied).update
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unavailable(f"{path} cannot be read: {error}") from None
