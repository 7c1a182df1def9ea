"""Enrolled identities in the database. Each function is one step of a transaction on the database's own thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from vmm.config.types import Role
from vmm.errors import NotFound, UserError


@dataclass(frozen=True)
class Row:
    """An identity as stored; ``machines`` are (id, name) of those that it is limited to."""

    fingerprint: str
    name: str
    role: Role
    certificate: str
    enrolled: str
    enrolled_by: str
    machines: tuple[tuple[str, str], ...] = ()


_SELECT = "SELECT fingerprint, name, role, certificate, enrolled, enrolled_by FROM identities "


def rows(connection: sqlite3.Connection) -> list[Row]:
    """All identities, by name."""
    found = connection.execute(_SELECT + "ORDER BY name").fetchall()
    return [_row(connection, columns) for columns in found]


def find(connection: sqlite3.Connection, fingerprint: str) -> Row | None:
    """The identity that has the certificate with this fingerprint."""
    found = connection.execute(_SELECT + "WHERE fingerprint = ?", (fingerprint,)).fetchone()
    return _row(connection, found) if found else None


def row(connection: sqlite3.Connection, name: str) -> Row:
    """One identity. Raises: NotFound."""
    found = connection.execute(_SELECT + "WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise NotFound(f"there is no identity {name!r}")
    return _row(connection, found)


def scope(connection: sqlite3.Connection, fingerprint: str) -> frozenset[UUID]:
    """The ids of the machines that an identity is limited to."""
    found = connection.execute("SELECT machine_id FROM scopes WHERE fingerprint = ?", (fingerprint,))
    return frozenset(UUID(id) for (id,) in found)


def insert(connection: sqlite3.Connection, new: Row, machines: Sequence[str]) -> None:
    """Add an identity, of a new name and certificate. Raises: UserError naming a machine that is not there."""
    connection.execute(
        "INSERT INTO identities (fingerprint, name, role, certificate, enrolled, enrolled_by) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (new.fingerprint, new.name, new.role, new.certificate, new.enrolled, new.enrolled_by),
    )
    set_machines(connection, new.fingerprint, machines)


def set_role(connection: sqlite3.Connection, fingerprint: str, role: Role) -> None:
    """Give an identity another role."""
    connection.execute("UPDATE identities SET role = ? WHERE fingerprint = ?", (role, fingerprint))


def set_machines(connection: sqlite3.Connection, fingerprint: str, names: Sequence[str]) -> None:
    """Limit an identity to the machines that have these names now. Raises: UserError naming one that is not there."""
    connection.execute("DELETE FROM scopes WHERE fingerprint = ?", (fingerprint,))
    for position, name in enumerate(names):
        found = connection.execute("SELECT id FROM machines WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise UserError(f"machines[{position}]: there is no machine {name!r}")
        connection.execute(
            "INSERT OR IGNORE INTO scopes (fingerprint, machine_id) VALUES (?, ?)", (fingerprint, *found)
        )


def delete(connection: sqlite3.Connection, fingerprint: str) -> None:
    """Forget an identity."""
    connection.execute("DELETE FROM identities WHERE fingerprint = ?", (fingerprint,))


def _row(connection: sqlite3.Connection, columns: tuple[Any, ...]) -> Row:
    machines = connection.execute(
        "SELECT id, name FROM scopes JOIN machines ON id = machine_id WHERE fingerprint = ? ORDER BY name", columns[:1]
    )
    return replace(Row(*columns), machines=tuple(machines))
