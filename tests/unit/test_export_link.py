"""Keeping a server up with the trail: what counts as received, how often is tried, what is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.harness.collector import parsed
from tests.unit.test_export_message import record
from vmm.audit.events import EVENTS
from vmm.audit.records import Entry
from vmm.audit.search import Query
from vmm.config.types import AuditServer
from vmm.errors import Unavailable
from vmm.export import link as link_module
from vmm.export.channel import End, Failure
from vmm.export.link import MOST_S, SETTLE_S, STALL_S, Backoff, Delivery, Link

pytestmark = pytest.mark.sfr("FAU_STG_EXT.1", "FTP_ITC_EXT.1")

SERVER = AuditServer("192.0.2.9", "", name="logs.example.org")


def test_attempts_become_rare_and_hosts_part() -> None:
    sure, lucky = Backoff(lambda: 0.0), Backoff(lambda: 1.0)
    assert [sure.next() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, MOST_S]
    assert [lucky.next() for _ in range(3)] == [0.5, 1, 2]
    sure.reset()
    assert sure.next() == 1


def test_what_the_server_acknowledged_counts_once_the_connection_outlasted_it() -> None:
    delivery = Delivery(5, 0.0)
    delivery.wrote(1000, 7, 1.0)
    delivery.wrote(2000, 9, 2.0)
    delivery.look(999, 3.0)
    assert (delivery.sent, delivery.settled, delivery.idle) == (5, 5, False)
    delivery.look(1500, 4.0)
    assert (delivery.sent, delivery.settled) == (7, 5)
    delivery.look(2000, 4.0 + SETTLE_S)
    assert (delivery.sent, delivery.settled, delivery.idle) == (9, 7, True)
    delivery.look(2000, 3.9 + 2 * SETTLE_S)
    assert delivery.settled == 7
    delivery.look(2000, 4.0 + 2 * SETTLE_S)
    assert delivery.settled == 9


def test_a_server_that_takes_nothing_stalls_and_one_that_has_all_does_not() -> None:
    delivery = Delivery(0, 0.0)
    delivery.look(0, STALL_S)
    assert not delivery.stalls(10 * STALL_S)
    delivery.wrote(1000, 7, 100.0)
    assert not delivery.stalls(99.9 + STALL_S)
    assert delivery.stalls(100.0 + STALL_S)
    # A slow one is none that stalls.
    delivery.look(1, 150.0)
    assert not delivery.stalls(100.0 + STALL_S)
    delivery.look(1000, 151.0)
    assert not delivery.stalls(10 * STALL_S)


def test_a_goodbye_that_was_answered_settles_all() -> None:
    delivery = Delivery(5, 0.0)
    delivery.taken()
    assert delivery.settled == 5
    delivery.wrote(1000, 7, 1.0)
    delivery.look(1000, 1.0)
    delivery.wrote(2000, 9, 1.0)
    delivery.taken()
    assert (delivery.sent, delivery.settled) == (9, 9)


class FakeChannel:
    """A connection that keeps what it is sent; ``reads`` is whether the server takes it."""

    def __init__(self, *, reads: bool = True, leaves: bool = True) -> None:
        self.certificate = "c" * 64
        self.reads, self.leaves = reads, leaves
        self.written = 0
        self.got: list[int] = []
        self.end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.closed = self.aborted = False

    @property
    def acknowledged(self) -> int:
        return self.written if self.reads else 0

    def write(self, data: bytes) -> None:
        if self.end.done():
            raise BrokenPipeError(32, "Broken pipe")
        self.written += len(data)
        while data:
            length, _, data = data.partition(b" ")
            self.got.append(parsed(data[: int(length)]).seq)
            data = data[int(length) :]

    async def drain(self) -> None:
        if not self.reads:
            await asyncio.Event().wait()

    async def ended(self) -> End:
        return await asyncio.shield(self.end)

    async def close(self, _seconds: float) -> bool:
        self.closed = True
        return self.leaves

    def abort(self) -> None:
        self.aborted = True


class Trail:
    """The audit daemon's part: ``last`` records, of which ``first`` is the oldest that is left."""

    def __init__(self, last: int, first: int = 1) -> None:
        self.last, self.first = last, first
        self.down = False
        self.news = asyncio.Event()

    async def health(self) -> dict[str, Any]:
        if self.down:
            raise Unavailable("gone")
        return {"seq": self.last}

    async def search(self, query: Query, wait: float = 0.0) -> dict[str, Any]:
        if self.down:
            raise Unavailable("gone")
        begin = max(query.after + 1, self.first)
        found = [record(seq=seq) for seq in range(begin, min(self.last, begin + query.limit - 1) + 1)]
        if not found and wait:
            self.news.clear()
            await asyncio.wait([asyncio.ensure_future(self.news.wait())], timeout=0.01)
        return {"records": found, "next": None, "reached": self.last}


class Quick(Backoff):
    """Never waits for long."""

    def next(self) -> float:
        return 0.001


class Rig:
    """A link, the connections that it makes, and what it reports."""

    def __init__(self, trail: Trail, settled: int = 0) -> None:
        self.trail = trail
        self.now = 0.0
        self.channels: list[FakeChannel] = []
        self.failures: list[Failure] = []
        self.entries: list[Entry] = []
        self.kinds: list[str] = []
        self.reads = self.leaves = True
        self.link = Link(
            *(SERVER, "hf1", self._open, trail, self._report, settled),
            clock=lambda: self.now,
            backoff=Quick(),
        )

    async def _open(self) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        self.channels.append(FakeChannel(reads=self.reads, leaves=self.leaves))
        return self.channels[-1]

    def _report(self, entry: Entry, kind: str) -> None:
        EVENTS.check(entry, "holdfast-export")
        self.entries.append(entry)
        self.kinds.append(kind)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)


def play(work: Callable[[Rig], Coroutine[Any, Any, None]], last: int = 3, settled: int = 0) -> None:
    """Run a link through a story, then stop it."""

    async def run() -> None:
        rig = Rig(Trail(last), settled)
        task = asyncio.create_task(rig.link.run())
        try:
            await work(rig)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TICK_S", "_RETRY_S"):
        monkeypatch.setattr(link_module, name, 0.001)


def test_a_server_gets_what_it_lacks_and_then_what_comes() -> None:
    async def story(rig: Rig) -> None:
        await rig.until(lambda: rig.link.status().sent == 500)
        await rig.until(lambda: rig.link.status().state == "idle")
        rig.trail.last = 502
        rig.trail.news.set()
        await rig.until(lambda: rig.link.status().sent == 502)
        assert rig.channels[0].got == list(range(300, 503))
        assert rig.link.settled == 299
        rig.now += SETTLE_S
        await rig.until(lambda: rig.link.settled == 502)
        (entry,) = rig.entries
        assert (entry.type, entry.outcome, entry.object.kind) == ("export.connect", "success", "server")
        assert entry.extra == {"remote_endpoint": "192.0.2.9:6514", "server_certificate": "c" * 64}

    play(story, last=500, settled=299)


def test_after_an_outage_it_goes_on_behind_what_settled() -> None:
    async def story(rig: Rig) -> None:
        await rig.until(lambda: rig.link.status().sent == 3)
        rig.now += SETTLE_S
        await rig.until(lambda: rig.link.settled == 3)
        rig.trail.last = 5
        await rig.until(lambda: rig.link.status().sent == 5)
        rig.channels[0].end.set_result(End("Connection reset by peer"))
        await rig.until(lambda: len(rig.channels) == 2 and rig.channels[1].got == [4, 5])
        assert rig.channels[0].aborted and not rig.channels[0].closed
        ended = rig.entries[1]
        assert (ended.type, ended.outcome, ended.reason) == (
            "export.disconnect",
            "failure",
            "Connection reset by peer",
        )
        # Until the new connection has proven itself.
        assert rig.link.status().problem == "Connection reset by peer"
        rig.now += SETTLE_S
        await rig.until(lambda: not rig.link.status().problem)

    play(story)


def test_what_a_server_was_removed_from_the_trail_is_left_out() -> None:
    async def story(rig: Rig) -> None:
        rig.trail.first = 8
        await rig.until(lambda: rig.link.status().sent == 9)
        assert rig.channels[0].got == [8, 9]

    play(story, last=9)


def test_a_trail_that_ends_before_what_a_server_has_is_another_one() -> None:
    async def story(rig: Rig) -> None:
        await rig.until(lambda: rig.link.status().sent == 3)
        assert rig.channels[0].got == [1, 2, 3]

    play(story, last=3, settled=1000)


def test_without_audit_the_connection_stays() -> None:
    async def story(rig: Rig) -> None:
        await rig.until(lambda: rig.link.status().sent == 3)
        rig.trail.down = True
        await asyncio.sleep(0.05)
        rig.trail.last, rig.trail.down = 4, False
        await rig.until(lambda: rig.link.status().sent == 4)
        assert len(rig.channels) == 1

    play(story)


def test_a_server_that_takes_nothing_is_left() -> None:
    async def story(rig: Rig) -> None:
        rig.reads = False
        await rig.until(lambda: rig.channels and rig.channels[0].got == [1, 2, 3])
        rig.now += STALL_S
        await rig.until(lambda: len(rig.entries) >= 2)
        assert rig.entries[1].reason == "the server took nothing for 60 s" and rig.link.status().sent == 0

    play(story)


def test_each_failure_is_told_with_its_fields() -> None:
    failures = [
        Failure("network", "Connection refused"),
        Failure("certificate", "certificate refused: certificate has expired"),
        Failure("identity", "certificate refused: Hostname mismatch", "DNS:evil.example.org"),
    ]

    async def story(rig: Rig) -> None:
        await rig.until(lambda: rig.channels)
        told = [(e.type, e.outcome, e.reason, e.object.id, e.object.name) for e in rig.entries[:3]]
        assert told == [
            (type_, "failure", failure.reason, "192.0.2.9:6514", "logs.example.org")
            for type_, failure in zip(("export.connect", "export.connect", "export.identity"), failures, strict=True)
        ]
        assert rig.entries[2].extra == {
            "remote_endpoint": "192.0.2.9:6514",
            "presented_identifier": "DNS:evil.example.org",
            "reference_identifier": "logs.example.org",
        }
        # Each kind is throttled by itself, so that none hides another.
        assert len(set(rig.kinds[:3])) == 3

    async def run() -> None:
        rig = Rig(Trail(1))
        rig.failures = list(failures)
        task = asyncio.create_task(rig.link.run())
        await story(rig)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize(("leaves", "settled"), [(True, 3), (False, 0)])
def test_at_the_end_it_says_goodbye_and_believes_the_answer(leaves: bool, settled: int) -> None:
    async def run() -> None:
        rig = Rig(Trail(3))
        rig.leaves = leaves
        task = asyncio.create_task(rig.link.run())
        await rig.until(lambda: rig.link.status().sent == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert rig.channels[0].closed and rig.link.settled == settled
        assert (rig.entries[-1].type, rig.entries[-1].outcome) == ("export.disconnect", "success")

    asyncio.run(run())
