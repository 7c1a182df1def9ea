"""The rule for old records as the daemon follows it: segments that ended are protected, what is too old or too much
goes; and what it is asked about that.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import sys
from typing import Annotated, Any

import msgspec

from vmm.audit.journal import Journal
from vmm.audit.records import RULE, Entry, Producer
from vmm.audit.rule import Rule
from vmm.errors import Unavailable, UserError

INTERVAL_S = 3600.0
"""Between two looks for what is too old."""


class Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``exported``: the last record that is known elsewhere."""

    seq: Annotated[int, msgspec.Meta(ge=0)]


class Purge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``purge``: the time (ISO 8601) or number before which records go, and the call that orders it."""

    before: Annotated[str, msgspec.Meta(max_length=40)] | Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    request: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Keeping:
    """Follows the store's rule."""

    def __init__(self, journal: Journal, own: Producer) -> None:
        self._journal = journal
        self._own = own

    async def keep(self) -> None:
        """Do what is due, for ever: whenever a segment ended, another rule came, and now and then."""
        while True:
            self._journal.ended.clear()
            await asyncio.to_thread(self._journal.store.segments.protect)
            try:
                await self._journal.between(self._journal.store.trim)
            except Unavailable as error:
                print(f"audit: old records stay: {error.message}", file=sys.stderr, flush=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._journal.ended.wait()

    async def take_rule(self, rule: Rule) -> None:
        """Go by a rule from now on; another one than before is put on record first. Raises: Unavailable."""
        store = self._journal.store
        if rule != store.memory.rule:
            await self._journal.append(Entry(type=RULE, extra=_plain(rule)), self._own)
            await self._journal.between(lambda: store.memory.set_rule(rule))
        self._journal.ended.set()

    async def purge(self, wanted: Purge) -> dict[str, Any]:
        """Remove the segments that hold nothing but older records; the first and the last that went, 0 if none did.

        Raises: UserError for what is no time; Unavailable.
        """
        before = wanted.before if isinstance(wanted.before, int) else _time(wanted.before)
        gone = await self._journal.between(lambda: self._journal.store.purge(before, wanted.request))
        return {"first": gone.first, "last": gone.last, "lost": gone.lost} if gone else dict.fromkeys(_GONE, 0)

    async def take_exported(self, seq: int) -> dict[str, int]:
        """Note up to which record the trail is known elsewhere; what is noted. Raises: UserError; Unavailable."""
        store = self._journal.store
        if seq > store.end[0]:
            raise UserError(f"seq: there is no record {seq}, the last one is {store.end[0]}")
        await self._journal.between(lambda: store.memory.set_exported(seq))
        return {"seq": store.memory.exported}

    def status(self) -> dict[str, Any]:
        """How the store stands."""
        store = self._journal.store
        first, last = store.segments.first, store.end[0]
        return {
            "records": last - first + 1,
            "first": first,
            "last": last,
            "bytes": store.used,
            "quota": store.quota,
            "full": store.full,
            "exported": store.memory.exported,
            "rule": store.memory.rule,
            "segments": len(store.segments),
            "protected": store.segments.protected,
            "unprotected": store.segments.unprotected,
        }


_GONE = ("first", "last", "lost")


def _plain(rule: Rule) -> dict[str, Any]:
    """A rule's fields, less what it does not say."""
    return {name: value for name, value in msgspec.structs.asdict(rule).items() if value not in (None, False)}


def _time(text: str) -> str:
    """A time as records have it. Raises: UserError."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"before: not a time: {text!r}", hint="write it as 2026-11-23T04:05:06Z") from None
    if time.tzinfo is None:
        raise UserError(f"before: without a time zone: {text!r}", hint="write it as 2026-11-23T04:05:06Z")
    try:
        return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except OverflowError:
        raise UserError(f"before: no time in UTC: {text!r}") from None
