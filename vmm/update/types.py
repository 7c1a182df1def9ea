"""What a release is, and what the updater says about itself (docs/updates.md)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

VersionText = Annotated[str, msgspec.Meta(pattern=r"\A(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}\Z")]
Hex256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Hex384 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{96}\Z")]
Uuid = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
TargetPath = Annotated[str, msgspec.Meta(pattern=r"\Aholdfast_[0-9.]{5,32}/[a-z0-9.-]{1,64}\Z")]
DbAppend = Annotated[bytes, msgspec.Meta(max_length=16 << 10)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]

MAX_WINDOW = 1 << 28
"""The largest window, in bytes, of a zstd frame in the repository, and so of a part that deltas are made for."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One partition's or file's content: ``size`` in bytes and ``sha384`` are of the plain, unpacked bytes.

    ``target`` is the TUF target that holds it whole, zstd; ``deltas`` maps a source version to the target that
    holds it as zstd with the source version's plain part as its dictionary.
    """

    size: Bytes
    sha384: Hex384
    target: TargetPath
    deltas: dict[VersionText, TargetPath] = {}


class Parts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a release consists of."""

    root: Part
    verity: Part
    signature: Part
    uki: Part


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """release.json. ``epoch`` is the security floor it stands on; hosts below ``minimum_source`` must not take it.

    ``db_append`` adds the certificate of a later release's signer to the firmware's db (addition.py); a release that
    has none does not name the field, so that hosts which do not know it take that release, too.
    """

    format: Literal[1]
    version: VersionText
    epoch: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    minimum_source: VersionText
    root_hash: Hex256
    root_uuid: Uuid
    verity_uuid: Uuid
    signature_uuid: Uuid
    pcr11: Hex256
    parts: Parts
    db_append: DbAppend = b""


class Wave(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From ``after`` (RFC 3339, UTC) on, ``share`` percent of all hosts may take a release."""

    share: Annotated[int, msgspec.Meta(ge=0, le=100)]
    after: Annotated[str, msgspec.Meta(pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]


class Offer(msgspec.Struct, frozen=True):
    """The TUF ``custom`` field of a release.json target: who may have the release, and when."""

    channel: Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9-]{0,31}\Z")]
    waves: tuple[Wave, ...] = ()


def version_key(version: str) -> tuple[int, int, int]:
    """What versions sort by. Raises: ValueError when it is not three numbers."""
    found = re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", version)
    if not found:
        raise ValueError(f"not a version: {version!r}")
    return int(found[1]), int(found[2]), int(found[3])


Phase = Literal["idle", "checking", "downloading", "staged", "writing", "verifying", "finishing", "installed"]


class Slot(msgspec.Struct, frozen=True):
    """One of the two places of a system. ``state`` says what it is worth; ``tries`` are left to an unblessed one."""

    name: Literal["a", "b"]
    version: str
    root_hash: str
    state: Literal["running", "good", "trying", "bad", "empty", "incomplete"]
    tries: int | None = None


class Failed(msgspec.Struct, frozen=True):
    """A version that came back from its trial, and why; it is not taken again unless an administrator says so."""

    version: str
    reason: str
    time: str


class Status(msgspec.Struct, frozen=True):
    """What `holdfast update status` shows.

    ``phase`` with ``done`` of ``total`` bytes is what the updater does now; ``error`` is how the last job ended
    when it failed. ``installed`` waits for a reboot; ``available`` is what the last check found; ``keys`` how a
    change of the keys that the firmware trusts goes.
    """

    running: str
    epoch: int
    floor: int
    floor_source: Literal["tpm", "file"]
    phase: Phase
    version: str = ""
    done: int = 0
    total: int = 0
    error: str = ""
    available: str = ""
    staged: str = ""
    installed: str = ""
    checked: str = ""
    slots: tuple[Slot, ...] = ()
    failed: tuple[Failed, ...] = ()
    keys: str = ""
