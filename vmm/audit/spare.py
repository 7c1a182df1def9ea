"""Who may still write when the store is full: whoever can end that, and what has to be said of it.

The spare room has to last until an auditor comes, so nobody else gets at it more than a little.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vmm.audit.records import REFUSED
from vmm.audit.store import Draft

_OF_A_PURGE = ("session.start", "session.end", "audit.status", "audit.purge")
MOST = 64
"""Records of a purge, and of the sessions that it takes, by each certificate while the store is full."""


class Spare:
    """Counts what is written to the spare room."""

    def __init__(self, own: int) -> None:
        """Arguments: ``own`` is the audit daemon's uid, whose records are all needed but those that strangers cause."""
        self._own = own
        self._taken: Counter[Any] = Counter()

    def admits(self, draft: Draft) -> bool:
        """Whether an entry may be written now, which counts."""
        entry, producer = draft
        if producer.uid == self._own:
            return entry.type != REFUSED
        if entry.type not in _OF_A_PURGE:
            return False
        self._taken[entry.actor.certificate] += 1
        return self._taken[entry.actor.certificate] <= MOST

    def clear(self) -> None:
        """The store is full no more."""
        self._taken.clear()
