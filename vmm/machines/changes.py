"""What is changed of a machine: its name, what is said of it, what it does by itself, its hardware."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from vmm.errors import Conflict, UserError
from vmm.machines import store
from vmm.machines.service import Machines
from vmm.machines.types import (
    Autostart,
    Cpus,
    Description,
    HostStop,
    Machine,
    Memory,
    Networks,
    OnCrash,
    StopTimeout,
    Tags,
)
from vmm.volumes.store import Database
from vmm.volumes.types import Name

HARDWARE = ("cpus", "memory", "networks")


class Renaming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which machine gets which name."""

    name: Name
    to: Name


class Describing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is said of a machine; what is not named stays."""

    name: Name
    description: Description | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET


class Changing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a machine is to be; what is not named stays. ``memory`` is in bytes.

    ``networks`` are all its network cards; a card's MAC address is that of its place.
    """

    name: Name
    cpus: Cpus | UnsetType = UNSET
    memory: Memory | UnsetType = UNSET
    networks: Networks | UnsetType = UNSET
    host_stop: HostStop | UnsetType = UNSET
    stop_timeout: StopTimeout | UnsetType = UNSET
    autostart: Autostart | None | UnsetType = UNSET
    on_crash: OnCrash | UnsetType = UNSET


class Changes:
    """Changes of machines, whether they run or not. Calls on one machine are done one after another."""

    def __init__(self, machines: Machines, database: Database) -> None:
        self._machines = machines
        self._database = database

    async def rename(self, wanted: Renaming) -> Machine:
        """Give a machine another name. Raises: NotFound; Conflict when the name is taken, or the machine is saved."""
        async with self._machines.turns.take(wanted.name) as row:
            self._check_unsaved(row)
            await self._database.run(partial(store.rename, id=row.id, name=wanted.to))
        return await self._machines.show(wanted.to)

    async def describe(self, wanted: Describing) -> Machine:
        """Change what is said of a machine. Raises: NotFound; UserError when nothing is named."""
        return await self._amend(wanted)

    async def change(self, wanted: Changing) -> Machine:
        """Change what a machine is. Hardware of one that runs changes with its next start.

        Raises: NotFound; UserError naming the field; Conflict when hardware of a saved one is to change; Unavailable.
        """
        return await self._amend(wanted)

    async def _amend(self, wanted: Describing | Changing) -> Machine:
        fields: dict[str, Any] = {k: v for k, v in msgspec.structs.asdict(wanted).items() if v is not UNSET}
        del fields["name"]
        if not fields:
            raise UserError("nothing is to be changed", hint="Name at least one field.")
        async with self._machines.turns.take(wanted.name) as row:
            hardware = {name: fields[name] for name in HARDWARE if name in fields}
            if hardware:
                self._check_unsaved(row)
                self._machines.plans.check(msgspec.structs.replace(row.spec.hardware, **hardware))
            await self._database.run(partial(store.amend, id=row.id, fields=fields))
        return await self._machines.view(row.id)

    def _check_unsaved(self, row: store.Row) -> None:
        """A saved state belongs to the domain that it was taken of. Raises: Conflict."""
        self._machines.permit_change(row)
        if row.saved is not None and row.saved.unused:
            raise Conflict(f"the machine {row.spec.name!r} is saved", hint="Start it, or discard its state: force-off.")
