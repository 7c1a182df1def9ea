"""Machines that are held: they stand still, and nothing lets them run on until an administrator releases them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import suppress
from functools import partial
from typing import Annotated
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from vmm.clock import rfc3339
from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor.types import Hypervisor, State
from vmm.machines import store
from vmm.machines.service import Machines
from vmm.machines.types import Machine
from vmm.volumes.store import Database
from vmm.volumes.types import Name


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which machine is to be held, by its name or its id, and why."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
    name: Name | UnsetType = UNSET
    id: UUID | UnsetType = UNSET


class Holds:
    """Holds and releases machines. Calls on one machine are done one after another."""

    def __init__(self, machines: Machines, hypervisor: Hypervisor, database: Database) -> None:
        self._machines = machines
        self._hypervisor = hypervisor
        self._database = database
        self._enforcing: asyncio.Task[None] | None = None
        hypervisor.subscribe(self._on_change)

    async def hold(self, wanted: Holding, by: str) -> Machine:
        """Let a machine stand still, if it runs, and not start, if it does not; one that is held stays so.

        Raises: NotFound; UserError unless either its name or its id is given; Unavailable when it cannot be paused
        now: then it is held all the same, and paused as soon as that can be done.
        """
        if (wanted.name is UNSET) == (wanted.id is UNSET):
            raise UserError("name: either it or id says which machine is to be held")
        id = wanted.id if isinstance(wanted.id, UUID) else (await self._machines.turns.stored(str(wanted.name))).id
        async with self._machines.turns.lock(id):
            await self._machines.turns.now(id)
            since = rfc3339(time.time())
            await self._database.run(partial(_insert, id=id, since=since, by=by, why=wanted.reason))
            await self._still(id)
        return await self._machines.view(id)

    async def release(self, name: str) -> Machine:
        """Hold a machine no more; it stays paused, or off, as it is. Raises: NotFound; Conflict when it is not held."""
        async with self._machines.turns.take(name) as row:
            if row.held is None:
                raise Conflict(f"the machine {name!r} is not held")
            await self._database.run(partial(_delete, id=row.id))
        return await self._machines.view(row.id)

    async def enforce(self) -> None:
        """Pause what is held and runs: core, or libvirt, went away before that was done."""
        with suppress(Unavailable):  # as soon as libvirt is back
            for row in await self._database.run(store.rows):
                if row.held is not None:
                    async with self._machines.turns.lock(row.id):
                        with suppress(NotFound):
                            if (await self._machines.turns.now(row.id)).held is not None:
                                await self._still(row.id)

    async def _still(self, id: UUID) -> None:
        if await self._hypervisor.state(id) is State.RUNNING:
            with suppress(NotFound):  # it ended meanwhile
                await self._hypervisor.pause(id)

    def _on_change(self, id: UUID | None, _state: State, _crashed: bool) -> None:
        if id is None:
            self._enforcing = asyncio.get_running_loop().create_task(self.enforce())


def _insert(connection: sqlite3.Connection, id: UUID, since: str, by: str, why: str) -> None:
    # The first reason counts: what came after may be a consequence.
    connection.execute("INSERT OR IGNORE INTO holds VALUES (?, ?, ?, ?)", (str(id), since, by, why))


def _delete(connection: sqlite3.Connection, id: UUID) -> None:
    connection.execute("DELETE FROM holds WHERE machine_id = ?", (str(id),))
