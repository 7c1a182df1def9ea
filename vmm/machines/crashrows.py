"""Crashes of machines in the database: what becomes of one, decided and noted in one transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from uuid import UUID

from vmm.errors import NotFound
from vmm.hypervisor.types import State
from vmm.machines import store

MOST_RESTARTS = 3
WINDOW_S = 600.0
"""A machine is started again after at most so many crashes within so many seconds."""


@dataclass(frozen=True)
class Crash:
    """A machine crashed; ``count`` crashes of it count against the limit, and ``restarts`` is what follows."""

    id: UUID
    name: str
    count: int
    restarts: bool
    reason: str


def note(connection: sqlite3.Connection, id: UUID, now: float, state: State) -> Crash | None:
    """A machine crashed at ``now`` (seconds since 1970); None for one that was not to run.

    One that is to be started again is noted as to be resumed, so that this is also done by who comes after us.
    ``state`` is what it does since: somebody may have started it again already.
    """
    try:
        row = store.row_of(connection, id)
    except NotFound:
        return None
    if row.power != "on":
        return None
    # A clock that was set back must not make old crashes count for ever.
    old = "DELETE FROM crashes WHERE machine_id = ? AND (time < ? OR time > ?)"
    connection.execute(old, (str(id), now - WINDOW_S, now))
    connection.execute("INSERT INTO crashes (machine_id, time) VALUES (?, ?)", (str(id), now))
    (count,) = connection.execute("SELECT count(*) FROM crashes WHERE machine_id = ?", (str(id),)).fetchone()
    if state not in (State.STOPPED, State.CRASHED):
        return Crash(id, row.spec.name, int(count), False, "it crashed, and was started again since")
    restarts = row.spec.on_crash == "restart" and count <= MOST_RESTARTS
    store.set_power(connection, id, "resume" if restarts else "off")
    what = "its system panicked" if state is State.CRASHED else "its QEMU died"
    if restarts:
        follows = "it is started again"
    elif row.spec.on_crash == "restart":
        follows = f"it stays off after {count} crashes within {WINDOW_S:.0f} s"
    else:
        follows = "it stays off"
    return Crash(id, row.spec.name, int(count), restarts, f"{what}; {follows}")
