"""What callers say and see of volumes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MIB = 1 << 20
MAX_SIZE = 1 << 46
"""64 TiB: beyond any disk here, and far from the sizes at which arithmetic in image tools goes wrong."""

Name = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9-]{0,62}\Z")]
Size = Annotated[int, msgspec.Meta(ge=MIB, le=MAX_SIZE, multiple_of=MIB)]
Format = Literal["raw", "qcow2"]


class Volume(msgspec.Struct, frozen=True):
    """A volume as callers see it. Sizes in bytes; ``allocated`` is what it takes on the disk now."""

    name: str
    uuid: str
    size: int
    allocated: int
    state: Literal["creating", "ready", "deleting"]
    machine: str | None
    created: str


class ImportRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To the converter, with two file descriptors: the image, and a target of ``size`` zero bytes."""

    format: Format
    size: int


class ImportResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the converter: what the image held in bytes, or why it was refused (a wire.Problem's fields)."""

    virtual_size: int = 0
    refused: dict[str, str | int] | None = None


def round_up(size: int) -> int:
    """The smallest volume size, in bytes, that holds ``size`` bytes."""
    return max(MIB, -(-size // MIB) * MIB)
