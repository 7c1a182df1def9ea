"""Waiting for guests to end."""

from __future__ import annotations

import asyncio
from uuid import UUID


class Ends:
    """Who waits for the end of which domain."""

    def __init__(self) -> None:
        self._waiting: dict[UUID, list[asyncio.Event]] = {}

    @property
    def awaited(self) -> list[UUID]:
        """The domains whose ends are waited for."""
        return list(self._waiting)

    def expect(self, id: UUID) -> asyncio.Event:
        """Begin to listen, before the end is asked for; hand what is returned to wait() or forget()."""
        stopped = asyncio.Event()
        self._waiting.setdefault(id, []).append(stopped)
        return stopped

    async def wait(self, id: UUID, stopped: asyncio.Event, timeout: int) -> bool:
        """Wait up to ``timeout`` seconds for a domain's end; whether it came."""
        try:
            await asyncio.wait_for(stopped.wait(), timeout)
        except TimeoutError:
            return False
        finally:
            self.forget(id, stopped)
        return True

    def came(self, id: UUID) -> None:
        """A domain ended."""
        for stopped in self._waiting.get(id, ()):
            stopped.set()

    def forget(self, id: UUID, stopped: asyncio.Event) -> None:
        """Listen no more."""
        waiting = self._waiting.get(id, [])
        if stopped in waiting:
            waiting.remove(stopped)
        if not waiting:
            self._waiting.pop(id, None)
