"""The export's process: one link a server, what each of them has on disk, and how they stand for core to see."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext

import msgspec

from vmm import atomic, status
from vmm.audit.client import AuditClient
from vmm.audit.records import Entry
from vmm.audit.throttle import Throttle
from vmm.config.types import AuditServer, Export
from vmm.errors import UserError, die
from vmm.export.channel import Channel, client_context
from vmm.export.link import Link
from vmm.export.status import Status
from vmm.notify import notify
from vmm.paths import AUDIT_SOCKET, EXPORT_SETTINGS, EXPORT_STATE, EXPORT_STATUS
from vmm.tls import check_policy

INTERVAL_S = 900.0
"""Between two records of a kind, once some were put: each is itself sent, and an outage may last for months."""
_SAY_S = 0.5
_BEAT_S = 15.0
"""Within which the status is written anew, for core to know that this lives."""
_SAVE_S = 5.0


@dataclass(frozen=True)
class Settings:
    """Where the daemon finds its neighbours and keeps its key; ``check`` refuses TLS settings that are not ours."""

    settings: Path = EXPORT_SETTINGS
    state: Path = EXPORT_STATE
    status: Path = EXPORT_STATUS
    audit: Path = AUDIT_SOCKET
    check: Callable[[SSLContext], None] = field(default=check_policy)


class Positions:
    """What each server has, over restarts: the last record, by the server's endpoint and name."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "positions.json"
        self._saved: dict[str, int] = {}
        try:
            self._saved = msgspec.json.decode(self._path.read_bytes(), type=dict[str, int])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            # Servers then get records again, which they know by their numbers.
            print(f"export: {self._path.name} cannot be read: {error}", file=sys.stderr, flush=True)

    def of(self, server: AuditServer) -> int:
        """The last record that a server has; 0 for a new one, which gets all that there are."""
        return max(self._saved.get(_key(server), 0), 0)

    def save(self, positions: Mapping[str, int]) -> bool:
        """Keep these, durably; whether they are kept."""
        if positions != self._saved:
            try:
                atomic.write(self._path, msgspec.json.encode(positions) + b"\n", mode=0o600)
            except OSError as error:
                print(f"export: {self._path.name} cannot be written: {error}", file=sys.stderr, flush=True)
                return False
            self._saved = dict(positions)
        return True


class Daemon:
    """All links, and what is known of them."""

    def __init__(self, settings: Settings, export: Export, audit: AuditClient) -> None:
        """Raises: UserError when TLS has other settings than ours; OSError when the key cannot be made."""
        self._settings = settings
        self._audit = audit
        self._throttles: dict[str, Throttle] = {}
        self._positions = Positions(settings.state)
        self._exported = 0
        self._links = {}
        for server in export.servers:
            context = client_context(settings.state, export.hostname, export.address, server.ca, settings.check)
            opening = functools.partial(Channel.open, server, context)
            position = self._positions.of(server)
            self._links[_key(server)] = Link(server, export.hostname, opening, audit, self._report, position)
        self._certificate = (settings.state / "client.crt").read_text(encoding="ascii")

    async def run(self, stop: asyncio.Event) -> None:
        """Send until told to stop."""
        links = [asyncio.create_task(link.run()) for link in self._links.values()]
        keeping = [asyncio.create_task(work) for work in (self._say(), self._save(), stop.wait())]
        try:
            await asyncio.wait([*links, *keeping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*links, *keeping):
                task.cancel()
            ended = await asyncio.gather(*links, *keeping, return_exceptions=True)
            for throttle in self._throttles.values():
                await throttle.close()
            await self._keep()
        for error in ended:
            # One that broke takes all others with it, to be started anew by systemd.
            if isinstance(error, Exception):
                raise error

    def _report(self, entry: Entry, kind: str) -> None:
        if kind not in self._throttles:
            self._throttles[kind] = Throttle(self._audit.append, "export", interval=INTERVAL_S)
        self._throttles[kind].report(entry)

    async def _say(self) -> None:
        """Write the status file whenever it changes."""
        before: tuple[object, float] = (None, 0.0)
        while True:
            servers = tuple(link.status() for link in self._links.values())
            now = time.monotonic()
            if servers != before[0] or now - before[1] >= _BEAT_S:
                before = servers, now
                status.write(self._settings.status, Status(int(now), os.getpid(), self._certificate, servers))
            await asyncio.sleep(_SAY_S)

    async def _save(self) -> None:
        while True:
            await self._keep()
            await asyncio.sleep(_SAVE_S)

    async def _keep(self) -> None:
        """Keep the positions, and tell audit what all servers have, once that is durable."""
        positions = {key: link.settled for key, link in self._links.items()}
        if not await asyncio.to_thread(self._positions.save, positions):
            return
        lowest = min(positions.values())
        if lowest > self._exported:
            # It is told again, if not now.
            with suppress(UserError):
                await self._audit.exported(lowest)
                self._exported = lowest


def _key(server: AuditServer) -> str:
    return f"{server.endpoint} {server.identity}"


async def serve(settings: Settings | None = None) -> None:
    """Run until SIGTERM. Raises: UserError when there is nothing to go by."""
    settings = settings or Settings()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        export = msgspec.json.decode(settings.settings.read_bytes(), type=Export)
        daemon = Daemon(settings, export, AuditClient(settings.audit))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        die(f"the export cannot begin: {error}")
    notify()
    await daemon.run(stop)


def run() -> None:
    """The program ``python3 -m vmm.export``."""
    asyncio.run(serve())
