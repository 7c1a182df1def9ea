"""Checkpoints: when they are made, and what a power cut leaves of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.unit.test_audit_daemon import EVENT, ME, OWN, LocalAnchor, stored
from vmm import wire
from vmm.audit import anchoring, verify
from vmm.audit import store as store_module
from vmm.audit.checkpoint import Checkpoint, Proof
from vmm.audit.client import AuditClient
from vmm.audit.events import EVENTS
from vmm.audit.journal import Journal
from vmm.audit.records import Entry, Producer
from vmm.audit.server import Service
from vmm.audit.store import Store
from vmm.errors import Forbidden, Unavailable

pytestmark = pytest.mark.sfr("FAU_STG.1")


@asynccontextmanager
async def run(store: Path, anchor: anchoring.Anchor, *, readers: bool = True) -> AsyncIterator[Service]:
    """A run of the daemon that is killed at the end."""
    store.mkdir(exist_ok=True)
    journal = Journal(Store(store, producer=OWN, boot="boot"))
    service = Service(journal, OWN, {ME: "holdfast-core"}, frozenset({ME} if readers else ()), anchor=anchor)
    committing = asyncio.create_task(journal.run())
    try:
        await service.open()
        yield service
    finally:
        committing.cancel()
        journal.store.close()


async def put(service: Service, count: int = 2) -> None:
    for number in range(count):
        await service._journal.append(Entry(type=EVENT, request=f"r{number}"), OWN)


def checkpoints(store: Path) -> list[Checkpoint]:
    return [Checkpoint.of(record) for record in stored(store) if record.type == "audit.checkpoint"]


def trail(store: Path, anchor: anchoring.Anchor, rounds: int = 3, tail: int = 2) -> list[bytes]:
    """The lines of a run: audit.start, ``rounds`` times two records and a checkpoint, and a tail without."""

    async def fill() -> None:
        async with run(store, anchor) as service:
            for _ in range(rounds):
                await put(service)
                await service.checkpoints.make()
            await put(service, tail)

    asyncio.run(fill())
    return [line for file in verify.segments(store) for line in verify.lines(file)]


class Failing(LocalAnchor):
    """Does what it is told and fails behind that, or does not do it: a power cut around a step."""

    def __init__(self, folder: Path, step: str) -> None:
        super().__init__(folder)
        self.step = step

    async def certify(self, digest: str, past: int) -> Proof:
        if self.step == "before":
            raise Unavailable("cut")
        made = await super().certify(digest, past)
        if self.step == "certified":
            raise Unavailable("cut")
        return made

    async def advance(self, past: int) -> None:
        if self.step == "stored":
            raise Unavailable("cut")
        await super().advance(past)


@pytest.mark.parametrize("step", ["before", "certified", "stored", "advanced"])
def test_a_power_cut_at_any_step_leaves_a_trail_that_verifies_and_goes_on(step: str, tmp_path: Path) -> None:
    folder, store = tmp_path / "anchor", tmp_path / "store"

    async def cut() -> None:
        async with run(store, Failing(folder, step)) as service:
            await put(service)
            if step in ("before", "certified"):
                with pytest.raises(Unavailable, match="cut"):
                    await service.checkpoints.make()
            else:
                await service.checkpoints.make()

    trail(store, LocalAnchor(folder), rounds=1)
    for _ in range(3):
        asyncio.run(cut())
        assert verify.verify_directory(store).problem is None
    trail(store, LocalAnchor(folder), rounds=2)
    report = verify.verify_directory(store)
    assert report.problem is None and report.last - report.covered == 3
    done = [Checkpoint.of(r).proof.counter for r in stored(store) if r.type == "audit.checkpoint" and not r.reason]
    assert done == list(range(1, len(done) + 1)) and len(done) == (3 if step in ("before", "certified") else 6)


def test_a_checkpoint_torn_at_any_byte_is_made_again(tmp_path: Path) -> None:
    folder, store = tmp_path / "anchor", tmp_path / "store"
    lines = trail(store, LocalAnchor(folder), rounds=2, tail=0)
    anchor = (folder / "counter").read_bytes()
    file = verify.segments(store)[0]
    whole = b"".join(lines)
    for end in range(len(whole) - len(lines[-1]), len(whole), 97):
        file.write_bytes(whole[:end])
        # What was not stored was not advanced past.
        (folder / "counter").write_bytes(b"2\n")
        trail(store, LocalAnchor(folder), rounds=1)
        report = verify.verify_directory(store)
        assert report.problem is None and report.newest is not None and report.newest.proof.counter == 2
    assert anchor == b"3\n"


def test_checkpoints_are_made_when_there_is_news_and_else_not(tmp_path: Path) -> None:
    async def keep() -> None:
        async with run(tmp_path / "store", LocalAnchor(tmp_path / "anchor")) as service:
            service.checkpoints._first = service.checkpoints._interval = 0.01
            keeping = asyncio.create_task(service.checkpoints.keep())
            for number in range(1, 4):
                async with asyncio.timeout(10):
                    while len(checkpoints(tmp_path / "store")) < number:
                        await asyncio.sleep(0.005)
                await asyncio.sleep(0.1)
                assert len(checkpoints(tmp_path / "store")) == number
                # Not two: a checkpoint may come between them.
                await put(service, 1)
            keeping.cancel()

    asyncio.run(keep())


def test_a_checkpoint_that_only_a_later_release_can_read_is_followed_by_others(tmp_path: Path) -> None:
    async def go_on() -> None:
        async with run(tmp_path / "store", LocalAnchor(tmp_path / "anchor")) as service:
            later = Entry(type="audit.checkpoint", extra={"proves": "otherwise"})
            await service._journal.append(later, OWN)
            made = await service.checkpoints.make()
            assert made is not None and made.covers == service._journal.store.end[0] - 1
            assert service.checkpoints.failure == ""

    asyncio.run(go_on())


def test_a_full_segment_is_anchored_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 4000)
    store = tmp_path / "store"

    async def keep() -> None:
        async with run(store, LocalAnchor(tmp_path / "anchor")) as service:
            service.checkpoints._first, service.checkpoints._interval = 0, 3600
            keeping = asyncio.create_task(service.checkpoints.keep())
            async with asyncio.timeout(10):
                while not checkpoints(store):
                    await asyncio.sleep(0.005)
                for wanted in (2, 3):
                    await put(service, 8)
                    while len(checkpoints(store)) < wanted:
                        await asyncio.sleep(0.005)
            keeping.cancel()

    asyncio.run(keep())
    assert verify.verify_directory(store).problem is None
    assert len({checkpoint.segment for checkpoint in checkpoints(store)}) == 3


def test_the_end_of_a_run_is_anchored_behind_its_last_record(tmp_path: Path) -> None:
    async def end() -> None:
        async with run(tmp_path / "store", LocalAnchor(tmp_path / "anchor")) as service:
            await put(service)
            await service.close()

    asyncio.run(end())
    asyncio.run(end())
    assert [r.type for r in stored(tmp_path / "store")][3:5] == ["audit.stop", "audit.checkpoint"]
    assert not [r for r in stored(tmp_path / "store") if r.type == "audit.recovered"]
    report = verify.verify_directory(tmp_path / "store")
    assert (report.problem, report.covered) == (None, report.last - 1)


def test_whoever_may_read_may_have_it_anchored(tmp_path: Path) -> None:
    async def ask() -> None:
        for readers in (True, False):
            anchor = LocalAnchor(tmp_path / "anchor")
            async with run(tmp_path / "store", anchor, readers=readers) as service:
                audit = AuditClient(tmp_path / "audit.sock")
                async with await wire.serve(tmp_path / "audit.sock", service.handle):
                    if readers:
                        seq = await audit.append(Entry(type=EVENT))
                        first = await audit.checkpoint()
                        assert first["covers"] == seq and first == await audit.checkpoint()
                        assert (await audit.health())["anchored"] == seq
                    else:
                        with pytest.raises(Forbidden):
                            await audit.checkpoint()

    asyncio.run(ask())


def test_what_cannot_be_anchored_is_said_once_and_made_up_for(tmp_path: Path) -> None:
    anchor = Failing(tmp_path / "anchor", "before")

    async def fail() -> None:
        async with run(tmp_path / "store", anchor) as service:
            for _ in range(3):
                with pytest.raises(Unavailable, match="not anchored: cut"):
                    await service.checkpoints.make()
            assert service.checkpoints.failure == "cut"
            anchor.step = ""
            await service.checkpoints.make()
            assert service.checkpoints.failure == ""

    asyncio.run(fail())
    said = [record for record in stored(tmp_path / "store") if record.type == "audit.checkpoint"]
    assert [(record.outcome, record.reason) for record in said] == [("failure", "cut"), ("success", "")]
    for record in said:
        EVENTS.check(record, "holdfast-audit")
    assert verify.verify_directory(tmp_path / "store").covered == said[0].seq


def test_what_comes_in_while_a_checkpoint_is_made_is_news(tmp_path: Path) -> None:
    async def make() -> None:
        async with run(tmp_path / "store", LocalAnchor(tmp_path / "anchor")) as service:
            real = service.checkpoints._anchor.certify

            async def busy(digest: str, past: int) -> Proof:
                await put(service, 1)
                return await real(digest, past)

            service.checkpoints._anchor.certify = busy  # type: ignore[method-assign]
            await service.checkpoints.make()
            service.checkpoints._anchor.certify = real  # type: ignore[method-assign]
            newest = await service.checkpoints.make()
            assert newest is not None and newest == await service.checkpoints.make()

    asyncio.run(make())
    # audit.start; one record meanwhile; the checkpoint that does not cover it; the one that does.
    assert [checkpoint.covers for checkpoint in checkpoints(tmp_path / "store")] == [1, 3]
    assert verify.verify_directory(tmp_path / "store").problem is None


def test_whoever_stops_waiting_for_a_checkpoint_does_not_have_it_counted_twice(tmp_path: Path) -> None:
    async def cancel() -> None:
        async with run(tmp_path / "store", LocalAnchor(tmp_path / "anchor")) as service:
            journal, gate, there = service._journal, asyncio.Event(), asyncio.Event()
            real = journal.append

            async def slow(entry: Entry, producer: Producer) -> int:
                seq = await real(entry, producer)
                there.set()
                await gate.wait()
                return seq

            journal.append = slow  # type: ignore[method-assign]
            making = asyncio.create_task(service.checkpoints.make())
            await there.wait()
            making.cancel()
            gate.set()
            await service.close()

    asyncio.run(cancel())
    assert len(checkpoints(tmp_path / "store")) == 2
    assert verify.verify_directory(tmp_path / "store").problem is None
