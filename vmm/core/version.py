"""What this host runs: product, version, root hash and slot."""

from __future__ import annotations

from pathlib import Path

import msgspec

from vmm.config import devices
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
    return Version(PRODUCT, version, _slot(root) if found else "", found)


def _slot(root: Path) -> str:
    """By what lies under the open root; its partition's UUID would be that of an installation stick, too."""
    try:
        block = root / "sys/class/block"
        numbers = [(block / name / "partition").read_text().strip() for name in devices.below(root, "root")]
    except OSError:
        return ""
    return "" if not numbers else "a" if _ROOT_A in numbers else "b"
