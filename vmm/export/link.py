"""Keeping one server up with the trail: connect, send what it lacks and what comes, wait, connect again.

The trail is the queue. What a server has is known only by its TCP having acknowledged it, which is not yet its having
read it; so the place to go on from after an outage (``settled``) lags behind by SETTLE_S, and a server may get again
what it got in that time. It knows doubles by their numbers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

from vmm.audit.records import Actor, Entry, Object
from vmm.audit.search import Query
from vmm.config.types import AuditServer
from vmm.errors import Unavailable
from vmm.export.channel import Channel, End, Failure, words
from vmm.export.message import framed, message
from vmm.export.status import ServerStatus, State

SETTLE_S = 10.0
"""For so long a connection must outlast what was sent by it, before that counts as received."""
STALL_S = 60.0
"""A server that takes nothing for so long is given up."""
FIRST_S, MOST_S = 1.0, 60.0
"""Between two attempts to connect."""
_TICK_S = 0.5
_WAIT_S = 10.0
_RETRY_S = 1.0
_GOODBYE_S = 3.0
_LIMIT = 200


class Source(Protocol):
    """The part of the audit client that is used here."""

    async def search(self, query: Query, wait: float = 0.0) -> dict[str, Any]:
        """A page of records. Raises: Unavailable."""

    async def health(self) -> dict[str, Any]:
        """How the trail stands. Raises: Unavailable."""


Report = Callable[[Entry, str], None]
"""Puts a record, soon; the text is the kind of which not too many are wanted."""


class Backoff:
    """How long to wait before the next attempt: twice as long each time, less up to a half, so that hosts part."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        """Arguments: ``chance`` gives numbers from 0 up to 1."""
        self._chance = chance
        self._next = FIRST_S

    def next(self) -> float:
        """Seconds to wait now."""
        seconds, self._next = self._next, min(2 * self._next, MOST_S)
        return seconds * (1 - self._chance() / 2)

    def reset(self) -> None:
        """It worked: begin anew next time."""
        self._next = FIRST_S


class Delivery:
    """What became of what was written to one connection, by record.

    ``sent`` is the last record that the server's TCP has, ``settled`` the last that it had SETTLE_S ago.
    """

    def __init__(self, settled: int, now: float) -> None:
        self.sent = self.settled = settled
        self._written: deque[tuple[int, int]] = deque()
        self._settling: deque[tuple[float, int]] = deque()
        self._acknowledged = 0
        self._moved = now

    def wrote(self, written: int, seq: int, now: float) -> None:
        """Records up to a number went out; ``written`` are all bytes of the connection since."""
        if not self._written:
            self._moved = now
        self._written.append((written, seq))

    def look(self, acknowledged: int, now: float) -> None:
        """Take note of how many bytes the server's TCP has now."""
        if acknowledged > self._acknowledged:
            self._acknowledged, self._moved = acknowledged, now
        while self._written and self._written[0][0] <= acknowledged:
            self.sent = self._written.popleft()[1]
            self._settling.append((now, self.sent))
        while self._settling and now - self._settling[0][0] >= SETTLE_S:
            self.settled = self._settling.popleft()[1]

    @property
    def idle(self) -> bool:
        """Whether the server's TCP has all that was written."""
        return not self._written

    def stalls(self, now: float) -> bool:
        """Whether the server has taken nothing for too long, though there is something to take."""
        return bool(self._written) and now - self._moved >= STALL_S

    def taken(self) -> None:
        """The server took all, and said goodbye after that."""
        if self._written:
            self.sent = self._written[-1][1]
        self.settled = self.sent


class Link:
    """One server. ``settled`` is the last record that counts as received, from behind which it is sent again."""

    def __init__(
        self,
        server: AuditServer,
        hostname: str,
        open: Callable[[], Awaitable[Channel]],
        audit: Source,
        report: Report,
        settled: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
    ) -> None:
        """Arguments: ``open`` connects or raises Failure; ``settled`` is what an earlier run left."""
        self._server = server
        self._hostname = hostname
        self._open = open
        self._audit = audit
        self._report = report
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._delivery = Delivery(settled, clock())
        self._state: State = "waiting"
        self._since = int(time.time())
        self._problem = ""

    @property
    def settled(self) -> int:
        """The last record that the server counts as having."""
        return self._delivery.settled

    def status(self) -> ServerStatus:
        """How it stands now."""
        delivery, server = self._delivery, self._server
        position = (delivery.sent, delivery.settled)
        return ServerStatus(server.endpoint, server.identity, self._state, self._since, *position, self._problem)

    async def run(self) -> None:
        """Do so for ever; cancelled, it says goodbye to the server."""
        while True:
            self._turn("connecting")
            try:
                channel = await self._open()
            except Failure as failure:
                self._problem = failure.reason
                self._refused(failure)
            else:
                end = await self._serve(channel)
                self._problem = end.reason
                self._disconnected(channel, end)
            self._turn("waiting")
            await asyncio.sleep(self._backoff.next())

    async def _serve(self, channel: Channel) -> End:
        """Send by a connection until it ends; how it did."""
        self._connected(channel)
        self._delivery = Delivery(self._delivery.settled, self._clock())
        tasks = [asyncio.create_task(work) for work in (channel.ended(), self._send(channel), self._look(channel))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # The server's own word says more than that nothing could be sent any more.
            await asyncio.wait(tasks[:1], timeout=_TICK_S)
            return next(task.result() for task in tasks if task.done())
        except asyncio.CancelledError:
            await _cancel(tasks)
            if await channel.close(_GOODBYE_S):
                self._delivery.taken()
            self._disconnected(channel, End("the export ends", orderly=True))
            raise
        finally:
            await _cancel(tasks)
            channel.abort()

    async def _send(self, channel: Channel) -> End:
        after = -1
        while True:
            try:
                if after < 0:
                    after = await self._begin()
                page = await self._audit.search(Query(after=after, limit=_LIMIT), _WAIT_S)
            except Unavailable:
                await asyncio.sleep(_RETRY_S)
                continue
            if not page["records"]:
                self._turn("idle")
                continue
            self._turn("sending")
            after = int(page["records"][-1]["seq"])
            try:
                channel.write(b"".join(framed(message(record, self._hostname)) for record in page["records"]))
                self._delivery.wrote(channel.written, after, self._clock())
                await channel.drain()
            except OSError as error:
                return End(words(error))

    async def _begin(self) -> int:
        """Behind which record to go on. A trail that ends before that is another one. Raises: Unavailable."""
        if int((await self._audit.health())["seq"]) < self._delivery.settled:
            self._delivery = Delivery(0, self._clock())
        return self._delivery.settled

    async def _look(self, channel: Channel) -> End:
        """See what arrives. A connection has proven itself once it has lasted or something settled."""
        begun = self._clock()
        while True:
            await asyncio.sleep(_TICK_S)
            now = self._clock()
            self._delivery.look(channel.acknowledged, now)
            if self._delivery.stalls(now):
                return End(f"the server took nothing for {STALL_S:g} s")
            if self._state == "sending" and self._delivery.idle:
                self._turn("idle")
            if now - begun >= SETTLE_S:
                self._problem = ""
                self._backoff.reset()

    def _turn(self, state: State) -> None:
        if state != self._state:
            self._state, self._since = state, int(time.time())

    def _connected(self, channel: Channel) -> None:
        self._put("export.connect", "session", {"server_certificate": channel.certificate})

    def _disconnected(self, channel: Channel, end: End) -> None:
        extra = {"server_certificate": channel.certificate}
        self._put("export.disconnect", "session", extra, reason=end.reason, failed=not end.orderly)

    def _refused(self, failure: Failure) -> None:
        if failure.kind != "identity":
            self._put("export.connect", failure.kind, {}, reason=failure.reason, failed=True)
            return
        named = {"presented_identifier": failure.presented, "reference_identifier": self._server.identity}
        self._put("export.identity", failure.kind, named, reason=failure.reason, failed=True)

    def _put(
        self,
        type: Literal["export.connect", "export.disconnect", "export.identity"],
        kind: str,
        extra: dict[str, str],
        *,
        reason: str = "",
        failed: bool = False,
    ) -> None:
        server = self._server
        entry = Entry(
            type=type,
            actor=Actor(id="holdfast"),
            object=Object("server", server.endpoint, server.identity),
            outcome="failure" if failed else "success",
            reason=reason,
            extra={"remote_endpoint": server.endpoint, **extra},
        )
        self._report(entry, f"{server.endpoint} {type} {kind}")


async def _cancel(tasks: list[asyncio.Task[End]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
