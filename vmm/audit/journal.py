"""How many tasks write to one store: together, and one after the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from vmm.audit.records import Entry, Producer
from vmm.audit.spare import Spare
from vmm.audit.store import MAX_BATCH, Draft, Store

_T = TypeVar("_T")


class Journal:
    """Appends to a store from many tasks: whatever waits while the disk is busy shares the next sync.

    ``sealed`` and ``ended`` are set whenever a segment was begun, and with it the one before ended.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sealed = asyncio.Event()
        self.ended = asyncio.Event()
        self._spare = Spare(store.producer.uid)
        self._disk = asyncio.Lock()
        self._waiting: list[tuple[Draft, asyncio.Future[int]]] = []
        self._wake = asyncio.Event()
        self._news = asyncio.Event()

    async def wait_beyond(self, seq: int, seconds: float) -> None:
        """Return once there are records above a number, at the latest after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.store.end[0] <= seq:
                    await self._news.wait()

    async def append(self, entry: Entry, producer: Producer) -> int:
        """Store an entry; returns its number once it is durable. Raises: Unavailable."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((Draft(entry, producer), future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Commit what comes in until the store breaks."""
        while not self.store.broken:
            await self._wake.wait()
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            if not self._waiting:
                self._wake.clear()
            await self._commit(batch)

    async def between(self, work: Callable[[], _T]) -> _T:
        """Do something with the store while nothing is written to it. Raises: what ``work`` raises."""

        async def alone() -> _T:
            async with self._disk:
                before = self.store.end, self.store.segments.newest
                try:
                    return await asyncio.to_thread(work)
                finally:
                    self._tell(*before)
                    if self.store.end != before[0]:
                        # A removal is to be proven soon.
                        self.sealed.set()
                    if self.store.broken:
                        self._wake.set()

        # Whoever waits may be cancelled; the thread goes on, and nobody may write beside it.
        return await asyncio.shield(asyncio.ensure_future(alone()))

    async def _commit(self, batch: Sequence[tuple[Draft, asyncio.Future[int]]]) -> None:
        async with self._disk:
            failure = await self._put(batch)
            if failure is not None and self.store.full:
                if vital := [one for one in batch if self._spare.admits(one[0])]:
                    await self._put(vital, vital=True)
            elif failure is None:
                self._spare.clear()
        for _, future in batch:
            if failure is not None and not future.done():
                future.set_exception(failure)

    async def _put(
        self, batch: Sequence[tuple[Draft, asyncio.Future[int]]], *, vital: bool = False
    ) -> Exception | None:
        """Store a batch and say so to all who wait for it; why it could not be stored, None if it was."""
        waiting = [(future, index) for index, (_, future) in enumerate(batch)]
        before = self.store.end, self.store.segments.newest
        try:
            numbers = await asyncio.to_thread(self.store.append, [draft for draft, _ in batch], vital=vital)
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            return error
        finally:
            self._tell(*before)
        for future, index in waiting:
            if not future.done():
                future.set_result(numbers[index])
        return None

    def _tell(self, end: tuple[int, str], segment: int) -> None:
        """Wake up whoever waits for what the store has since it stood so."""
        if self.store.end != end:
            # Whoever waits now goes on; who waits from now on waits for the next.
            self._news.set()
            self._news = asyncio.Event()
        if self.store.segments.newest != segment:
            self.sealed.set()
            self.ended.set()
