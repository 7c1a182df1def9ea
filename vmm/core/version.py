"""What this host runs: product, version, root hash and slot."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vmm.paths import ROOT
from vmm.release import os_release, root_hash

PRODUCT = "holdfast"

_ROOT_A = "2"
"""The number of slot A's root partition (image/repart: ESP, root, hash tree, signature)."""


class Version(msgspec.Struct, frozen=True):
    """``slot`` is "a" or "b", ``root_hash`` that of the booted file system; both empty when it is not an image."""

    product: str
    version: str
    slot: str
    root_hash: str


def read(root: Path = ROOT) -> Version:
    """The version of the running system; ``root`` is where /etc, /proc, /sys and /dev lie."""
    version = os_release(root).get("IMAGE_VERSION", "unknown")
    found = root_hash(root)
    return Version(PRODUCT, version, _slot(root, found) if found else "", found)


def _slot(root: Path, root_hash: str) -> str:
    """The root partition's UUID is the first half of the hash; slot A's root is the image's second partition."""
    half = root_hash[:32]
    uuid = "-".join((half[:8], half[8:12], half[12:16], half[16:20], half[20:]))
    try:
        device = (root / "dev/disk/by-partuuid" / uuid).readlink().name
        number = (root / "sys/class/block" / device / "partition").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return "a" if number == _ROOT_A else "b"
