"""How far the trail was sent to its servers, out of the export's status file."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec

from vmm import status
from vmm.audit.client import AuditClient
from vmm.export.status import ServerStatus, State, Status
from vmm.paths import EXPORT_SETTINGS, EXPORT_STATUS, ROOT

_SETTINGS = EXPORT_SETTINGS.relative_to(ROOT)
_BEHIND_S = 600
"""A server that never has all for so long takes less than is recorded, or has much to make up for."""
_GONE = "the export does not run"


class Server(msgspec.Struct, frozen=True):
    """One server: how it stands since when (seconds since 1970), and how many records it lacks (``lag``).

    ``sent`` is the last record that its TCP has; from behind ``settled`` records are sent again if the connection
    breaks now.
    """

    server: str
    name: str
    state: State
    since: int
    lag: int
    sent: int
    settled: int
    problem: str


class View(msgspec.Struct, frozen=True):
    """All servers, ``last`` being the number of the last record.

    ``certificate`` is what servers are to know the host by (PEM), empty until the export has run; ``problem`` is why
    nothing is sent to any of them, empty without servers.
    """

    last: int
    certificate: str
    problem: str
    servers: tuple[Server, ...]


class Exports:
    """Looks at the export."""

    def __init__(self, audit: AuditClient, root: Path = ROOT) -> None:
        self._audit = audit
        self._root = root

    async def show(self) -> View:
        """How it stands. Raises: Unavailable."""
        last = int((await self._audit.health())["seq"])
        said = await asyncio.to_thread(status.read, EXPORT_STATUS, Status, self._root)
        if said is None:
            return View(last, "", _GONE if is_wanted(self._root) else "", ())
        servers = (
            Server(
                one.server, one.name, one.state, one.since, max(last - one.sent, 0), one.sent, one.settled, one.problem
            )
            for one in said.servers
        )
        return View(last, said.certificate, "", tuple(servers))


def _problem(server: ServerStatus) -> str:
    """What keeps a server from having what is recorded; empty if nothing does."""
    if not server.problem and server.state == "sending" and time.time() - server.since > _BEHIND_S:
        return f"behind for more than {_BEHIND_S // 60} minutes"
    return server.problem


def is_wanted(root: Path) -> bool:
    """Whether the configuration in force names servers."""
    return (root / _SETTINGS).exists()


def verdict(root: Path) -> tuple[bool, str]:
    """Whether all servers are kept up, and what is wrong where not."""
    if not is_wanted(root):
        return True, "no server is configured"
    said = status.read(EXPORT_STATUS, Status, root)
    if said is None:
        return False, _GONE
    bad = [f"{one.server}: {problem}" for one in said.servers if (problem := _problem(one))]
    return not bad, "; ".join(bad) or f"{len(said.servers)} servers have what is recorded, or soon will"
