"""Files that TUF's targets role vouches for: what is known of one, and reading it with that knowledge applied."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from vmm.update.errors import Refused
from vmm.update.source import Source, checked_path, read_all
from vmm.update.types import Hex384, TargetPath

MOST_RELEASE_JSON = 64 << 10
_RELEASE = re.compile(r"holdfast_([0-9.]{5,32})/release\.json")


class Target(msgspec.Struct, frozen=True):
    """One file: ``length`` in bytes and ``sha384`` as the targets role signed them."""

    path: TargetPath
    length: int
    sha384: Hex384
    custom: Any = None

    @property
    def stored(self) -> str:
        """Where it lies in the repository (consistent snapshots put the hash in front of the name)."""
        folder, _, name = self.path.rpartition("/")
        return checked_path(f"targets/{folder}/{self.sha384}.{name}")


Targets = Mapping[str, Target]


def release_of(path: str) -> str:
    """The version whose release.json has this path; empty for all other files."""
    found = _RELEASE.fullmatch(path)
    return found[1] if found else ""


def find(targets: Targets, path: str) -> Target:
    """The target with this path. Raises: Refused."""
    if path not in targets:
        raise Refused("TUF targets", f"the release needs {path}, which the targets role does not vouch for")
    return targets[path]


def read(source: Source, target: Target, *, limit: int) -> bytes:
    """A small target as a whole, checked. Raises: Refused; Missing; Unavailable."""
    if target.length > limit:
        raise Refused("length", f"{target.path} has {target.length} bytes, more than the {limit} allowed")
    content = read_all(source, target.stored, limit=target.length)
    check(target, len(content), hashlib.sha384(content).hexdigest())
    return content


def check(target: Target, length: int, sha384: str) -> None:
    """Compare what came with what was signed. Raises: Refused."""
    if length != target.length:
        raise Refused("TUF target", f"{target.path} has {length} bytes, not the {target.length} signed")
    if sha384 != target.sha384:
        raise Refused("TUF target", f"{target.path} is not the file that was signed (SHA-384 {sha384[:16]}…)")
