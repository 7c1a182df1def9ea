"""Saved states in the database. Each function is one step of a transaction on the database's own thread."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

Phase = Literal["saving", "saved", "resuming", "resumed", "lost"]


@dataclass(frozen=True)
class Saved:
    """A saved state as stored: see vmm/core/schema-3.sql."""

    phase: Phase
    boot: str
    since: str
    size: int
    domain: str
    disks: str
    reason: str
    told: bool

    @property
    def unused(self) -> bool:
        """Whether no processor has run on from it, so that a domain that is paused was left behind by a try."""
        return self.phase in ("saved", "resuming")


COLUMNS = "phase, boot, since, size, domain, disks, reason, told"


def made(phase: Phase, boot: str, since: str, size: int, domain: str, disks: str, reason: str, told: int) -> Saved:
    """A row's columns as what they mean."""
    return Saved(phase, boot, since, size, domain, disks, reason, bool(told))


def begin(connection: sqlite3.Connection, id: UUID, since: str, domain: str) -> None:
    """A machine's state is about to be saved; what was known of an earlier one is forgotten."""
    connection.execute(
        "INSERT OR REPLACE INTO saved (machine_id, phase, boot, since, domain) "
        "SELECT id, 'saving', (SELECT boot FROM host), ?, ? FROM machines WHERE id = ?",
        (since, domain, str(id)),
    )


def complete(connection: sqlite3.Connection, id: UUID, size: int, disks: str) -> None:
    """The file is whole and durable, and ``disks`` what it belongs to."""
    connection.execute(
        "UPDATE saved SET phase = 'saved', size = ?, disks = ? WHERE machine_id = ?", (size, disks, str(id))
    )


def use(connection: sqlite3.Connection, id: UUID) -> None:
    """The machine is about to run on from it; from here on it is not to be resumed again."""
    connection.execute("UPDATE saved SET phase = 'resuming', size = 0 WHERE machine_id = ?", (str(id),))


def settle(connection: sqlite3.Connection, id: UUID) -> None:
    """The machine runs; if that was to be from its state, it is."""
    connection.execute("UPDATE saved SET phase = 'resumed' WHERE machine_id = ? AND phase = 'resuming'", (str(id),))


def lose(connection: sqlite3.Connection, id: UUID, reason: str, told: bool) -> None:
    """It is not to be resumed, for ``reason``; ``told`` says whether that is on record."""
    connection.execute(
        "UPDATE saved SET phase = 'lost', size = 0, reason = ?, told = ? WHERE machine_id = ?",
        (reason, told, str(id)),
    )


def forget(connection: sqlite3.Connection, id: UUID) -> None:
    """There is nothing to say of a saved state."""
    connection.execute("DELETE FROM saved WHERE machine_id = ?", (str(id),))


def begin_boot(connection: sqlite3.Connection, boot: str, previous: str) -> None:
    """Core begins, for the first time in ``boot`` or again; ``previous`` is the boot in which it last did."""
    lose = "UPDATE saved SET phase = 'lost', size = 0, reason = ?, told = 0 WHERE phase = ?"
    if boot == previous:
        connection.execute(lose, ("the service ended while it was being saved", "saving"))
        return
    connection.execute(lose, ("the host stopped while it was being saved", "saving"))
    connection.execute(lose, ("the host stopped while it was being resumed", "resuming"))
    # Another release may have started the machine, and so changed its disks.
    reason = "a release that cannot resume it ran in between"
    connection.execute(f"{lose} AND boot <> ?", (reason, "saved", previous))
    connection.execute("UPDATE saved SET boot = ? WHERE phase = 'saved'", (boot,))
