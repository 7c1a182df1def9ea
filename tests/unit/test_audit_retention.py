"""What the store lets go and when, in which order on the disk, and what it does when there is no room."""

from __future__ import annotations

import datetime
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from vmm.audit import files, retention, search, verify
from vmm.audit import rule as rule_module
from vmm.audit import segments as segments_module
from vmm.audit import store as store_module
from vmm.audit.events import EVENTS
from vmm.audit.records import Clock, Entry, Producer, Record, parse
from vmm.audit.retention import Removed
from vmm.audit.rule import Rule
from vmm.audit.store import Draft, Store
from vmm.errors import Unavailable

pytestmark = pytest.mark.sfr("FAU_STG.1", "FAU_STG_EXT.1")

OWN = Producer(903, "holdfast-audit")
CORE = Producer(902, "holdfast-core")
SYNCHRONISED = Clock("ntp", "synchronised")
SEGMENT = 3000
QUOTA = 5 * SEGMENT
SMALL = Rule(keep_mib=32)


class Cut(BaseException):
    """The power fails."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of some records, and of the least quota that can be configured five of them."""
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(rule_module, "MIB", QUOTA // 32)


def open_store(folder: Path, clock: Clock = SYNCHRONISED) -> Store:
    folder.mkdir(exist_ok=True)
    return Store(folder, producer=OWN, boot="boot", clock=lambda: clock)


def put(store: Store, count: int, *, vital: bool = False) -> None:
    for number in range(count):
        draft = Draft(Entry(type="machine.unknown", request=f"r{number}"), OWN if vital else CORE)
        store.append([draft], vital=vital)


def small_store(folder: Path, rule: Rule = SMALL) -> Store:
    store = open_store(folder)
    store.memory.set_rule(rule)
    return store


def stored(folder: Path) -> list[Record]:
    return [parse(line) for file in verify.segments(folder) for line in verify.lines(file)]


def of_type(folder: Path, type_: str) -> list[Record]:
    found = [record for record in stored(folder) if record.type == type_]
    for record in found:
        EVENTS.check(record, "holdfast-audit")
    return found


def removals(folder: Path) -> list[Removed]:
    return [gone for record in of_type(folder, "audit.removed") if (gone := Removed.of(record))]


def firsts(folder: Path) -> list[int]:
    return [int(file.stem) for file in verify.segments(folder)]


def test_the_oldest_make_room_and_the_loss_is_on_record(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    put(store, 200)
    assert store.used <= QUOTA and not store.full
    trail = stored(tmp_path)
    assert trail[0].seq == store.segments.first > 1 and trail[-1].seq == store.end[0]
    newest = removals(tmp_path)[-1]
    assert (newest.last, newest.head) == (trail[0].seq - 1, trail[0].prev)
    # One removal follows the other, and nobody had any of it.
    assert newest.lost == newest.last - newest.first + 1 and newest.exported == 0
    record = of_type(tmp_path, "audit.removed")[-1]
    assert (record.outcome, record.extra["cause"]) == ("failure", "full")
    report = verify.verify_directory(tmp_path, head=store.end[1])
    assert report.problem is None and report.vouched == record.seq
    said = f"those before record {report.first} were removed: record {record.seq} says so, which is NOT anchored"
    assert said in report.text()
    # Whoever reads from before that begins with the oldest, and pages fit together.
    page = store.read(0, 5)
    assert parse(page.records[0] + b"\n").seq == trail[0].seq and page.next == trail[0].seq + 4
    assert parse(store.read(page.next or 0, 1).records[0] + b"\n").seq == trail[0].seq + 5
    store.close()
    again = open_store(tmp_path)
    assert again.memory.rule == SMALL and again.used == store.used
    put(again, 50)
    assert verify.verify_directory(tmp_path).problem is None


def test_what_was_exported_is_no_loss(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    put(store, 20)
    store.memory.set_exported(12)
    store.memory.set_exported(3)
    assert store.memory.exported == 12
    store.close()
    store = open_store(tmp_path)
    assert store.memory.exported == 12
    put(store, 60)
    assert {bool(gone.lost) for gone in removals(tmp_path)} <= {True}
    for exported, lost in ((12, 0), (20, 0), (8, 4), (2, 8), (0, 8)):
        gone = retention.removed(5, 12, "0" * 96, exported)
        assert (gone.lost, gone.entry("full", "x", "").outcome) == (lost, "failure" if lost else "success")
        assert gone.entry("purge", "x", "").outcome == gone.entry("age", "x", "").outcome == "success"


def test_a_store_that_refuses_says_so_once_and_takes_what_is_vital(tmp_path: Path) -> None:
    store = small_store(tmp_path, Rule("refuse", keep_mib=32))
    with pytest.raises(Unavailable, match="the audit store is full"):
        put(store, 200)
    last = store.end[0]
    for _ in range(5):
        with pytest.raises(Unavailable, match="full"):
            put(store, 1)
    assert store.full and store.end[0] == last and len(of_type(tmp_path, "audit.full")) == 1
    assert not of_type(tmp_path, "audit.removed") and firsts(tmp_path)[0] == 1
    put(store, 5, vital=True)
    assert store.end[0] == last + 5
    # It is still so after a restart.
    store.close()
    store = open_store(tmp_path)
    with pytest.raises(Unavailable, match="full"):
        put(store, 5)
    # An auditor makes room, and it goes on.
    gone = store.purge(firsts(tmp_path)[3], "r1")
    assert gone and gone.first == 1 and gone.last == firsts(tmp_path)[0] - 1
    put(store, 1)
    assert not store.full and verify.verify_directory(tmp_path).problem is None
    (record,) = of_type(tmp_path, "audit.removed")
    assert (record.request, record.outcome, record.extra["cause"]) == ("r1", "success", "purge")


def test_what_is_vital_has_its_limit_too(tmp_path: Path) -> None:
    store = small_store(tmp_path, Rule("refuse", keep_mib=32))
    with pytest.raises(Unavailable, match="full"):
        put(store, 200)
    with pytest.raises(Unavailable, match="full"):
        put(store, 200, vital=True)
    assert QUOTA < store.used <= QUOTA + 2 * SEGMENT + 2000
    assert len(of_type(tmp_path, "audit.full")) == 1
    # What follows from its being full can still be said.
    assert store.purge(firsts(tmp_path)[1], "") and verify.verify_directory(tmp_path).problem is None


def test_another_rule_ends_the_refusing_or_lets_go_what_is_too_much(tmp_path: Path) -> None:
    store = small_store(tmp_path, Rule("refuse", keep_mib=32))
    with pytest.raises(Unavailable, match="full"):
        put(store, 200)
    store.memory.set_rule(Rule("refuse", keep_mib=64))
    put(store, 10)
    store.memory.set_rule(SMALL)
    put(store, 100)
    store.memory.set_rule(Rule(keep_mib=128))
    put(store, 200)
    assert store.used > 2 * QUOTA
    store.memory.set_rule(SMALL)
    store.trim()
    assert store.used <= QUOTA and verify.verify_directory(tmp_path).problem is None


def test_three_quarters_and_nine_tenths_are_said_once(tmp_path: Path) -> None:
    store = small_store(tmp_path, Rule("refuse", keep_mib=32))
    with pytest.raises(Unavailable, match="full"):
        put(store, 200)
    said = of_type(tmp_path, "audit.filling")
    assert [record.extra["percent"] for record in said] == [75, 90]
    for record in said:
        assert record.extra["used"] * 100 >= record.extra["percent"] * store.quota
        assert record.extra["quota"] == store.quota
    # Not again at a restart, but again after there was room.
    store.close()
    store = open_store(tmp_path)
    put(store, 1, vital=True)
    assert len(of_type(tmp_path, "audit.filling")) == 2
    assert store.purge(firsts(tmp_path)[3], "")
    with pytest.raises(Unavailable, match="full"):
        put(store, 200)
    assert [record.extra["percent"] for record in of_type(tmp_path, "audit.filling")][-2:] == [75, 90]


@pytest.mark.parametrize("step", ["recording", "recorded", "some", "all"])
def test_a_power_cut_around_a_removal_leaves_a_trail_that_verifies(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the record, then the files, then what comes behind: so nothing is ever missing without its record."""
    store = small_store(tmp_path / "store", Rule(keep_mib=64))
    put(store, 60)
    before = firsts(tmp_path / "store")
    assert len(before) > 6
    unlinked: list[Path] = []

    def write(descriptor: int, data: memoryview) -> int:
        os.write(descriptor, data[: len(data) // 2])
        raise Cut

    def unlink(path: Path) -> None:
        if len(unlinked) == {"recorded": 0, "some": 2, "all": 99}[step]:
            raise Cut
        os.unlink(path)
        unlinked.append(path)

    with monkeypatch.context() as patch:
        if step == "recording":
            patch.setattr(store_module, "_write", write)
        elif step == "all":
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(Cut()))
        patch.setattr(segments_module, "_unlink", unlink)
        with pytest.raises(Cut):
            store.purge(before[4], "r1")
    store.close()
    # As the disk stands then, a torn line aside, which was acknowledged to nobody.
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    torn = verify.segments(tmp_path / "copy")[-1]
    torn.write_bytes(torn.read_bytes()[: torn.read_bytes().rfind(b"\n") + 1])
    assert verify.verify_directory(tmp_path / "copy").problem is None
    store = open_store(tmp_path / "store")
    done = step != "recording"
    assert firsts(tmp_path / "store") == (before[4:] if done else before)
    assert store.segments.first == firsts(tmp_path / "store")[0]
    put(store, 3)
    report = verify.verify_directory(tmp_path / "store", head=store.end[1])
    assert report.problem is None and bool(report.vouched) == done


def test_a_record_of_a_removal_never_costs_the_newest_segments(tmp_path: Path) -> None:
    """Were one forged, a start would still have what it needs."""
    store = small_store(tmp_path)
    put(store, 30)
    kept = firsts(tmp_path)[-2:]
    forged = Removed(1, 10**6, "0" * 96, 0, 0).entry("purge", "", "")
    store.append([Draft(forged, OWN)])
    store.close()
    store = open_store(tmp_path)
    assert firsts(tmp_path) == kept
    put(store, 1)


def test_a_disk_that_is_full_before_the_quota_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else filled it: the oldest go one by one until a new segment is promised its room."""
    store = small_store(tmp_path, Rule(keep_mib=1024))
    real, room = files.promise, 6

    def promise(descriptor: int, size: int) -> None:
        if len(firsts(tmp_path)) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, size)

    monkeypatch.setattr(files, "promise", promise)
    put(store, 120)
    assert len(firsts(tmp_path)) == room and len(removals(tmp_path)) > 1
    assert verify.verify_directory(tmp_path, head=store.end[1]).problem is None
    # With nothing that may go it is full, and says so from what the segment was promised.
    room = 1
    with pytest.raises(Unavailable, match="full"):
        put(store, 30)
    assert stored(tmp_path)[-1].type == "audit.full" and len(firsts(tmp_path)) == 2
    assert verify.verify_directory(tmp_path).problem is None


class FakeClock(datetime.datetime):
    """Says what time it is."""

    days = 0.0

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> FakeClock:
        return cls(2026, 11, 23, 12, tzinfo=tz) + datetime.timedelta(days=cls.days)


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[FakeClock]:
    FakeClock.days = 0.0
    monkeypatch.setattr(datetime, "datetime", FakeClock)
    return FakeClock


def test_records_go_at_their_age_while_a_time_server_says_what_time_it_is(
    tmp_path: Path, calendar: type[FakeClock]
) -> None:
    store = small_store(tmp_path, Rule(keep_days=10))
    put(store, 20)
    calendar.days = 5
    put(store, 20)
    middle = next(int(file.stem) for file in verify.segments(tmp_path) if b"-28T" in file.read_bytes())
    calendar.days = 10.5
    store.close()
    for clock in (Clock("host", "unsynchronised"), Clock("ntp", "holding")):
        wrong = open_store(tmp_path, clock)
        wrong.trim()
        assert firsts(tmp_path)[0] == 1
        wrong.close()
    store = open_store(tmp_path)
    store.trim()
    # One that holds both stays whole.
    assert firsts(tmp_path)[0] == middle
    (record,) = of_type(tmp_path, "audit.removed")
    assert (record.extra["cause"], record.outcome) == ("age", "success")
    assert verify.verify_directory(tmp_path).problem is None


def test_a_quiet_host_lets_old_records_go_too(tmp_path: Path, calendar: type[FakeClock]) -> None:
    """Only whole segments go, so where there is an age none covers more than a day."""
    store = small_store(tmp_path, Rule(keep_days=3))
    for day in range(8):
        calendar.days = 1.1 * day
        put(store, 1)
        store.trim()
    assert len(firsts(tmp_path)) <= 5 and stored(tmp_path)[0].time > "2026-11-26"
    assert verify.verify_directory(tmp_path).problem is None


def test_a_purge_takes_whole_segments_of_older_records(tmp_path: Path, calendar: type[FakeClock]) -> None:
    store = open_store(tmp_path)
    for day in range(50):
        calendar.days = day
        put(store, 1)
    there = firsts(tmp_path)
    time = stored(tmp_path)[there[2]].time
    for before in (1, there[1] - 1, stored(tmp_path)[0].time):
        assert store.purge(before, "") is None
    gone = store.purge(time, "r")
    assert gone and (gone.first, gone.last) == (1, there[2] - 1) and firsts(tmp_path) == there[2:]
    gone = store.purge(there[4] + 1, "r")
    assert gone and (gone.first, gone.last) == (there[2], there[4] - 1)
    # Whatever is ordered, the newest two stay: the newest checkpoint stands there.
    assert store.purge("9999", "") and firsts(tmp_path)[0] >= there[-2] and len(firsts(tmp_path)) == 2
    assert store.purge(10**9, "") is None
    report = verify.verify_directory(tmp_path)
    assert report.problem is None and report.vouched


def test_readers_and_a_removal_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a segment while it goes begins with what is left; one that was stolen is missed."""
    store = open_store(tmp_path)
    put(store, 40)
    there = firsts(tmp_path)
    real = verify.lines
    armed = [True]

    def lines(path: Path, offset: int = 0) -> Any:
        if armed and int(path.stem) == there[1]:
            armed.clear()
            store.purge(there[3], "")
        return real(path, offset)

    monkeypatch.setattr(search, "lines", lines)
    page = store.read(0, 100)
    assert parse(page.records[0] + b"\n").seq == there[3]
    verify.segments(tmp_path)[0].unlink()
    with pytest.raises(Unavailable, match="is missing"):
        store.read(0, 100)


def test_a_damaged_segment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    put(store, 40)
    there = firsts(tmp_path)
    file = store.segments.path(there[2])
    file.chmod(0o600)
    file.write_bytes(b"x" + file.read_bytes()[1:])
    for before in (there[2], "9999"):
        with pytest.raises(Unavailable, match=f"damaged: {file.name}"):
            store.purge(before, "")
    assert firsts(tmp_path) == there and store.append([Draft(Entry(type="machine.unknown"), CORE)])

    def fails(path: Path, offset: int = 0) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(search, "lines", fails)
    with pytest.raises(Unavailable, match=f"failed: .*{there[0]:020d}.log: Input/output error"):
        store.read(0, 10)
