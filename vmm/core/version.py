"""What this host runs: product, version, root hash and slot."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from vmm.paths import ROOT

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
    release = dict(
        line.split("=", 1) for line in (root / "etc/os-release").read_text(encoding="utf-8").splitlines() if "=" in line
    )
    hashes = re.findall(r"(?:^|\s)roothash=([0-9a-f]{64})(?=\s|$)", (root / "proc/cmdline").read_text(encoding="utf-8"))
    root_hash = hashes[-1] if hashes else ""
    version = release.get("IMAGE_VERSION", "unknown").strip("\"'")
    return Version(PRODUCT, version, _slot(root, root_hash) if root_hash else "", root_hash)


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
