"""The verifier's view of a trail whose oldest records were removed: a removal vouches for itself, a theft does not."""

from __future__ import annotations

from vmm.audit.records import REMOVED, VERSION, Record
from vmm.audit.retention import Removed
from vmm.audit.wrong import Wrong


class Beginning:
    """Looks for the record that says why a trail does not begin with record 1."""

    def __init__(self, *, vouched: bool) -> None:
        """Arguments: whether somebody has to vouch for a later beginning."""
        self._needed = vouched
        self._first = 0
        self._prev = ""
        self._later = False
        self.vouched = 0

    def follow(self, record: Record) -> None:
        """Take the next record. Raises: Wrong."""
        if not self._first:
            self._first, self._prev = record.seq, record.prev
        self._later = self._later or (record.type == REMOVED and record.v > VERSION)
        removed = Removed.of(record)
        # A removal that a power cut stopped halfway left some of what it names.
        if self._first == 1 or removed is None or not removed.first <= self._first <= removed.last + 1:
            return
        if self._first == removed.last + 1 and self._prev != removed.head:
            raise Wrong("edit", f"it names another record {removed.last} than the trail begins behind")
        self.vouched = record.seq

    def end(self) -> None:
        """Take the end of the trail. Raises: Wrong."""
        if not self._needed or self._first <= 1 or self.vouched:
            return
        if self._later:
            raise Wrong("unreadable", "a later release removed what was before: verify with that one")
        raise Wrong("truncation", f"it begins with record {self._first}, and none says that those before were removed")
