"""The audit daemon: takes records over a Unix socket and acknowledges them once they are durable."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from vmm import wire
from vmm.audit.records import RESERVED, START, STOP, Entry, Producer, check
from vmm.audit.store import MAX_BATCH, Draft, Store, interrupted_entry, recovered_entry
from vmm.errors import Forbidden, NotFound, Unavailable, UserError
from vmm.notify import notify
from vmm.paths import AUDIT_SOCKET, AUDIT_STORE

UNIT = "holdfast-audit"


@dataclass(frozen=True)
class Client:
    """Who may write records: the name they carry, and the beginnings of the types they may have."""

    unit: str
    types: tuple[str, ...]


PRODUCERS = {
    # What it may say is what it sees itself; of all that core decides, a captured API can forge nothing.
    "holdfast-api": Client("holdfast-api", ("api.", "session.", "tls.")),
    "holdfast-core": Client(
        "holdfast-core",
        (
            "audit.read",
            "config.read",
            "core.",
            "gate.",
            "health.",
            "host.",
            "machine.",
            "recovery.",
            "update.",
            "version.",
            "volume.",
        ),
    ),
    # All that run as root: the configure step, the updater, the gate.
    "root": Client("holdfast-host", ("config.applied", "config.refused", "update.")),
}
"""User → what it may write."""
READERS = ("holdfast-core", "root")
_RETRY = 5.0
"""Seconds between attempts to begin while the store is full."""

_T = TypeVar("_T")


class Read(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``read``."""

    after: Annotated[int, msgspec.Meta(ge=0)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100


class Journal:
    """Appends to a store from many tasks: whatever waits while the disk is busy shares the next sync."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._waiting: list[tuple[Draft, asyncio.Future[int]]] = []
        self._wake = asyncio.Event()

    async def append(self, entry: Entry, producer: Producer) -> int:
        """Store an entry; returns its number once it is durable. Raises: Unavailable."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((Draft(entry, producer), future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Commit what comes in until the store breaks."""
        while not self.store.broken:
            await self._wake.wait()
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            if not self._waiting:
                self._wake.clear()
            await self._commit(batch)

    async def _commit(self, batch: Sequence[tuple[Draft, asyncio.Future[int]]]) -> None:
        waiting = [(future, index) for index, (_, future) in enumerate(batch)]
        try:
            numbers = await asyncio.to_thread(self.store.append, [draft for draft, _ in batch])
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            for future, _ in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for future, index in waiting:
            if not future.done():
                future.set_result(numbers[index])


class Service:
    """Answers the calls on the audit socket."""

    def __init__(
        self, journal: Journal, own: Producer, producers: Mapping[int, Client], readers: frozenset[int]
    ) -> None:
        """Arguments: the daemon as a producer, the uids that may append, and those that may read."""
        self._journal = journal
        self._own = own
        self._producers = producers
        self._readers = readers
        self._open = False

    async def open(self) -> bool:
        """Close what the last run left open, then write ``audit.start``; only then are records taken.

        Returns: False when there is no room for that yet.
        """
        store = self._journal.store
        try:
            if store.recovered:
                await self._journal.append(recovered_entry(store.recovered), self._own)
                store.recovered = 0
            for intent in await asyncio.to_thread(lambda: list(store.open_intents())):
                await self._journal.append(interrupted_entry(intent), self._own)
            await self._journal.append(Entry(type=START), self._own)
        except Unavailable as error:
            print(f"audit: {error.message}; no record is taken until there is room", file=sys.stderr, flush=True)
            return False
        self._open = True
        return True

    async def keep_opening(self) -> None:
        """Try again until it works."""
        while not await self.open():
            await asyncio.sleep(_RETRY)

    async def close(self) -> None:
        """Take no more records and write ``audit.stop`` behind those under way. Raises: Unavailable."""
        if self._open:
            self._open = False
            await self._journal.append(Entry(type=STOP), self._own)

    async def handle(self, request: wire.Request, channel: wire.Channel) -> Any:
        """One call. Raises: UserError."""
        uid = channel.peer.uid
        match request.method:
            case "append":
                return {"seq": await self._append(request.params, uid)}
            case "read":
                if uid not in self._readers:
                    raise Forbidden(f"uid {uid} may not read the audit trail")
                wanted = _convert(request.params, Read)
                page = await asyncio.to_thread(self._journal.store.read, wanted.after, wanted.limit)
                return {"records": [msgspec.Raw(line) for line in page.records], "next": page.next}
            case "health":
                seq, head = self._journal.store.end
                return {"ok": self._open and not self._journal.store.full, "seq": seq, "head": head}
        raise NotFound(f"the audit daemon has no method {request.method!r}")

    async def _append(self, params: dict[str, Any], uid: int) -> int:
        client = self._producers.get(uid)
        if client is None:
            raise Forbidden(f"uid {uid} may not write audit records")
        entry = _convert(params, Entry)
        if entry.type in RESERVED:
            raise Forbidden(f"only the audit daemon writes {entry.type}")
        if not entry.type.startswith(client.types):
            raise Forbidden(f"{client.unit} does not write {entry.type[:64]}")
        check(entry)
        if not self._open:
            raise Unavailable("the audit daemon takes no records: it is stopping, or the store is full")
        return await self._journal.append(entry, Producer(uid, client.unit))


def _convert(params: dict[str, Any], type_: type[_T]) -> _T:
    try:
        return msgspec.convert(params, type_)
    except msgspec.ValidationError as error:
        raise UserError(f"audit: {error}") from None


def uids(users: Iterable[str]) -> dict[int, str]:
    """The uids of those users that exist, with their names."""
    found = {}
    for user in users:
        try:
            found[pwd.getpwnam(user).pw_uid] = user
        except KeyError:
            print(f"audit: there is no user {user}; it cannot be a client", file=sys.stderr, flush=True)
    return found


async def serve(directory: Path, socket: Path) -> None:
    """Run the daemon until SIGTERM. Raises: Unavailable when the store cannot be opened or breaks."""
    own = Producer(os.geteuid(), UNIT)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    store = Store(directory, producer=own, boot=boot)
    journal = Journal(store)
    service = Service(
        journal,
        own,
        producers={uid: PRODUCERS[user] for uid, user in uids(PRODUCERS).items()},
        readers=frozenset({own.uid, *uids(READERS)}),
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    committing = asyncio.create_task(journal.run())
    tasks = [committing, asyncio.create_task(stop.wait())]
    if not await service.open():
        tasks.append(asyncio.create_task(service.keep_opening()))
    server = await wire.serve(socket, service.handle, mode=0o666)
    notify()
    while not stop.is_set() and not committing.done():
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks = list(pending)
    server.close()
    if store.broken:
        raise Unavailable(f"the audit store failed: {store.broken}")
    await service.close()
    store.close()


def run() -> None:
    """The program ``python3 -m vmm.audit``."""
    asyncio.run(serve(AUDIT_STORE, AUDIT_SOCKET))
