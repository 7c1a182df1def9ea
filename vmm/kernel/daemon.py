"""The kernel's audit daemon: registers, sets the rules, joins what the kernel tells and hands in what it means."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from vmm import status
from vmm.audit.client import AuditClient, Entry
from vmm.errors import Unavailable
from vmm.kernel import netlink, rules
from vmm.kernel.gaps import Gaps
from vmm.kernel.joining import Event, Joiner
from vmm.kernel.judge import Judge, Machines
from vmm.kernel.libvirt import TYPES, Change, Gatherer
from vmm.kernel.netlink import Link, Message
from vmm.kernel.outbox import Outbox
from vmm.kernel.parse import parse
from vmm.notify import notify
from vmm.paths import KERNEL_STATUS

_TICK_S = 1.0
_LOOK_TICKS = 15
"""How many ticks lie between two looks at how the kernel's audit stands; less than core's and systemd's patience."""
_BATCH = 128
_DRAIN_S = 10.0
_RETRY_S = 1.0
_MOST_CHANGES = 1000
_UNASKED = "nobody asked the service for it"


class Said(msgspec.Struct, frozen=True):
    """The status file: for core's health, and for the next run of this daemon.

    ``at`` is in monotonic seconds; ``serial`` is the newest event that is dealt with, ``lost`` what the kernel had lost
    then, ``readers`` the process ids of this run and those before it.
    """

    at: int
    pid: int
    problem: str
    serial: int
    lost: int
    readers: tuple[int, ...] = ()


Own = Literal["kernel.start", "kernel.stop", "kernel.lost", "kernel.config"]


class Audit(Protocol):
    """The part of the audit client that is used here."""

    async def append(self, entry: Entry) -> int:
        """Put a durable record. Raises: Unavailable."""

    async def operation(self, object: str, types: Sequence[str], time: int) -> str:
        """Which operation was under way. Raises: Unavailable."""


class Reader:
    """Everything between the kernel and the audit daemon."""

    def __init__(
        self,
        link: Link,
        audit: Audit,
        status: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        retry: float = _RETRY_S,
    ) -> None:
        """Arguments: ``status`` is the file that says how this stands; ``retry`` is in seconds."""
        self._link = link
        self._audit = audit
        self._status = status
        self._clock = clock
        self._retry = retry
        before = _read(status)
        self._readers = (*(before.readers[-7:] if before else ()), os.getpid())
        self._settled = before.serial if before else 0
        self._lost = before.lost if before else 0
        self._problem = ""
        self._again = before is not None
        self._gaps = Gaps(self._settled)
        self._joiner = Joiner()
        machines = Machines()
        self._judge = Judge(machines, lambda: set(self._readers))
        self._gatherer = Gatherer(machines)
        self._outbox = Outbox(audit.append, retry=retry)
        self._changes: asyncio.Queue[Change] = asyncio.Queue(_MOST_CHANGES)
        self._joining = False
        self._dropped = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Read until ``stop`` is set, then end in order: the kernel keeps what comes from there on.

        Raises: Unavailable when the kernel's socket breaks.
        """
        loop = asyncio.get_running_loop()
        self.look()
        loop.add_reader(self._link.fileno(), self._readable)
        tasks = [asyncio.create_task(self._keep()), asyncio.create_task(self._join())]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(self._link.fileno())
        for task in tasks:
            if task.done():
                task.result()
        await self._end()
        for task in tasks:
            task.cancel()

    def read(self) -> None:
        """Take in what the kernel has for us: so much at once that others get their turn. Raises: Unavailable."""
        self._take(self._link.receive(_BATCH))
        self._settle()

    def _readable(self) -> None:
        try:
            self.read()
        except Unavailable as error:
            print(f"kernel: {error.message}", file=sys.stderr, flush=True)
            # The next look() says the same, and ends this process.
            asyncio.get_running_loop().remove_reader(self._link.fileno())

    def tick(self) -> None:
        """What time brings: events that have no end, numbers that do not come any more."""
        now = self._clock()
        self._handle(self._joiner.ripe(now))
        if count := self._gaps.lost(now):
            self._report_lost("reader", count, "the reader was killed, or the kernel left out events")
        if count := self._outbox.dropped - self._dropped:
            self._dropped += count
            self._report_lost("audit", count, "the audit daemon took no records for too long")
        self._settle()

    def look(self) -> None:
        """Ask the kernel whether we are its reader, become it if not, and see what it lost. Raises: Unavailable."""
        status = self._link.status()
        if status.pid != os.getpid():
            try:
                self._register()
            except Unavailable as error:
                self._trouble(error.message)
        if status.lost != self._lost:
            # A counter of 32 bits.
            count = (status.lost - self._lost) % (1 << 32)
            self._lost = status.lost
            self._report_lost("kernel", count, "its backlog was full")
        # What came among the kernel's answers makes its socket readable no more.
        self.read()
        self._say()

    def _register(self) -> None:
        """Become the reader, set the rules and lock them. Raises: Unavailable."""
        self._link.register()
        present = {rules.comparable(rule) for rule in self._link.rules()}
        missing = [rule for rule in rules.RULES if rules.comparable(rule) not in present]
        if self._link.status().enabled == netlink.LOCKED:
            if missing:
                self._trouble(f"{len(missing)} rules are missing, and cannot be added until the host starts again")
                return
        else:
            for rule in missing:
                self._link.add_rule(rule)
            self._link.lock()
        self._problem = ""
        extra: dict[str, object] = {"rules": len(rules.RULES), "again": self._again}
        self._outbox.report(_own("kernel.start", extra=extra), "")
        self._again = True

    def _trouble(self, problem: str) -> None:
        """Say once that this does not work."""
        if problem != self._problem:
            self._problem = problem
            self._outbox.report(_own("kernel.start", extra={"again": self._again}, reason=problem, failed=True), "")

    def _take(self, messages: Iterable[Message]) -> None:
        now = self._clock()
        for message in messages:
            if message.type == netlink.REPLACE:
                # The payload is who asked; the kernel tells it to who asks to be let go, too.
                if message.text[:4] == os.getpid().to_bytes(4, sys.byteorder):
                    continue
                extra: dict[str, object] = {"change": "another process wanted to read the kernel's audit"}
                self._outbox.report(_own("kernel.config", extra=extra, reason="the kernel refused it", failed=True), "")
            elif (line := parse(message.text)) is not None:
                self._gaps.saw(line.serial, now)
                self._handle(self._joiner.add(message.type, line, now))

    def _handle(self, events: Iterable[Event]) -> None:
        for event in events:
            if any(type_ in TYPES for type_, _ in event.records):
                for change in self._gatherer.take(event):
                    self._queue(change)
            elif finding := self._judge.judge(event):
                self._outbox.report(finding.entry, finding.who)

    def _queue(self, change: Change) -> None:
        try:
            self._changes.put_nowait(change)
        except asyncio.QueueFull:
            self._outbox.dropped += 1

    async def _join(self) -> None:
        """Give each change of libvirt's the request of the call that it is a part of; one by one, in their order."""
        while True:
            change = await self._changes.get()
            self._joining = True
            entry = await self._joined(change)
            self._outbox.report(entry, entry.object.id)
            self._joining = False
            self._settle()

    async def _joined(self, change: Change) -> Entry:
        entry = change.entry
        if change.asked is None or entry.type == "libvirt.unasked":
            return entry
        while change.asked:
            try:
                request = await self._audit.operation(entry.object.id, change.asked, change.time)
            except Unavailable:
                await asyncio.sleep(self._retry)
                continue
            if request:
                return msgspec.structs.replace(entry, request=request)
            break
        return Entry(
            type="libvirt.unasked",
            actor=entry.actor,
            object=entry.object,
            outcome="failure",
            reason=_UNASKED,
            extra=entry.extra,
        )

    async def _keep(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()
            ticks += 1
            if ticks % _LOOK_TICKS == 0:
                self.look()
                notify("WATCHDOG=1")

    def _report_lost(self, where: str, count: int, reason: str) -> None:
        extra: dict[str, object] = {"where": where, "count": count}
        self._outbox.report(_own("kernel.lost", extra=extra, reason=reason, failed=True), where)

    def _settle(self) -> None:
        """Remember up to where all is written, for a run that comes after a kill."""
        busy = len(self._joiner) or self._gaps.waiting or self._joining or not self._changes.empty()
        if not busy and not self._outbox.busy and self._settled != self._gaps.newest:
            self._settled = self._gaps.newest
            self._say()

    def _say(self) -> None:
        """Write the status file."""
        said = Said(int(self._clock()), os.getpid(), self._problem, self._settled, self._lost, self._readers)
        status.write(self._status, said)

    async def _end(self) -> None:
        with suppress(Unavailable):
            self._link.unregister()
        while messages := self._link.receive(_BATCH):
            self._take(messages)
        self._handle(self._joiner.ripe(self._clock(), 0.0))
        try:
            async with asyncio.timeout(_DRAIN_S):
                while not self._changes.empty() or self._joining:
                    await asyncio.sleep(0.01)
                await self._outbox.close()
                await self._outbox.append(_own("kernel.stop"))
                self._settle()
        except (TimeoutError, Unavailable):
            print("kernel: the audit daemon did not take the last records", file=sys.stderr, flush=True)


def _own(type: Own, *, extra: dict[str, object] | None = None, reason: str = "", failed: bool = False) -> Entry:
    """A record about the reading itself."""
    return Entry(type=type, outcome="failure" if failed else "success", reason=reason, extra=extra or {})


def _read(path: Path) -> Said | None:
    """What the run before left."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Said)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


async def serve(link: Link, audit: Audit, status: Path) -> None:
    """Run until SIGTERM. Raises: Unavailable when the kernel's socket breaks."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    notify()
    await Reader(link, audit, status).run(stop)


def run() -> None:
    """The program ``python3 -m vmm.kernel``."""
    asyncio.run(serve(netlink.Kernel(netlink.open_audit()), AuditClient(), KERNEL_STATUS))
