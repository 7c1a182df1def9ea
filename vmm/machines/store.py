"""Machines in the database. Each function is one step of a transaction on the database's own thread."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from uuid import UUID

import msgspec

from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.machines.types import MachineSpec

FIRST_UID, LAST_UID = 70000, 79999
"""Each machine's QEMU runs under a uid (and gid) of its own out of these."""


@dataclass(frozen=True)
class Row:
    """A machine as stored; ``volumes`` are the ids of its disks' volumes, in order."""

    id: UUID
    spec: MachineSpec
    uid: int
    created: str
    volumes: tuple[str, ...]

    @property
    def spec_sha256(self) -> str:
        """What the metadata of this machine's domain must say."""
        return self.spec.sha256(self.id)


_SELECT = "SELECT id, spec, uid, created FROM machines "


def rows(connection: sqlite3.Connection) -> list[Row]:
    """All machines, by name."""
    return [_row(connection, found) for found in connection.execute(_SELECT + "ORDER BY name").fetchall()]


def row(connection: sqlite3.Connection, name: str) -> Row:
    """One machine. Raises: NotFound."""
    found = connection.execute(_SELECT + "WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise NotFound(f"there is no machine {name!r}")
    return _row(connection, found)


def insert(connection: sqlite3.Connection, id: UUID, spec: MachineSpec, created: str) -> Row:
    """Add a machine with a uid of its own and take its volumes.

    Raises: Conflict when the name or a volume is taken; UserError naming a disk whose volume does not exist.
    """
    if connection.execute("SELECT 1 FROM machines WHERE name = ?", (spec.name,)).fetchone():
        raise Conflict(f"there is already a machine {spec.name!r}")
    connection.execute(
        "INSERT INTO machines (id, name, spec, uid, created) VALUES (?, ?, ?, ?, ?)",
        (str(id), spec.name, msgspec.json.encode(spec).decode(), _take_uid(connection), created),
    )
    for position, disk in enumerate(spec.disks):
        volume = _free_volume(connection, f"disks[{position}].volume", disk.volume)
        connection.execute(
            "INSERT INTO disks (machine_id, position, volume_id) VALUES (?, ?, ?)", (str(id), position, volume)
        )
    return row(connection, spec.name)


def delete(connection: sqlite3.Connection, id: UUID) -> None:
    """Forget a machine; its volumes are free again."""
    connection.execute("DELETE FROM machines WHERE id = ?", (str(id),))


def _row(connection: sqlite3.Connection, found: tuple[str, str, int, str]) -> Row:
    id, spec, uid, created = found
    volumes = connection.execute("SELECT volume_id FROM disks WHERE machine_id = ? ORDER BY position", (id,))
    return Row(
        UUID(id), msgspec.json.decode(spec, type=MachineSpec), uid, created, tuple(volume for (volume,) in volumes)
    )


def _free_volume(connection: sqlite3.Connection, field: str, name: str) -> str:
    found = connection.execute(
        "SELECT volumes.id, volumes.state, machines.name FROM volumes "
        "LEFT JOIN disks ON disks.volume_id = volumes.id LEFT JOIN machines ON machines.id = disks.machine_id "
        "WHERE volumes.name = ?",
        (name,),
    ).fetchone()
    if found is None:
        raise UserError(f"{field}: there is no volume {name!r}")
    id, state, machine = found
    if machine is not None:
        raise Conflict(f"{field}: the volume {name!r} belongs to the machine {machine!r}")
    if state != "ready":
        raise Conflict(f"{field}: the volume {name!r} is {state}")
    return str(id)


def _take_uid(connection: sqlite3.Connection) -> int:
    """The next free uid. They go round in a ring, so that one is used again as late as possible."""
    (start,) = connection.execute("SELECT next FROM uid_ring").fetchone()
    taken = {uid for (uid,) in connection.execute("SELECT uid FROM machines")}
    count = LAST_UID - FIRST_UID + 1
    for offset in range(count):
        uid = FIRST_UID + (int(start) - FIRST_UID + offset) % count
        if uid not in taken:
            following = FIRST_UID + (uid - FIRST_UID + 1) % count
            connection.execute("UPDATE uid_ring SET next = ?", (following,))
            return uid
    raise Unavailable(
        f"all {count} user ids for machines are in use", hint="Delete machines that are no longer needed."
    )
