"""What a start finds of the trail: its end, after whatever ended the last run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmm.audit.records import CHECKPOINT, GENESIS, RECOVERED, Entry, Record, digest, parse
from vmm.audit.retention import Removed
from vmm.audit.verify import Chain, lines
from vmm.errors import Unavailable


class End(NamedTuple):
    """Number, hash and type of the last record, and the newest removal that its segment tells of."""

    seq: int
    head: str
    type: str
    removal: Removed | None = None


def cut_torn_line(path: Path) -> int:
    """Remove what stands after the last newline; returns the number of bytes removed."""
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    if keep < len(data):
        with path.open("r+b") as file:
            file.truncate(keep)
            os.fsync(file.fileno())
    return len(data) - keep


def verified_end(files: Sequence[Path]) -> End:
    """The end of the trail, after verifying the newest segment and its link to the one before.

    Raises: Unavailable naming the record at fault.
    """
    if not files:
        return End(0, GENESIS, "")
    newest = files[-1]
    chain = Chain(seq=int(newest.stem), prev=GENESIS)
    last, removal = "", None
    try:
        if chain.seq != 1:
            # The newest two are never removed.
            before = deque(lines(files[-2]) if len(files) > 1 else (), maxlen=1)
            ended = parse(before[0]) if before else None
            if ended is None or ended.seq + 1 != chain.seq:
                raise ValueError("the segment before it is missing or ends with another number")
            chain.head, last = digest(before[0]), ended.type
        for line in lines(newest):
            record = chain.follow(line)
            # The last one comes behind the end of a run.
            last = last if record.type == CHECKPOINT else record.type
            removal = Removed.of(record) or removal
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"the audit store is damaged: record {chain.seq} in {newest.name}: {error}",
            hint="copy the audit volume for inspection, then replace it",
        ) from None
    return End((chain.seq or 1) - 1, chain.head or GENESIS, last, removal)


def recovered_entry(count: int) -> Entry:
    """The record of a run that did not end in order, and how many bytes of a never acknowledged line it left."""
    reason = "incomplete last line removed" if count else "the last run did not end in order"
    return Entry(type=RECOVERED, reason=reason, extra={"bytes": count})


def interrupted_entry(intent: Record) -> Entry:
    """The outcome of an intent that nobody can finish any more."""
    return Entry(
        type=intent.type,
        phase="outcome",
        actor=intent.actor,
        object=intent.object,
        outcome="failure",
        reason="interrupted",
        request=intent.request,
        extra={"intent": intent.seq},
    )
