"""How the export stands, as a file in memory tells core."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["connecting", "sending", "idle", "waiting"]


class ServerStatus(msgspec.Struct, frozen=True):
    """One server. ``since`` is when its state began (seconds since 1970).

    It has all records up to ``sent``, as far as its TCP says; from behind ``settled`` they are sent again if the
    connection breaks now. ``problem`` is what went wrong last, until a connection has proven itself again.
    """

    server: str
    name: str
    state: State
    since: int
    sent: int
    settled: int
    problem: str


class Status(msgspec.Struct, frozen=True):
    """The whole: when that was written (monotonic seconds) and by whom, and the certificate that servers are shown."""

    at: int
    pid: int
    certificate: str
    servers: tuple[ServerStatus, ...]
