"""Checkpoints: when they are made, what a power cut leaves of them, and what a verifier makes of a trail with them."""

from __future__ import annotations

import asyncio
import datetime
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_audit_daemon import EVENT, ME, OWN, LocalAnchor, stored
from vmm import wire
from vmm.audit import anchoring, verify
from vmm.audit import store as store_module
from vmm.audit.checkpoint import Checkpoint, Proof
from vmm.audit.client import AuditClient
from vmm.audit.events import EVENTS
from vmm.audit.records import GENESIS, Entry, canonical, digest, parse
from vmm.audit.server import Journal, Service
from vmm.audit.store import Draft, Store
from vmm.errors import Forbidden, Unavailable, UserError

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


def rechained(lines: Sequence[bytes]) -> list[bytes]:
    """The lines numbered and linked anew, as whoever can write the store would do."""
    made: list[bytes] = []
    for number, line in enumerate(lines, 1):
        prev = digest(made[-1]) if made else GENESIS
        made.append(canonical(msgspec.structs.replace(parse(line), seq=number, prev=prev)))
    return made


def verified(lines: Sequence[bytes], folder: Path, known: Checkpoint | None = None) -> verify.Report:
    file = folder / "export"
    file.write_bytes(b"".join(lines))
    return verify.verify_file(file, known=known)


def changed(line: bytes) -> bytes:
    other = line.replace(b'"request":"r', b'"request":"x')
    assert other != line
    return other


def test_a_whole_trail_says_how_far_it_is_anchored(tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    report = verified(lines, tmp_path)
    assert (report.problem, report.covered, report.last) == (None, 9, 12)
    text = report.text()
    assert "NOT anchored: records 10 to 12" in text and "SOFTWARE" in text
    assert report.newest is not None and report.newest.proof.fingerprint in text
    # A part proves itself as well, from any record up to the checkpoint that covers it.
    part = verified(lines[4:10], tmp_path)
    assert (part.problem, part.first, part.covered, part.last) == (None, 5, 9, 10)
    assert "NOT anchored: records 5 to 6" in verified(lines[4:6], tmp_path).text()
    # A checkpoint known from elsewhere covers what the trail's own do not.
    known = checkpoints(tmp_path / "store")[-1]
    assert verified(lines[:9], tmp_path, known).covered == 9


Attack = Callable[[list[bytes]], list[bytes]]
ATTACKS: dict[str, tuple[Attack, str, int]] = {
    "edit": (lambda x: [*x[:1], changed(x[1]), *x[2:]], "edit", 3),
    "edit, linked anew": (lambda x: rechained([*x[:1], changed(x[1]), *x[2:]]), "edit", 4),
    "deletion": (lambda x: x[:1] + x[2:], "deletion", 2),
    "deletion, linked anew": (lambda x: rechained(x[:1] + x[2:]), "edit", 3),
    "deletion of a checkpoint, linked anew": (lambda x: rechained(x[:3] + x[4:]), "edit", 6),
    "reordering": (lambda x: [x[0], x[2], x[1], *x[3:]], "reordering", 2),
    "doubling": (lambda x: [*x[:2], *x[1:]], "reordering", 3),
    "reordering, linked anew": (lambda x: rechained([x[0], x[2], x[1], *x[3:]]), "edit", 4),
    "truncation": (lambda x: x[:5], "truncation", 6),
    "truncation at a checkpoint": (lambda x: x[:7], "truncation", 8),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_done_to_a_trail_is_named(attack: str, tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    known = checkpoints(tmp_path / "store")[-1]
    assert verified(lines, tmp_path, known).problem is None
    do, kind, seq = ATTACKS[attack]
    problem = verified(do(lines), tmp_path, known).problem
    assert problem is not None and (problem.kind, problem.seq) == (kind, seq), problem


def test_another_store_is_no_substitute(tmp_path: Path) -> None:
    anchor = LocalAnchor(tmp_path / "anchor")
    trail(tmp_path / "store", anchor)
    known = checkpoints(tmp_path / "store")[0]
    # One of another host: the key says so, to who knows it.
    foreign = trail(tmp_path / "foreign", LocalAnchor(tmp_path / "other"))
    assert verified(foreign, tmp_path).problem is None
    problem = verified(foreign, tmp_path, known).problem
    assert problem is not None and problem.kind == "substitution" and "another" in problem.why
    # One that was begun anew on the same host: the known record says so.
    anew = trail(tmp_path / "anew", anchor)
    problem = verified(anew, tmp_path, known).problem
    assert problem is not None and (problem.kind, problem.seq) == ("substitution", known.covers)
    # Half a trail of each.
    mixed = rechained([*trail(tmp_path / "mixed", anchor), *foreign])
    problem = verified(mixed, tmp_path).problem
    assert problem is not None and problem.kind == "substitution"


def test_an_older_store_put_back_shows_once_it_goes_on(tmp_path: Path) -> None:
    anchor, store, old = LocalAnchor(tmp_path / "anchor"), tmp_path / "store", tmp_path / "old"
    trail(store, anchor, rounds=2)
    shutil.copytree(store, old)
    trail(store, anchor, rounds=2)
    assert verify.verify_directory(store).problem is None
    trail(old, anchor, rounds=1)
    problem = verify.verify_directory(old).problem
    assert problem is not None and problem.kind == "replay" and "checkpoints between 2 and 5" in problem.why


def test_not_even_the_last_checkpoint_can_be_taken_back(tmp_path: Path) -> None:
    """Its number was taken as soon as it was stored."""
    anchor, store = LocalAnchor(tmp_path / "anchor"), tmp_path / "store"
    trail(store, anchor, rounds=2)
    file = verify.segments(store)[-1]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: checkpoints(store)[-1].covers]))
    trail(store, anchor, rounds=1)
    problem = verify.verify_directory(store).problem
    assert problem is not None and problem.kind == "replay" and "checkpoints between 1 and 3" in problem.why


def test_a_clock_that_was_set_back_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, producer=OWN, boot="boot")

    class Clock(datetime.datetime):
        hour_back = False

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(2026, 11, 23, 4 if cls.hour_back else 5, tzinfo=tz)

    monkeypatch.setattr(datetime, "datetime", Clock)
    for back in (False, False, True, True, False):
        Clock.hour_back = back
        store.append([Draft(Entry(type=EVENT), OWN)])
    store.close()
    report = verify.verify_directory(tmp_path)
    assert report.problem is None
    (note,) = report.notes
    assert note == "record 3: the clock was set back from 2026-11-23T05:00:00.000000Z to 2026-11-23T04:00:00.000000Z"
    assert note in report.text()


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
                await put(service)
            keeping.cancel()

    asyncio.run(keep())


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


def test_a_checkpoint_that_is_not_genuine_is_not_taken_as_known(tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    good = checkpoints(tmp_path / "store")[0]
    file = tmp_path / "known.json"
    for content, says in (
        (msgspec.json.encode(msgspec.structs.replace(good, covers=4)), "not genuine"),
        (b"{}", "holds no checkpoint"),
        (b"\xff", "holds no checkpoint"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=says):
            verify.command([str(tmp_path / "store"), "--known", str(file)])
    file.write_bytes(msgspec.json.encode(good))
    verify.command([str(tmp_path / "store"), "--known", str(file)])
    assert len(lines) == 12
