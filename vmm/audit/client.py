"""How the other daemons hand in and read audit records."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmm import wire
from vmm.audit.records import Actor, Entry, Object
from vmm.audit.rule import Rule
from vmm.audit.search import Query
from vmm.errors import Unavailable, UserError
from vmm.paths import AUDIT_SOCKET

_LOOK_S = 0.05
_PURGE_S = 120.0
_ANCHOR_S = 60.0
"""A checkpoint that is under way comes first, and a TPM may take its time for each."""

__all__ = ["Actor", "AuditClient", "Entry", "Object", "Refused", "Rule"]


class Refused(Unavailable):
    """The audit daemon does not take this record, ever; it keeps what it was as text."""


class AuditClient:
    """Talks to the audit daemon; one connection a call, so calls may run side by side."""

    def __init__(self, socket: Path = AUDIT_SOCKET, *, timeout: float = 10.0) -> None:
        """Arguments: ``timeout`` is in seconds, for one call."""
        self._socket = socket
        self._timeout = timeout

    async def append(self, entry: Entry) -> int:
        """Hand in a record and wait until it is on stable storage; returns its sequence number.

        Raises: Unavailable, whatever stopped it: a caller that cannot audit must not act. (Refused is one, too.)
        """
        try:
            result = await self._call("append", msgspec.to_builtins(entry))
        except Unavailable:
            raise
        except UserError as error:
            raise Refused(f"the audit daemon refused a record: {error.message}", hint=error.hint) from None
        return int(result["seq"])

    def append_sync(self, entry: Entry) -> int:
        """The same for programs without an event loop. Raises: Unavailable."""
        return asyncio.run(self.append(entry))

    def wait_sync(self, seconds: float) -> bool:
        """Wait until the daemon answers, for services that start beside it; whether it did in time."""
        return asyncio.run(self._wait(seconds))

    async def _wait(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        await self.health()
                    except Unavailable:
                        await asyncio.sleep(_LOOK_S)
                    else:
                        return True
        except TimeoutError:
            return False

    async def read(self, after: int, limit: int, wait: float = 0.0) -> dict[str, Any]:
        """Read up to ``limit`` records with sequence numbers above ``after``; see search()."""
        return await self.search(Query(after=after, limit=limit), wait)

    async def search(self, query: Query, wait: float = 0.0) -> dict[str, Any]:
        """Read the records that are wanted, a page of them.

        Whoever follows the trail waits up to ``wait`` seconds (at most 30) for one; without news there are none.
        Returns: ``{"records": [...], "next": seq or None, "reached": seq}``; pass ``next`` as ``after`` (``before``
        with the newest first) for the following page, which may come before ``limit`` is reached when records are
        large, and may be empty when few are wanted; wait for new ones with ``reached`` as ``after``.
        Raises: Unavailable; Forbidden for users that may not read the trail.
        """
        wanted = {"after": query.after, "limit": query.limit, "wait": wait} | msgspec.to_builtins(query)
        result: dict[str, Any] = await self._call("read", wanted, at_least=wait + self._timeout)
        return result

    async def checkpoint(self) -> dict[str, Any]:
        """Have all records so far anchored; the newest checkpoint. Raises: Unavailable; Forbidden as for read()."""
        result: dict[str, Any] = await self._call("checkpoint", {}, at_least=_ANCHOR_S)
        return result

    async def operation(self, object: str, types: Sequence[str], time: int) -> str:
        """The request of an operation of these types that was under way on an object at a time (milliseconds, UTC).

        Returns: "" when there was none. Raises: Unavailable; Forbidden as for read().
        """
        asked = {"object": object, "types": list(types), "time": time}
        return str((await self._call("operation", asked))["request"])

    async def health(self) -> dict[str, Any]:
        """How the daemon stands. Raises: Unavailable.

        Returns: ``{"ok": bool, "seq": n, "head": hex, "anchored": n, "anchor": "tpm", "software" or "",
        "anchor_failure": text, "unprotected": text}``; not ok while records are refused, ``anchored`` is the last
        record that a checkpoint covers, as far as this run of the daemon knows.
        """
        result: dict[str, Any] = await self._call("health", {})
        return result

    async def status(self) -> dict[str, Any]:
        """How the store stands (vmm.audit.keeping). Raises: Unavailable; Forbidden as for read()."""
        result: dict[str, Any] = await self._call("status", {})
        return result

    async def purge(self, before: str | int, request: str) -> dict[str, int]:
        """Remove segments with nothing but records from before a time or number, for core's call ``request``.

        Returns: ``{"first": n, "last": n, "lost": n}``, all 0 where none went; ``lost`` were not exported.
        Raises: UserError; Unavailable; Forbidden for all but core.
        """
        result: dict[str, int] = await self._call("purge", {"before": before, "request": request}, at_least=_PURGE_S)
        return result

    async def exported(self, seq: int) -> None:
        """Say that records up to a number are known elsewhere. Raises: Unavailable; Forbidden for all but export."""
        await self._call("exported", {"seq": seq})

    def set_rule_sync(self, rule: Rule) -> None:
        """Say what is kept, for the configure step. Raises: Unavailable; Forbidden for all but root."""
        asyncio.run(self._call("rule", msgspec.to_builtins(rule)))

    async def _call(self, method: str, params: dict[str, Any], at_least: float = 0.0) -> Any:
        seconds = max(self._timeout, at_least)
        try:
            async with asyncio.timeout(seconds):
                return await wire.call(self._socket, method, params)
        except TimeoutError:
            raise Unavailable(f"the audit daemon did not answer within {seconds:g} s") from None
        except ConnectionError:
            raise Unavailable("the audit daemon went away") from None
