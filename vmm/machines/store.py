"""Machines in the database. Each function is one step of a transaction on the database's own thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import msgspec

from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.machines import savedrows
from vmm.machines.scope import missing
from vmm.machines.types import Hardware, MachineSpec

FIRST_UID, LAST_UID = 70000, 79999
"""Each machine's QEMU runs under a uid (and gid) of its own out of these."""
MOST_TRIES = 3
"""How often a machine is started again by itself before that is given up."""

Power = Literal["off", "on", "resume"]


@dataclass(frozen=True)
class Held:
    """A machine may not run: since when, by whom and why."""

    since: str
    by: str
    why: str


class _StoredSpec(MachineSpec, frozen=True, forbid_unknown_fields=False):
    """A specification that a newer release, from which the host fell back, may have written."""


@dataclass(frozen=True)
class Row:
    """A machine as stored; ``volumes`` are the ids of its disks' volumes, in order.

    ``power`` is "on" while it runs, "resume" when it is to be started because the host stopped under it.
    """

    id: UUID
    spec: MachineSpec
    uid: int
    created: str
    power: Power
    volumes: tuple[str, ...]
    started: Hardware | None = None
    saved: savedrows.Saved | None = None
    held: Held | None = None

    @property
    def running(self) -> Hardware:
        """What its domain has, if it has one: what that was started with."""
        return self.spec.hardware if self.started is None else self.started


_SELECT = (
    f"SELECT id, spec, uid, created, power, started, held_since, held_by, held_why, {savedrows.COLUMNS} FROM machines "
    "LEFT JOIN saved ON saved.machine_id = id LEFT JOIN holds ON holds.machine_id = id "
)


def rows(connection: sqlite3.Connection) -> list[Row]:
    """All machines, by name."""
    return [_row(connection, found) for found in connection.execute(_SELECT + "ORDER BY name").fetchall()]


def row(connection: sqlite3.Connection, name: str) -> Row:
    """One machine. Raises: NotFound."""
    found = connection.execute(_SELECT + "WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise missing(name)
    return _row(connection, found)


def row_of(connection: sqlite3.Connection, id: UUID) -> Row:
    """One machine. Raises: NotFound when it is gone."""
    found = connection.execute(_SELECT + "WHERE id = ?", (str(id),)).fetchone()
    if found is None:
        raise NotFound("the machine was deleted")
    return _row(connection, found)


def to_resume(connection: sqlite3.Connection) -> list[str]:
    """Names of the machines that are to be started, in this order: first those that ran when the host stopped.

    What is held waits for its release.
    """
    found = connection.execute(
        "SELECT name FROM machines WHERE power = 'resume' AND NOT EXISTS (SELECT 1 FROM holds WHERE machine_id = id) "
        "ORDER BY autostarting, json_extract(spec, '$.autostart') NULLS LAST, name"
    )
    return [name for (name,) in found]


def insert(connection: sqlite3.Connection, id: UUID, spec: MachineSpec, created: str) -> Row:
    """Add a machine with a uid of its own and take its volumes.

    Raises: Conflict when the name or a volume is taken; UserError naming a disk whose volume does not exist.
    """
    if connection.execute("SELECT 1 FROM machines WHERE name = ?", (spec.name,)).fetchone():
        raise Conflict(f"there is already a machine {spec.name!r}")
    connection.execute(
        "INSERT INTO machines (id, name, spec, uid, created) VALUES (?, ?, ?, ?, ?)",
        (str(id), spec.name, msgspec.json.encode(spec).decode(), take_uid(connection), created),
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


def begin_boot(connection: sqlite3.Connection, boot: str) -> None:
    """Note in which boot core runs. In a new one, what ran in the one before is to be started again."""
    (previous,) = connection.execute("SELECT boot FROM host").fetchone()
    savedrows.begin_boot(connection, boot, previous)
    if previous != boot:
        connection.execute("UPDATE host SET boot = ?", (boot,))
        # Those are starts that never came to an end: each may be what ended the host.
        connection.execute("UPDATE machines SET power = 'off' WHERE power = 'resume' AND tries >= ?", (MOST_TRIES,))
        connection.execute("UPDATE machines SET power = 'resume', tries = 0, autostarting = 0 WHERE power = 'on'")
        # Those that were given up keep their tries, and wait for somebody to start them.
        connection.execute(
            "UPDATE machines SET power = 'resume', autostarting = 1 "
            "WHERE power = 'off' AND tries < ? AND json_extract(spec, '$.autostart') IS NOT NULL",
            (MOST_TRIES,),
        )


def set_power(connection: sqlite3.Connection, id: UUID, power: Power) -> None:
    """Note whether a machine runs, or is to run; what was tried before is forgotten."""
    connection.execute("UPDATE machines SET power = ?, tries = 0 WHERE id = ?", (power, str(id)))
    if power == "on":
        savedrows.settle(connection, id)


def note_started(connection: sqlite3.Connection, id: UUID, hardware: Hardware) -> None:
    """A machine is about to be started with this hardware."""
    connection.execute(
        "UPDATE machines SET started = ? WHERE id = ?", (msgspec.json.encode(hardware).decode(), str(id))
    )


def rename(connection: sqlite3.Connection, id: UUID, name: str) -> None:
    """Give a machine another name. Raises: Conflict when a machine has it."""
    try:
        connection.execute(
            "UPDATE machines SET name = ?, spec = json_set(spec, '$.name', ?) WHERE id = ?", (name, name, str(id))
        )
    except sqlite3.IntegrityError:
        raise Conflict(f"there is already a machine {name!r}") from None


def amend(connection: sqlite3.Connection, id: UUID, fields: Mapping[str, Any]) -> None:
    """Change fields of a machine's specification; None is for those that have None as their default."""
    # What a newer release put in, and this one does not know, stays.
    patch = msgspec.json.encode(fields).decode()
    connection.execute("UPDATE machines SET spec = json_patch(spec, ?) WHERE id = ?", (patch, str(id)))


def note_end(connection: sqlite3.Connection, id: UUID) -> None:
    """Note that a machine's domain ended; one that is to run again, and of which a try failed, is still to."""
    connection.execute("UPDATE machines SET power = 'off', tries = 0 WHERE id = ? AND power = 'on'", (str(id),))


def count_try(connection: sqlite3.Connection, name: str) -> int:
    """Count a try to start a machine again, before it is made; 0 when it is no longer to be started."""
    connection.execute("UPDATE machines SET tries = tries + 1 WHERE name = ? AND power = 'resume'", (name,))
    found = connection.execute("SELECT tries FROM machines WHERE name = ? AND power = 'resume'", (name,)).fetchone()
    return int(found[0]) if found else 0


def _row(connection: sqlite3.Connection, found: tuple[Any, ...]) -> Row:
    id, spec, uid, created, power, started, since, by, why, *columns = found
    volumes = connection.execute("SELECT volume_id FROM disks WHERE machine_id = ? ORDER BY position", (id,))
    saved = None if columns[0] is None else savedrows.made(*columns)
    spec = msgspec.json.decode(spec, type=_StoredSpec)
    hardware = None if started is None else msgspec.json.decode(started, type=Hardware)
    held = None if since is None else Held(since, by, why)
    return Row(UUID(id), spec, uid, created, power, tuple(volume for (volume,) in volumes), hardware, saved, held)


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


def take_uid(connection: sqlite3.Connection) -> int:
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
