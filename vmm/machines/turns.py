"""Who changes a machine: one call at a time, found by the name that it has when the call comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID
from weakref import WeakValueDictionary

from vmm.machines import store
from vmm.machines.scope import is_within, missing
from vmm.volumes.store import Database


class Turns:
    """The machines as the database has them, and their locks."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._locks: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[store.Row]:
        """The machine of that name, while no other call changes it. Raises: NotFound."""
        id = (await self.stored(name)).id
        async with self.lock(id):
            # It may have been changed, renamed or deleted meanwhile.
            yield await self.now(id)

    def lock(self, id: UUID) -> asyncio.Lock:
        """What is held by whoever changes a machine."""
        lock = self._locks.get(id)
        if lock is None:
            lock = self._locks[id] = asyncio.Lock()
        return lock

    async def stored(self, name: str) -> store.Row:
        """One machine, by its name. Raises: NotFound, also for one that the caller may not know of."""
        row = await self._database.run(partial(store.row, name=name))
        if not is_within(row.id):
            raise missing(name)
        return row

    async def now(self, id: UUID) -> store.Row:
        """One machine, by its id, which it keeps when it is renamed. Raises: NotFound."""
        return await self._database.run(partial(store.row_of, id=id))
