"""Which operations were under way when: what the trail's intents and outcomes say of the time between them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vmm.audit.records import Entry

LONGEST_S = 3600.0
"""An operation without an outcome counts no longer: whoever was to record it has died."""
_KEPT_S = 900.0
"""For so long one that has ended is known; whoever asks comes soon."""
_SLACK_S = 2.0
"""Between two clocks of one host: the kernel's coarse one, and a step of the time in between."""
_MOST = 4096


@dataclass
class _Operation:
    request: str
    type: str
    object: str
    begun: float
    ended: float | None = None

    def was_under_way(self, time: float) -> bool:
        end = self.begun + LONGEST_S if self.ended is None else self.ended
        return self.begun - _SLACK_S <= time <= end + _SLACK_S


class Operations:
    """Kept in memory only: the newest of one run of the daemon, and what the run before left open."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Operation] = {}

    def note(self, entry: Entry, time: float) -> None:
        """A record was stored: an intent begins an operation, its outcome ends it. ``time`` is in seconds, UTC."""
        key = (entry.request, entry.type)
        if entry.phase == "intent":
            self._forget(time)
            self._known[key] = _Operation(entry.request, entry.type, entry.object.id, time)
        elif entry.phase == "outcome" and key in self._known:
            self._known[key].ended = time

    def find(self, object: str, types: Collection[str], time: float) -> str:
        """The request of the newest operation of these types on an object (or on none in particular) that was under
        way at ``time`` (seconds, UTC); "" when there was none.
        """
        fitting = (one for one in reversed(self._known.values()) if one.type in types and one.object in ("", object))
        return next((one.request for one in fitting if one.was_under_way(time)), "")

    def _forget(self, now: float) -> None:
        for key, one in list(self._known.items()):
            old = one.begun + LONGEST_S if one.ended is None else one.ended
            if old + _KEPT_S >= now and len(self._known) < _MOST:
                return
            del self._known[key]
