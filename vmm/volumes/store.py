"""Volumes in the database. Each function is one step of a transaction on the database's own thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from vmm.errors import Conflict, NotFound, Unavailable

T = TypeVar("T")


class Database(Protocol):
    """Where state is kept; vmm.core.db has the real one."""

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in one durable transaction: all of it happens or, when it raises, nothing."""


@dataclass(frozen=True)
class Row:
    """A volume as stored; ``machine`` is the name of the machine that has it."""

    id: str
    name: str
    size: int
    state: str
    created: str
    machine: str | None


_SELECT = """
    SELECT volumes.id, volumes.name, volumes.size, volumes.state, volumes.created, machines.name
    FROM volumes LEFT JOIN disks ON disks.volume_id = volumes.id LEFT JOIN machines ON machines.id = disks.machine_id
"""


def rows(connection: sqlite3.Connection) -> list[Row]:
    """All volumes, by name."""
    return [Row(*row) for row in connection.execute(_SELECT + "ORDER BY volumes.name")]


def row(connection: sqlite3.Connection, name: str) -> Row:
    """One volume. Raises: NotFound."""
    found = connection.execute(_SELECT + "WHERE volumes.name = ?", (name,)).fetchone()
    if found is None:
        raise NotFound(f"there is no volume {name!r}")
    return Row(*found)


def insert(connection: sqlite3.Connection, new: Row, capacity: int, staged: int) -> None:
    """Add a volume if its size can be promised.

    Arguments: ``capacity`` is what all volumes may take together, ``staged`` what uploads take now, in bytes.
    Raises: Conflict when the name is taken; Unavailable, with the figures, when the space is.
    """
    admit(connection, new.name, new.size, capacity, staged)
    connection.execute(
        "INSERT INTO volumes (id, name, size, state, created) VALUES (?, ?, ?, ?, ?)",
        (new.id, new.name, new.size, new.state, new.created),
    )


def admit(connection: sqlite3.Connection, name: str, wanted: int, capacity: int, staged: int) -> None:
    """Check that a volume may have this name, and ``wanted`` more bytes. Raises: as insert does."""
    if connection.execute("SELECT 1 FROM volumes WHERE name = ?", (name,)).fetchone():
        raise Conflict(f"there is already a volume {name!r}")
    promised = connection.execute("SELECT coalesce(sum(size), 0) FROM volumes").fetchone()[0] + staged
    # Machines' saved states lie beside the volumes, until they are resumed.
    promised += connection.execute("SELECT coalesce(sum(size), 0) FROM saved").fetchone()[0]
    if promised + wanted > capacity:
        raise Unavailable(
            f"not enough disk space: {wanted} bytes are wanted, {max(capacity - promised, 0)} are left "
            f"of {capacity} (volumes and uploads have {promised})",
            hint="Delete volumes that are no longer needed.",
        )


def set_state(connection: sqlite3.Connection, id: str, state: str) -> None:
    """Move a volume to another state."""
    connection.execute("UPDATE volumes SET state = ? WHERE id = ?", (state, id))


def mark_deleting(connection: sqlite3.Connection, name: str) -> Row:
    """Begin a deletion. Raises: NotFound; Conflict while a machine has the volume or it is being made."""
    found = row(connection, name)
    if found.machine is not None:
        raise Conflict(
            f"the volume {name!r} belongs to the machine {found.machine!r}", hint="Delete the machine first."
        )
    if found.state == "creating":
        raise Conflict(f"the volume {name!r} is still being made")
    set_state(connection, found.id, "deleting")
    return found


def delete(connection: sqlite3.Connection, id: str) -> None:
    """Forget a volume whose file is gone."""
    connection.execute("DELETE FROM volumes WHERE id = ?", (id,))
