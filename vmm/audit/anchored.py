"""The verifier's view of checkpoints: how far a trail is anchored, and by whose key."""

from __future__ import annotations

from collections import deque

import msgspec

from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import CHECKPOINT, VERSION, Record
from vmm.audit.wrong import Wrong

_WINDOW = 1 << 17
"""Records that may stand between a checkpoint and what it covers; far more than can come in while it is made."""


class Anchors:
    """Follows the checkpoints of a trail, given each record and its hash once the chain has taken it."""

    def __init__(self, known: Checkpoint | None) -> None:
        """Arguments: ``known`` is a checkpoint that the host made. Raises: ValueError if it is not genuine."""
        # The daemon imports this module too and needs no cryptography.
        from vmm.audit.proof import check  # noqa: PLC0415

        self._check = check
        self._known = known
        self._heads: deque[bytes] = deque(maxlen=_WINDOW)
        self._first = self._last = 0
        self.newest: Checkpoint | None = None
        self.covered = 0
        if known:
            check(known)

    def follow(self, record: Record, head: str) -> None:
        """Take the next record. Raises: Wrong."""
        if not self._heads:
            # What stood before the first one is known by its link.
            self._first = record.seq - 1
            self._see(record.seq - 1, record.prev)
        self._see(record.seq, head)
        if record.type == CHECKPOINT and record.outcome == "success":
            if record.v > VERSION:
                raise Wrong("unreadable", "a checkpoint of a later release: verify with that one")
            try:
                self._take(Checkpoint.of(record), record.seq)
            except msgspec.ValidationError as error:
                raise Wrong("edit", f"a checkpoint that is none: {error}") from None

    def _see(self, seq: int, head: str) -> None:
        self._heads.append(bytes.fromhex(head))
        self._last = seq
        if self._known and seq == self._known.covers and head != self._known.head:
            raise Wrong("substitution", f"record {seq} is not the one that is known: another trail, or one made anew")

    def _take(self, checkpoint: Checkpoint, seq: int) -> None:
        before, proof = self.newest, checkpoint.proof
        key = before or self._known
        if key and (proof.key, proof.anchor) != (key.proof.key, key.proof.anchor):
            raise Wrong("substitution", f"anchored by another key, {proof.anchor} {proof.fingerprint}")
        try:
            self._check(checkpoint)
        except ValueError as error:
            raise Wrong("edit", f"a checkpoint that is not genuine: {error}") from None
        if before and proof.counter > before.proof.counter + 1:
            gone = f"there were checkpoints between {before.proof.counter} and {proof.counter}"
            raise Wrong("replay", f"{gone}: the trail was cut back, or an older store put in its place, and continued")
        if before and proof.counter <= before.proof.counter:
            raise Wrong("replay", f"its counter, {proof.counter}, had been used before")
        if self._first <= checkpoint.covers:
            head = self._head(checkpoint.covers) if checkpoint.covers < seq else None
            if head is None:
                raise Wrong("edit", f"it covers record {checkpoint.covers}, which does not stand shortly before it")
            if head != checkpoint.head:
                raise Wrong("edit", f"record {checkpoint.covers} or one before it is not what was anchored")
        self.newest = checkpoint
        self.covered = max(self.covered, checkpoint.covers)

    def end(self, *, part: bool = False) -> None:
        """Take the end of the trail, or of a part of it that may end before what is known. Raises: Wrong."""
        if not self._known:
            return
        covers, counter = self._known.covers, self._known.proof.counter
        if self._last < covers and part:
            if self.newest and self.newest.proof.counter >= counter:
                why = f"its newest checkpoint is {self.newest.proof.counter}, and {counter} is known to cover more"
                raise Wrong("replay", why)
            return
        if self._last < covers:
            raise Wrong("truncation", f"record {covers} is known to have been there: cut short, or an older copy")
        if covers < self._first and self.newest and self.newest.proof.counter < counter:
            raise Wrong("replay", f"its newest checkpoint is {self.newest.proof.counter}, and {counter} is known")
        self.covered = max(self.covered, covers)

    def _head(self, seq: int) -> str | None:
        """The hash of a record that was seen, None if that is too long ago."""
        index = len(self._heads) - 1 - (self._last - seq)
        return self._heads[index].hex() if index >= 0 else None
