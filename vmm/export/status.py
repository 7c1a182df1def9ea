"""How the export stands, as a file in memory tells core."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import msgspec

from vmm.paths import EXPORT_STATUS, ROOT

_STATUS = EXPORT_STATUS.relative_to(ROOT)
_PATIENCE_S = 60.0

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


def read(root: Path = ROOT) -> Status | None:
    """What an export that runs says of itself; None if none does, or what it says is damaged."""
    try:
        said = msgspec.json.decode((root / _STATUS).read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    alive = (root / f"proc/{said.pid}").exists() and time.monotonic() - said.at < _PATIENCE_S
    return said if alive else None
