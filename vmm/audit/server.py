"""The audit daemon: takes records over a Unix socket and acknowledges them once they are durable."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from vmm import wire
from vmm.audit.anchoring import Anchor, AnchorClient, Checkpoints
from vmm.audit.events import EVENTS
from vmm.audit.journal import Journal
from vmm.audit.keeping import Exported, Keeping, Purge
from vmm.audit.opening import interrupted_entry, recovered_entry
from vmm.audit.operations import Operations
from vmm.audit.records import REFUSED, START, STOP, Actor, Entry, Producer, check
from vmm.audit.registry import Unit
from vmm.audit.rule import Rule
from vmm.audit.search import Query
from vmm.audit.store import Store
from vmm.audit.throttle import Throttle
from vmm.errors import Forbidden, NotFound, Unavailable, UserError
from vmm.notify import notify
from vmm.paths import AUDIT_SOCKET, AUDIT_STORE, ROOT
from vmm.release import os_release, root_hash

UNIT: Unit = "holdfast-audit"


PRODUCERS: Mapping[str, Unit] = {
    "holdfast-api": "holdfast-api",
    "holdfast-core": "holdfast-core",
    "holdfast-export": "holdfast-export",
    "holdfast-kernel": "holdfast-kernel",
    "holdfast-guard": "holdfast-guard",
    # All that run as root: the configure step, the updater, the gate.
    "root": "holdfast-host",
}
"""User → the producer that its processes are. What each may write stands in vmm.audit.events."""
READERS = ("holdfast-core", "root")
FOLLOWERS = ("holdfast-guard",)
"""Who may read the trail, and nothing else."""
EXPORTERS = ("holdfast-export",)
"""Who may read the trail and say what of it is known elsewhere, and nothing else that readers may."""
JOINERS: frozenset[Unit] = frozenset({"holdfast-kernel"})
"""Who may ask which operation was under way, besides readers."""
_RETRY = 5.0
"""Seconds between attempts to begin while the store is full."""
_MOST_REASON = 1000
_MOST_ENTRY = 2000
"""Characters of a refused record that are kept."""
MAX_WAIT = 30.0
"""Seconds that a reader may wait for news."""

_T = TypeVar("_T")


class Read(Query, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``read``; with ``wait`` the answer comes once there is a record, or after so many seconds.

    It comes with whatever record there is: who waits for some only looks at ``reached`` and asks again.
    """

    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT)] = 0.0


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``operation``: an object's id, types of calls, and a time (milliseconds, UTC)."""

    object: Annotated[str, msgspec.Meta(max_length=64)]
    types: Annotated[list[str], msgspec.Meta(max_length=16)]
    time: int


class Service:
    """Answers the calls on the audit socket."""

    def __init__(
        self,
        journal: Journal,
        own: Producer,
        producers: Mapping[int, Unit],
        readers: frozenset[int],
        about: Mapping[str, str] | None = None,
        anchor: Anchor | None = None,
        exporters: frozenset[int] = frozenset(),
        followers: frozenset[int] = frozenset(),
    ) -> None:
        """Arguments: the daemon as a producer, the uids that may append, those that may read, what ``audit.start``
        says of the host, what checkpoints are anchored in (the service for that unless given), the uids that may read
        records and say what is known elsewhere, and those that may read them and nothing else.
        """
        self.keeping = Keeping(journal, own)
        self._exporters = exporters
        self._followers = followers | readers | exporters
        self.checkpoints = Checkpoints(journal, own, anchor or AnchorClient())
        self._journal = journal
        self._own = own
        self._producers = producers
        self._readers = readers
        self._about = dict(about or {})
        # One for each producer and one for all others, so that none can have another's refusals left out.
        self._refusals: dict[Unit | None, Throttle] = {}
        self._operations = Operations()
        self._open = False
        # Whatever readers ask for, one processor is theirs at most.
        self._searching = asyncio.Lock()

    async def open(self) -> bool:
        """Close what the last run left open, then write ``audit.start``; only then are records taken.

        Returns: False when there is no room for that yet.
        """
        store = self._journal.store
        try:
            if store.recovered is not None:
                await self._journal.append(recovered_entry(store.recovered), self._own)
                store.recovered = None
            for intent in await asyncio.to_thread(lambda: list(store.open_intents())):
                await self._journal.append(interrupted_entry(intent), self._own)
                if intent.boot == store.boot:
                    # Whoever acted may act on: only the daemon was gone.
                    self._operations.note(intent, datetime.fromisoformat(intent.time).timestamp())
            await self._journal.append(Entry(type=START, extra=self._about), self._own)
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
        """Take no more records, and write ``audit.stop`` behind those under way and a checkpoint behind that.

        Raises: Unavailable when the former cannot be written.
        """
        if self._open:
            self._open = False
            for refusals in self._refusals.values():
                await refusals.close()
            await self._journal.append(Entry(type=STOP), self._own)
            with contextlib.suppress(Unavailable):
                await self.checkpoints.make()

    async def handle(self, request: wire.Request, channel: wire.Channel) -> Any:
        """One call. What is refused, instead of put off, is on record soon after. Raises: UserError."""
        uid = channel.peer.uid
        match request.method:
            case "append":
                return {"seq": await self._append(request, uid)}
            case "read" if uid not in self._followers:
                raise self._refused(request, uid, Forbidden(f"uid {uid} may not read the audit trail"))
            case "checkpoint" | "status" if uid not in self._readers:
                raise self._refused(request, uid, Forbidden(f"uid {uid} may not read the audit trail"))
            case "exported" | "purge" | "rule":
                return await self._keep(request, uid)
            case "status":
                return self.keeping.status()
            case "checkpoint":
                if not self._open:
                    raise Unavailable("the audit daemon takes no records, so it makes no checkpoint")
                return await self.checkpoints.make()
            case "read":
                wanted = _convert(request.params, Read)
                if wanted.wait:
                    await wire.while_there(channel, self._journal.wait_beyond(wanted.after, wanted.wait))
                async with self._searching:
                    page = await asyncio.to_thread(self._journal.store.search, wanted)
                return {
                    "records": [msgspec.Raw(line) for line in page.records],
                    "next": page.next,
                    "reached": page.reached,
                }
            case "operation" if uid not in self._readers and self._producers.get(uid) not in JOINERS:
                raise self._refused(request, uid, Forbidden(f"uid {uid} may not ask for operations"))
            case "operation":
                asked = _convert(request.params, Wanted)
                return {"request": self._operations.find(asked.object, asked.types, asked.time / 1000)}
            case "health":
                seq, head = self._journal.store.end
                newest = self.checkpoints.newest
                return {
                    "ok": self._open and not self._journal.store.full,
                    "seq": seq,
                    "head": head,
                    "anchored": newest.covers if newest else 0,
                    "anchor": newest.proof.anchor if newest else "",
                    "anchor_failure": self.checkpoints.failure,
                    "unprotected": self._journal.store.segments.unprotected,
                }
        raise NotFound(f"the audit daemon has no method {request.method!r}")

    async def _keep(self, request: wire.Request, uid: int) -> Any:
        """A call about what is kept: who may make it follows from what the caller is. Raises: UserError."""
        unit = self._producers.get(uid)
        allowed = {
            "exported": uid in self._exporters,
            # Core lets auditors order it.
            "purge": unit == "holdfast-core",
            # The configure step, which is root.
            "rule": unit == "holdfast-host",
        }
        if not allowed[request.method]:
            raise self._refused(request, uid, Forbidden(f"uid {uid} may not call {request.method}"))
        if not self._open:
            raise Unavailable("the audit daemon takes no records yet, or no more")
        match request.method:
            case "exported":
                return await self.keeping.take_exported(_convert(request.params, Exported).seq)
            case "purge":
                return await self.keeping.purge(_convert(request.params, Purge))
        await self.keeping.take_rule(_convert(request.params, Rule))
        return {}

    async def _append(self, request: wire.Request, uid: int) -> int:
        unit = self._producers.get(uid)
        try:
            if unit is None:
                raise Forbidden(f"uid {uid} may not write audit records")
            entry = _convert(request.params, Entry)
            check(entry)
            EVENTS.check(entry, unit)
        except UserError as error:
            raise self._refused(request, uid, error) from None
        if not self._open:
            raise Unavailable("the audit daemon takes no records: it is stopping, or the store is full")
        number = await self._journal.append(entry, Producer(uid, unit))
        self._operations.note(entry, time.time())
        return number

    def _refused(self, request: wire.Request, uid: int, error: UserError) -> UserError:
        """The error to raise. Whoever sent the record is told, and it is kept as text, as far as strangers can be let
        fill the store: a producer's mistake, or its capture, costs no evidence.
        """
        unit = self._producers.get(uid)
        if self._open:
            if unit not in self._refusals:
                self._refusals[unit] = Throttle(lambda entry: self._journal.append(entry, self._own), "audit")
            extra = {
                "method": request.method,
                "uid": uid,
                "unit": unit or "",
                "entry": msgspec.json.encode(request.params).decode()[:_MOST_ENTRY],
            }
            reason = error.message[:_MOST_REASON]
            actor = Actor(id=unit or f"uid {uid}")
            self._refusals[unit].report(Entry(type=REFUSED, actor=actor, outcome="failure", reason=reason, extra=extra))
        return error


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


def _about(root: Path) -> dict[str, str]:
    """Which host this is, and what runs on it; what cannot be read is left out."""
    found = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found["host"] = (root / "etc/machine-id").read_text(encoding="ascii").strip()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found["version"] = os_release(root).get("IMAGE_VERSION", "")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found["root_hash"] = root_hash(root)
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
        about=_about(ROOT),
        exporters=frozenset(uids(EXPORTERS)),
        followers=frozenset(uids(FOLLOWERS)),
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
    keeping = [asyncio.create_task(work) for work in (service.checkpoints.keep(), service.keeping.keep())]
    while not stop.is_set() and not committing.done():
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks = list(pending)
    server.close()
    for task in keeping:
        task.cancel()
    if store.broken:
        raise Unavailable(f"the audit store failed: {store.broken}")
    await service.close()
    store.close()


def run() -> None:
    """The program ``python3 -m vmm.audit``."""
    asyncio.run(serve(AUDIT_STORE, AUDIT_SOCKET))
