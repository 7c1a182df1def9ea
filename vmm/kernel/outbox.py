"""Records on their way to the audit daemon: as many as the trail can bear, each kind counted by itself, none given up
because the daemon is gone for a while.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from vmm.audit.client import Entry, Refused
from vmm.audit.throttle import BURST, INTERVAL, Throttle
from vmm.errors import Unavailable

_RETRY_S = 1.0
_MOST_WAITING = 1000
_MOST_KINDS = 256


class Rate(NamedTuple):
    """So many at once, then one in so many seconds."""

    burst: int
    interval: float


RATES: Mapping[str, Rate] = {
    # Only root loads modules and only libvirt speaks for itself; a host that starts does much of both.
    "kernel.module": Rate(64, 1.0),
    "libvirt.control": Rate(30, 1.0),
    "libvirt.resource": Rate(30, 1.0),
    "libvirt.unasked": Rate(30, 1.0),
}
"""Of types that need another than what strangers can cause."""


class Outbox:
    """Writes records; a flood of one type by one machine or user leaves room for all others."""

    def __init__(self, append: Callable[[Entry], Awaitable[int]], *, retry: float = _RETRY_S) -> None:
        """Arguments: ``append`` as the audit client has it; ``retry`` is in seconds."""
        self._append = append
        self._retry = retry
        self._throttles: OrderedDict[tuple[str, str], Throttle] = OrderedDict()
        self._waiting = 0
        self.dropped = 0
        """How many records were given up: too many others waited for the audit daemon."""

    def report(self, entry: Entry, who: str) -> None:
        """Write a record soon, or count it; never waits and never fails."""
        self._throttle(entry.type, who).report(entry)

    @property
    def busy(self) -> bool:
        """Whether anything is not written yet."""
        return self._waiting > 0 or any(throttle.busy for throttle in self._throttles.values())

    async def append(self, entry: Entry) -> int:
        """Write a record, however long it takes. Raises: Unavailable when too many wait already; Refused."""
        if self._waiting >= _MOST_WAITING:
            self.dropped += 1
            raise Unavailable("too many records wait for the audit daemon")
        self._waiting += 1
        try:
            while True:
                try:
                    return await self._append(entry)
                except Refused:
                    raise
                except Unavailable:
                    await asyncio.sleep(self._retry)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Write what is held back; returns once all is written or refused."""
        for throttle in list(self._throttles.values()):
            await throttle.close()

    def _throttle(self, type: str, who: str) -> Throttle:
        key = (type, who)
        if key not in self._throttles and len(self._throttles) >= _MOST_KINDS:
            rested = next((old for old, throttle in self._throttles.items() if throttle.is_rested()), None)
            if rested is None:
                key = (type, "")  # all that come now share one
            else:
                del self._throttles[rested]
        if key not in self._throttles:
            rate = RATES.get(type, Rate(BURST, INTERVAL))
            self._throttles[key] = Throttle(self.append, "kernel", burst=rate.burst, interval=rate.interval)
        self._throttles.move_to_end(key)
        return self._throttles[key]
