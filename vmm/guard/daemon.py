"""The guard's process: follows the trail, puts violations on record, and has core act on them.

It asks nobody and takes no calls: all it knows is the trail, and the rules as core has them. A file says up to which
record it has done its work; after a kill it goes on there, so that nothing that happened meanwhile is passed over. What
was counted before is counted again from the trail.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from vmm import atomic, status, wire
from vmm.audit.client import AuditClient, Entry, Object
from vmm.audit.search import Query
from vmm.errors import Unavailable, UserError
from vmm.guard.engine import GUARD, Engine, Seen, Violation, seen
from vmm.guard.rules import Rule
from vmm.guard.status import Status
from vmm.notify import notify
from vmm.paths import CORE_SOCKET, GUARD_STATE, GUARD_STATUS

_LIMIT = 500
_WAIT_S = 10.0
_PAUSE_S = 0.2
"""Between looks: however busy the trail is, it is searched five times a second at most."""
_RETRY_S = 1.0
_SAVE_S = 5.0
"""Between notes of the place while nothing is done to anybody: what is read anew costs less than writing."""
_CALL_S = 60.0
_MOST_REASON = 400

T = TypeVar("T")


class Place(msgspec.Struct, frozen=True):
    """Where to go on: all up to ``seq`` is done; to count on, the trail is to be read from behind ``after``."""

    seq: int
    after: int


class Audit(Protocol):
    """The part of the audit client that is used here."""

    async def append(self, entry: Entry) -> int:
        """Put a durable record. Raises: Unavailable."""

    async def search(self, query: Query, wait: float = 0.0) -> dict[str, Any]:
        """A page of records. Raises: Unavailable."""

    async def health(self) -> dict[str, Any]:
        """How the daemon stands. Raises: Unavailable."""


Core = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Calls a method of core's. Raises: UserError, of which Unavailable is worth another try."""


class Guard:
    """Everything between the trail and core."""

    def __init__(self, audit: Audit, core: Core, place: Path, status: Path, *, retry: float = _RETRY_S) -> None:
        """Arguments: ``place`` is the file that says where to go on, ``status`` the one that says how this stands;
        ``retry`` is in seconds.
        """
        self._audit = audit
        self._core = core
        self._file = place
        self._status = status
        self._retry = retry
        self._engine = Engine(())
        self._rules: dict[str, Rule] = {}
        self._done = 0
        self._reached = 0
        self._newest = 0.0
        self._saved: Place | None = None
        self._saved_at = 0.0
        self._acted = False
        self._problem = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Guard until ``stop`` is set."""
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        stopping.cancel()
        results = await asyncio.gather(work, stopping, return_exceptions=True)
        self._save()
        with suppress(Unavailable):
            await self._audit.append(Entry(type="guard.stop", extra={"done": self._done}))
        if isinstance(results[0], Exception):
            raise results[0]

    async def _work(self) -> None:
        self._say()
        await self._load_rules()
        await self._find_place()
        extra = {"rules": sum(rule.enabled for rule in self._rules.values()), "after": self._done}
        await self._persist(lambda: self._audit.append(Entry(type="guard.start", extra=extra)))
        while True:
            await self.step(_WAIT_S)
            await asyncio.sleep(_PAUSE_S)

    async def step(self, wait: float) -> None:
        """Deal with the next records, for which it waits up to so many seconds."""
        query = Query(after=self._reached, limit=_LIMIT)
        page = await self._persist(lambda: self._audit.search(query, wait))
        for raw in page["records"]:
            await self._take(seen(raw))
        self._reached = int(page["reached"])
        self._done = max(self._done, self._reached)
        if self._acted or time.monotonic() - self._saved_at >= _SAVE_S:
            self._save()
        self._say()

    async def _take(self, record: Seen) -> None:
        violations = self._engine.take(record)
        self._newest = record.at
        if record.seq <= self._done:
            return  # only counted again
        for violation in violations:
            self._acted = True
            await self._respond(violation)
        if (record.type, record.outcome) == ("guard.set", "success"):
            await self._load_rules()
        elif (record.type, record.outcome) == ("guard.test", "success"):
            await self._test(record)
        self._done = record.seq

    async def _respond(self, violation: Violation) -> None:
        rule = violation.rule
        reason = f"{rule.name}: {rule.meaning}"
        extra: dict[str, Any] = {
            "rule": rule.name,
            "key": violation.key,
            "count": violation.count,
            "window_s": rule.window_s,
            "action": rule.action,
            "first": violation.first,
            "last": violation.last,
        }
        entry = Entry(
            type="guard.violation",
            actor=GUARD,
            object=violation.object,
            outcome="failure",
            reason=reason,
            extra=extra,
        )
        await self._persist(lambda: self._audit.append(entry))
        await self._act(violation, f"the guard's rule {reason} (records {violation.first} to {violation.last})")

    async def _act(self, violation: Violation, reason: str) -> None:
        """Have core do what the rule says, and to nobody but the key. How that went is core's record."""
        args: dict[str, Any]
        match violation.rule.action:
            case "hold":
                method, args = "machine.hold", {"id": violation.key}
            case "lock":
                who = {"kind": violation.rule.key, "value": violation.key}
                method, args = "access.lock", {**who, "seconds": violation.rule.lock_s}
            case _:
                return
        try:
            await self._persist(lambda: self._core(method, args | {"reason": reason[:_MOST_REASON]}))
        except UserError as error:
            print(f"guard: {method} of {violation.key}: {error.message}", file=sys.stderr, flush=True)

    async def _test(self, record: Seen) -> None:
        """An administrator wants to see that the rule reaches those who are to be alarmed."""
        rule = self._rules.get(record.object.name)
        if rule is None:
            return
        extra: dict[str, Any] = {"rule": rule.name, "action": rule.action, "test": True}
        entry = Entry(
            type="guard.violation",
            actor=GUARD,
            object=Object(),
            outcome="failure",
            reason=f"{rule.name}: a test, to which nothing is done",
            extra=extra,
        )
        await self._persist(lambda: self._audit.append(entry))

    async def _load_rules(self) -> None:
        answer = await self._persist(lambda: self._core("guard.rules", {}))
        rules = msgspec.convert(answer["rules"], tuple[Rule, ...])
        self._rules = {rule.name: rule for rule in rules}
        self._engine.set_rules(rules)

    async def _find_place(self) -> None:
        end = int((await self._persist(self._audit.health))["seq"])
        try:
            place = msgspec.json.decode(self._file.read_bytes(), type=Place)
        except FileNotFoundError:
            place = Place(end, end)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            print(f"guard: {self._file} cannot be used, going on from here: {error}", file=sys.stderr, flush=True)
            place = Place(end, end)
        # A place beyond the end is one of another trail.
        self._done = place.seq if place.seq <= end else 0
        self._reached = min(place.after, self._done)

    def _save(self) -> None:
        """Note the place. What is dealt with behind it before the next note is dealt with again after a kill."""
        oldest = self._engine.oldest(self._newest)
        place = Place(self._done, self._done if oldest is None else oldest - 1)
        self._saved_at = time.monotonic()
        if place == self._saved or not self._reached:
            return
        try:
            atomic.write(self._file, msgspec.json.encode(place), mode=0o600)
        except OSError as error:
            # Nothing is lost by that but work that is done twice.
            print(f"guard: {self._file}: {error.strerror}", file=sys.stderr, flush=True)
        else:
            self._saved = place
            self._acted = False

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try until it works or is refused for good; meanwhile the status says what is in the way."""
        while True:
            try:
                result = await attempt()
            except Unavailable as error:
                self._problem = error.message
                self._say()
                await asyncio.sleep(self._retry)
            else:
                self._problem = ""
                return result

    def _say(self) -> None:
        """Write the status file."""
        status.write(self._status, Status(int(time.monotonic()), os.getpid(), self._done, self._problem))


async def call_core(method: str, args: dict[str, Any], socket: Path = CORE_SOCKET) -> Any:
    """Call core in the guard's own name. Raises: UserError; Unavailable when it does not answer."""
    try:
        async with asyncio.timeout(_CALL_S):
            return await wire.call(socket, method, {"args": args})
    except TimeoutError:
        raise Unavailable(f"core did not answer within {_CALL_S:g} s") from None
    except ConnectionError:
        raise Unavailable("core went away") from None


async def serve() -> None:
    """Run until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    notify()
    await Guard(AuditClient(), call_core, GUARD_STATE / "place.json", GUARD_STATUS).run(stop)


def run() -> None:
    """The program ``python3 -m vmm.guard``."""
    asyncio.run(serve())
