"""Records that strangers can cause: as many as the trail can bear, the rest as a count."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from vmm.audit.records import Entry
from vmm.errors import Unavailable

BURST = 5
INTERVAL = 10.0
"""Seconds for which one more record is saved up."""


class Throttle:
    """Writes up to BURST records of a kind at once, then one every INTERVAL.

    The one that follows suppressed ones says how many in ``extra.suppressed``; it is the newest of them.
    """

    def __init__(
        self, append: Callable[[Entry], Awaitable[int]], name: str, *, burst: int = BURST, interval: float = INTERVAL
    ) -> None:
        """Arguments: ``append`` puts a durable record or raises Unavailable; ``name`` of the daemon, for the journal;
        ``interval`` is in seconds.
        """
        self._append = append
        self._name = name
        self._burst = burst
        self._interval = interval
        self._tokens = float(burst)
        self._filled = 0.0
        self._held: Entry | None = None
        self._suppressed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def report(self, entry: Entry) -> None:
        """Write a record soon, or count it; never waits and never fails."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) / self._interval)
        self._filled = now
        if self._tokens >= 1 and self._held is None:
            self._tokens -= 1
            self._start(self._write(entry))
            return
        if self._held is not None:
            self._suppressed += 1
        self._held = entry
        if self._timer is None:
            self._timer = loop.call_later((1 - self._tokens) * self._interval, self._flush)

    def is_rested(self) -> bool:
        """Whether it could as well be new: nothing held back or being written, and its burst saved up again."""
        rest = asyncio.get_running_loop().time() - self._filled
        return self._held is None and not self._tasks and rest >= self._burst * self._interval

    @property
    def busy(self) -> bool:
        """Whether a record is held back or being written."""
        return self._held is not None or bool(self._tasks)

    async def close(self) -> None:
        """Write what is held back and wait until all records are written or refused."""
        if self._timer is not None:
            self._timer.cancel()
        self._flush()
        await asyncio.gather(*self._tasks)

    def _flush(self) -> None:
        self._timer = None
        if self._held is not None:
            extra = self._held.extra | ({"suppressed": self._suppressed} if self._suppressed else {})
            self._start(self._write(msgspec.structs.replace(self._held, extra=extra)))
            self._held, self._suppressed, self._tokens = None, 0, 0.0
            self._filled = asyncio.get_running_loop().time()

    def _start(self, write: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(write)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, entry: Entry) -> None:
        try:
            await self._append(entry)
        except Unavailable as error:
            line = f"{self._name}: {entry.type} of {entry.actor.origin} not recorded: {error.message}"
            print(line, file=sys.stderr, flush=True)
