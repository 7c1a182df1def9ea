"""What the running system says of itself: os-release(5), and the root hash on the signed command line."""

from __future__ import annotations

import re
from pathlib import Path


def os_release(root: Path) -> dict[str, str]:
    """The fields of /etc/os-release below ``root``, without quotes. Raises: OSError; UnicodeDecodeError."""
    lines = (root / "etc/os-release").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key: value.strip("\"'") for key, value in pairs}


def root_hash(root: Path) -> str:
    """The hash of the verified root, "" when there is none. Raises: OSError; UnicodeDecodeError."""
    line = (root / "proc/cmdline").read_text(encoding="utf-8")
    hashes = re.findall(r"(?:^|\s)roothash=([0-9a-f]{64})(?=\s|$)", line)
    return hashes[-1] if hashes else ""
