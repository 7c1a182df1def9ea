"""Events that were lost between the kernel and us: it numbers them without gaps, so what is missing can be counted."""

from __future__ import annotations

_PATIENCE_S = 5.0
"""Seconds for which a number may come behind later ones: its event was long in the making, on another processor."""
_MOST = 10_000


class Gaps:
    """Watches the serial numbers of one boot."""

    def __init__(self, newest: int = 0) -> None:
        """Arguments: the newest number that is dealt with, from the run before; 0 where there was none."""
        self.newest = newest
        self._missing: dict[int, float] = {}
        self._lost = 0

    @property
    def waiting(self) -> bool:
        """Whether numbers are missing that may still come."""
        return bool(self._missing)

    def saw(self, serial: int, now: float) -> None:
        """A record of an event came, at ``now`` (monotonic seconds)."""
        if serial <= self.newest:
            self._missing.pop(serial, None)
            return
        # What lies before the first of a boot was never ours: nothing is known of it.
        missing = range(self.newest + 1, serial) if self.newest else range(0)
        fits = max(_MOST - len(self._missing), 0)
        self._lost += len(missing[fits:])
        self._missing |= dict.fromkeys(missing[:fits], now)
        self.newest = serial

    def lost(self, now: float) -> int:
        """How many events are lost that were not counted before."""
        gone = [serial for serial, since in self._missing.items() if now - since >= _PATIENCE_S]
        for serial in gone:
            del self._missing[serial]
        count, self._lost = self._lost + len(gone), 0
        return count
