"""A stick with a bundle: a partition of a certain name whose first bytes are a tar (docs/updates.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmm.config.devices import UPDATE_PARTITION, Device
from vmm.errors import Conflict, Unavailable
from vmm.update import bundle, files
from vmm.update.errors import Refused
from vmm.update.job import Job


def only(sticks: Sequence[Device]) -> Device:
    """The one that is plugged in. Which release is offered must not depend on luck. Raises: Conflict."""
    match sticks:
        case []:
            raise Conflict(
                f"no stick with a partition named {UPDATE_PARTITION} was found",
                hint="`holdfast update stick` makes an image for one.",
            )
        case [one]:
            return one
    names = ", ".join(stick.name for stick in sticks)
    raise Conflict(f"several partitions are named {UPDATE_PARTITION}: {names}", hint="Leave one stick plugged in.")


def take(stick: Device, folder: Path, job: Job) -> int:
    """Put the bundle on a stick in place of the one in ``folder``; until all of it was read that one stays.

    Returns: how many bytes were read. Raises: Refused; NoRoom; Unavailable when the stick cannot be read; Cancelled;
    OSError for the folder.
    """
    unpacker = bundle.Unpacker(folder, ends_itself=True)
    count = 0
    try:
        for piece in _pieces(stick, job):
            unpacker.feed(piece)
            count += len(piece)
            job.advance(len(piece))
            if unpacker.ended:
                break
        unpacker.finish()
    except Refused as error:
        reason = error.message.removeprefix(f"{error.layer}: ")
        raise Refused(error.layer, f"the partition {stick.name}: {reason}") from None
    finally:
        unpacker.abort()
    return count


def _pieces(stick: Device, job: Job) -> Iterator[bytes]:
    try:
        with stick.node.open("rb", buffering=0) as device:
            # How long the tar is only its end will tell.
            job.expect(device.seek(0, os.SEEK_END))
            device.seek(0)
            while piece := device.read(files.CHUNK):
                yield piece
    except OSError as error:
        raise Unavailable(f"the partition {stick.name} cannot be read: {error.strerror}") from None
