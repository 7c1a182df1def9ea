"""Who is locked out for a while: an address or a certificate, by the guard or an administrator."""

from __future__ import annotations

import ipaddress
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Literal

import msgspec

from vmm.clock import rfc3339
from vmm.core.db import Database
from vmm.errors import Forbidden, NotFound, UserError
from vmm.origin import source

Kind = Literal["source", "certificate"]
Value = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class Locking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is to be locked out: an address (of IPv6 a network of 64 bits), or a certificate by its SHA-256."""

    kind: Kind
    value: Value
    seconds: Annotated[int, msgspec.Meta(ge=1, le=86400)]
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]


class Unlocking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is not to be locked out any more."""

    kind: Kind
    value: Value


class Lock(msgspec.Struct, frozen=True):
    """Who is locked out, from when to when (UTC), by whom and why."""

    kind: Kind
    value: str
    since: str
    until: str
    by: str
    reason: str


class LockedOut(Forbidden):
    """The caller may not do anything for now."""

    code = "locked-out"


class Locks:
    """The locks, as the database has them; each ends by itself."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._locks: dict[tuple[str, str], tuple[float, Lock]] = {}
        # Told when there is one more.
        self.on_lock: Callable[[], Awaitable[None]] | None = None

    async def load(self) -> None:
        """Take over what was locked before; call once, before the first check()."""
        self._locks = dict(await self._database.run(_rows))

    def check(self, origin: str, certificate: str) -> None:
        """Raises: LockedOut when somebody who calls from there, or with this certificate, is."""
        for key in (("source", source(origin)), ("certificate", certificate)):
            found = self._locks.get(key)
            if found is not None and self._clock() < found[0]:
                lock = found[1]
                raise LockedOut(
                    f"this {lock.kind} is locked out until {lock.until}",
                    hint="Wait, or have an administrator end it from elsewhere.",
                )

    async def lock(self, wanted: Locking, by: str) -> Lock:
        """Lock somebody out from now on; one who is already stays for the longer of the two times.

        Raises: UserError naming the field.
        """
        value = _checked(wanted.kind, wanted.value)
        now = self._clock()
        before = self._locks.get((wanted.kind, value))
        until = now + wanted.seconds
        if before is not None and now < before[0]:
            until = max(until, before[0])
        lock = Lock(wanted.kind, value, rfc3339(now), rfc3339(until), by, wanted.reason)
        await self._database.run(partial(_insert, lock=lock, since=now, until=until))
        self._locks[wanted.kind, value] = until, lock
        if self.on_lock is not None:
            await self.on_lock()
        return lock

    async def unlock(self, wanted: Unlocking) -> None:
        """Raises: NotFound when nobody of that name is locked out."""
        if not any((lock.kind, lock.value) == (wanted.kind, wanted.value) for lock in await self.list_all()):
            raise NotFound(f"the {wanted.kind} {wanted.value} is not locked out")
        await self._database.run(partial(_delete, kind=wanted.kind, value=wanted.value))
        self._locks.pop((wanted.kind, wanted.value), None)

    async def list_all(self) -> list[Lock]:
        """Those who are locked out now, in their order. What has ended is forgotten."""
        now = self._clock()
        for (kind, value), (until, _) in list(self._locks.items()):
            if until <= now:
                await self._database.run(partial(_delete, kind=kind, value=value))
                del self._locks[kind, value]
        return [lock for _, lock in sorted(self._locks.values(), key=lambda one: one[0])]


def _checked(kind: Kind, value: str) -> str:
    """The value as check() looks for it. Raises: UserError."""
    if kind == "certificate":
        if not _FINGERPRINT.fullmatch(value):
            raise UserError("value: not the SHA-256 of a certificate (64 digits of 0 to 9 and a to f)")
        return value
    try:
        if "/" not in value:
            return source(f"[{ipaddress.ip_address(value)}]:0")
        network = ipaddress.IPv6Network(value)
    except ValueError:
        raise UserError("value: not an address, nor an IPv6 network") from None
    if network.prefixlen != 64:  # noqa: PLR2004 - see vmm.origin
        raise UserError("value: of IPv6, networks of 64 bits are locked out")
    return str(network)


def _rows(connection: sqlite3.Connection) -> list[tuple[tuple[str, str], tuple[float, Lock]]]:
    found = connection.execute("SELECT kind, value, since, until, by, why FROM locks").fetchall()
    return [
        ((kind, value), (until, Lock(kind, value, rfc3339(since), rfc3339(until), by, why)))
        for kind, value, since, until, by, why in found
    ]


def _insert(connection: sqlite3.Connection, lock: Lock, since: float, until: float) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO locks VALUES (?, ?, ?, ?, ?, ?)",
        (lock.kind, lock.value, since, until, lock.by, lock.reason),
    )


def _delete(connection: sqlite3.Connection, kind: str, value: str) -> None:
    connection.execute("DELETE FROM locks WHERE kind = ? AND value = ?", (kind, value))
