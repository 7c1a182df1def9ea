"""Following the audit trail: its records as they come, for as long as somebody listens.

One call for all of them, as each call is a record itself: who asked again and again would wake himself each time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from vmm import wire
from vmm.audit.client import AuditClient
from vmm.audit.records import canonical
from vmm.audit.search import Filter, Number, Query
from vmm.core.dispatch import Call
from vmm.errors import UserError

MOST = 16
"""Followers at once; the API has 64 connections, which others need as well."""
MOST_EACH = 4
"""Of one person."""
HEARTBEAT_S = 10.0
"""Within which a follower hears something, so that both ends notice when the other is gone."""
_PAUSE_S = 0.2
"""Between looks: however busy the trail is, a follower has it searched five times a second at most."""
_LIMIT = 500


class Follow(Filter, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which records, and after which number; without one, those that come from now on."""

    after: Number | None = None


class TooMany(UserError):
    """There are as many of these calls as there may be."""

    code = "too-many-requests"
    status = 429


class Followers:
    """Those who follow the trail now."""

    def __init__(self, audit: AuditClient) -> None:
        self._audit = audit
        self._now: Counter[str] = Counter()

    async def follow(self, args: Follow, call: Call) -> Any:
        """Send records as data frames, one JSON object a line, until the caller goes away; empty lines in between.

        The first frame is empty: it says that the caller may follow. Raises: UserError.
        """
        person = call.actor.id
        if self._now[person] >= MOST_EACH or self._now.total() >= MOST:
            raise TooMany("the audit trail has too many followers", hint="end one of them, or read it page by page")
        self._now[person] += 1
        try:
            await wire.while_there(call.channel, self._send(args, call.channel))
        except ConnectionError:
            pass  # whoever followed has gone: the end of every follower
        finally:
            self._now[person] -= 1
            if not self._now[person]:
                del self._now[person]
        return {}

    async def _send(self, args: Follow, channel: wire.Channel) -> None:
        # Asked for in any case: without audit there is nothing to follow, which is to be said at once.
        end = int((await self._audit.health())["seq"])
        after = end if args.after is None else args.after
        wanted = msgspec.to_builtins(args) | {"limit": _LIMIT}
        await channel.send(wire.Kind.DATA)
        heard = time.monotonic()
        while True:
            query = msgspec.convert(wanted | {"after": after}, Query)
            page = await self._audit.search(query, wait=max(heard + HEARTBEAT_S - time.monotonic(), _PAUSE_S))
            lines = _lines(page["records"])
            if lines or time.monotonic() >= heard + HEARTBEAT_S:
                await channel.send_data(lines or b"\n")
                heard = time.monotonic()
            after = int(page["reached"])
            if page["next"] is None:
                await asyncio.sleep(_PAUSE_S)


def _lines(records: Iterable[Any]) -> bytes:
    """The records as they are stored, which is how they can be verified."""
    return b"".join(map(canonical, records))
