"""Finding records: every filter against a plain look at all records, page by page, with bounded work."""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_audit_store import CORE, OWN
from vmm.audit import search, verify
from vmm.audit import store as store_module
from vmm.audit.records import Actor, Entry, Object, Outcome, Record, parse
from vmm.audit.search import Query
from vmm.audit.store import Draft, Store
from vmm.errors import Unavailable

pytestmark = pytest.mark.sfr("FAU_SAR.1")

THINGS = (Object("machine", "u-1", "web"), Object("machine", "u-2", "db"), Object("volume", "u-3", "web"), Object())
ALICE = Actor("alice", "admin", "10.0.2.2:5000", "a" * 64)
BOB = Actor("bob", "operator", "10.0.2.3:5000", "b" * 64)
# Text that looks like what is searched for, where it does not count.
NOISE = {"text": '"type":"machine.stop" "id":"alice"', "name": "web", "id": "alice", "time": "9", "é": "\x1b\n"}


class Clock(datetime.datetime):
    """A clock that tests set."""

    at = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)

    @classmethod
    def now(cls, _tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
        cls.at += datetime.timedelta(seconds=1)
        return cls.at


def entries() -> Iterator[Entry]:
    """Records of all kinds, for ever."""
    chosen = random.Random(4)
    for number in itertools.count():
        outcome: Outcome = chosen.choice(("success", "failure", "pending"))
        yield Entry(
            type=chosen.choice(("machine.start", "machine.stop", "machine.stop-all", "volume.create", "audit.read")),
            actor=chosen.choice((ALICE, BOB, Actor())),
            object=chosen.choice(THINGS),
            phase="intent" if outcome == "pending" else chosen.choice(("outcome", "event")),
            outcome=outcome,
            request=f"{chosen.randrange(1 << 32):08x}-{number}",
            extra=NOISE | {"n": number},
        )


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Three hundred records, a second apart, in some twenty segments; in between the clock is set back for a while."""
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 10_000)
    monkeypatch.setattr(datetime, "datetime", Clock)
    Clock.at = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
    (tmp_path / "store").mkdir()
    store = Store(tmp_path / "store", producer=OWN, boot="boot")
    for number, entry in zip(range(300), entries(), strict=False):
        if number in (120, 130):
            Clock.at += datetime.timedelta(hours=-5 if number == 120 else 5)
        store.append([Draft(entry, CORE)])
    yield store
    store.close()


def everything(store: Store) -> list[Record]:
    return [parse(line) for file in verify.segments(store._directory) for line in verify.lines(file)]


def pages(store: Store, query: Query) -> list[list[Record]]:
    """All pages, as whoever reads them goes on."""
    found = []
    while True:
        page = store.search(query)
        found.append([parse(line + b"\n") for line in page.records])
        if page.next is None:
            return found
        field = "after" if query.order == "oldest" else "before"
        assert page.next != getattr(query, field), "it does not go on"
        query = msgspec.structs.replace(query, **{field: page.next})


T1, T2 = "2026-11-23T00:01:40Z", "2026-11-23T00:03:20.5Z"
WANTED: dict[str, tuple[dict[str, Any], Callable[[Record], bool]]] = {
    "all": ({}, lambda r: True),
    "from": ({"since": T1}, lambda r: r.time >= "2026-11-23T00:01:40.000000Z"),
    "until": ({"until": T2}, lambda r: r.time < "2026-11-23T00:03:20.500000Z"),
    "from and until": (
        {"since": T1, "until": T2},
        lambda r: "2026-11-23T00:01:40.000000Z" <= r.time < "2026-11-23T00:03:20.500000Z",
    ),
    "while the clock was back": ({"until": "2026-11-23T00:00:00Z"}, lambda r: 121 <= r.seq <= 130),
    "type": ({"type": "machine.stop"}, lambda r: r.type == "machine.stop"),
    "types": ({"type": "machine."}, lambda r: r.type.startswith("machine.")),
    "actor": ({"actor": "alice"}, lambda r: r.actor.id == "alice"),
    "certificate": ({"actor": "b" * 64}, lambda r: r.actor.id == "bob"),
    "machine by name": ({"machine": "web"}, lambda r: r.object.id == "u-1"),
    "machine by uuid": ({"machine": "u-2"}, lambda r: r.object.name == "db"),
    "no machine": ({"machine": "u-3"}, lambda r: False),
    "outcome": ({"outcome": "failure"}, lambda r: r.outcome == "failure"),
    "phase": ({"phase": "intent"}, lambda r: r.phase == "intent"),
    "numbers": ({"after": 7, "before": 100}, lambda r: 7 < r.seq < 100),
    "together": (
        {"type": "machine.", "actor": "bob", "machine": "db", "outcome": "success", "since": T1},
        lambda r: (r.type[:8], r.actor, r.object.name, r.outcome) == ("machine.", BOB, "db", "success") and r.time > T1,
    ),
    "nothing": ({"actor": 'a"\\é'}, lambda r: False),
}


@pytest.mark.parametrize("order", ["oldest", "newest"])
@pytest.mark.parametrize("wanted", WANTED)
def test_every_filter_finds_what_a_look_at_everything_finds(wanted: str, order: Any, trail: Store) -> None:
    fields, holds = WANTED[wanted]
    expected = [record for record in everything(trail) if holds(record)]
    assert bool(expected) == (wanted not in ("no machine", "nothing"))
    if order == "newest":
        expected.reverse()
    for limit in (1, 7, 1000):
        got = pages(trail, Query(order=order, limit=limit, **fields))
        assert [record for page in got for record in page] == expected
        assert all(len(page) <= limit for page in got)


def test_a_request_is_found_by_how_it_begins(trail: Store) -> None:
    for record in everything(trail)[::50]:
        for text in (record.request, record.request[:8]):
            assert [[record]] == pages(trail, Query(request=text))


@pytest.mark.parametrize("order", ["oldest", "newest"])
@pytest.mark.parametrize("fields", [{}, {"actor": "alice"}, {"since": T1}, {"actor": "nobody"}])
def test_the_work_for_a_page_is_bounded(
    fields: dict[str, Any], order: Any, trail: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two segments of ten thousand bytes for a page, and one that had been begun; and what is found is the same."""
    whole = [record for page in pages(trail, Query(order=order, **fields)) for record in page]
    monkeypatch.setattr(search, "MAX_SCAN_BYTES", 20_000)
    looked: list[int] = []
    real = verify.lines

    def counted(path: Path, offset: int = 0) -> Iterator[bytes]:
        for line in real(path, offset):
            looked[-1] += len(line)
            yield line

    monkeypatch.setattr(search, "lines", counted)
    trail.segments._finder = search.Finder()
    found: list[Record] = []
    query = Query(order=order, **fields)
    while True:
        looked.append(0)
        page = trail.search(query)
        found += [parse(line + b"\n") for line in page.records]
        if page.next is None:
            break
        query = msgspec.structs.replace(query, **{"after" if order == "oldest" else "before": page.next})
    assert found == whole
    assert max(looked) <= 40_000
    if fields == {"actor": "nobody"}:
        assert not found and len(looked) > 5


def test_pages_stay_as_they_are_while_records_come_in(trail: Store) -> None:
    more = entries()
    expected = [r for r in everything(trail) if r.actor == ALICE]
    got: list[Record] = []
    after: int | None = 0
    while after is not None:
        page = trail.search(Query(actor="alice", after=after, limit=7))
        got += [parse(line + b"\n") for line in page.records]
        after = page.next
        if len(got) < 50:
            trail.append([Draft(next(more), CORE) for _ in range(5)])
    assert got[: len(expected)] == expected
    assert got == [r for r in everything(trail) if r.actor == ALICE]
    # Backwards what came in since is not met again.
    page = trail.search(Query(order="newest", limit=10))
    trail.append([Draft(next(more), CORE) for _ in range(5)])
    assert page.next is not None
    following = trail.search(Query(order="newest", limit=10, before=page.next))
    numbers = [parse(line + b"\n").seq for line in [*page.records, *following.records]]
    assert numbers == list(range(numbers[0], numbers[0] - 20, -1))


def test_who_waits_for_new_ones_is_told_up_to_where_it_was_looked(trail: Store) -> None:
    page = trail.search(Query(actor="nobody"))
    assert page == search.Page([], None, 300)
    trail.append([Draft(next(entries()), CORE)])
    assert trail.search(Query(actor="nobody", after=300)) == search.Page([], None, 301)
    assert trail.search(Query(after=999)) == search.Page([], None, 999)


def test_segments_of_another_time_are_read_only_once(trail: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = verify.lines

    def counted(path: Path, offset: int = 0) -> Iterator[bytes]:
        opened.append(path)
        return real(path, offset)

    monkeypatch.setattr(search, "lines", counted)
    query = Query(since=T1, until=T2)
    first = pages(trail, query)
    segments = verify.segments(trail._directory)
    assert set(opened) == set(segments)
    opened.clear()
    assert pages(trail, query) == first
    # By numbers these are neighbours, and the one in which the clock was set back, or forth again, is among them.
    assert len(set(opened)) < len(segments) / 2


def test_a_segment_whose_times_cannot_be_told_is_always_looked_through(trail: Store) -> None:
    """A later release may write lines that end otherwise."""
    path = verify.segments(trail._directory)[0]
    later = path.read_bytes().replace(b'"v":2}', b'"v":3,"z":1}')
    path.chmod(0o600)
    path.write_bytes(later)
    found = [msgspec.json.decode(line) for line in trail.search(Query(until="2026-11-23T00:00:03Z")).records]
    assert [r["seq"] for r in found if r["v"] == 3] == [1, 2]


@pytest.mark.parametrize("order", ["oldest", "newest"])
@pytest.mark.parametrize("fields", [{}, {"since": "2026-11-22T00:00:00Z", "actor": "bob"}])
def test_a_trail_may_begin_later_and_lose_its_oldest_segment_meanwhile(
    fields: dict[str, Any], order: Any, trail: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts = [int(path.stem) for path in verify.segments(trail._directory)]
    rest = [r for r in everything(trail)[firsts[3] - 1 :] if not fields or r.actor == BOB]
    trail.segments.unlink(2)
    real, armed = verify.lines, [True]

    def lines(path: Path, offset: int = 0) -> Iterator[bytes]:
        if armed and int(path.stem) == firsts[2]:
            armed.clear()
            trail.segments.unlink(1)
        return real(path, offset)

    monkeypatch.setattr(search, "lines", lines)
    got = [record for page in pages(trail, Query(order=order, **fields)) for record in page]
    assert sorted(got, key=lambda r: r.seq) == rest and not armed
    # One that nobody removed is missed.
    verify.segments(trail._directory)[0].unlink()
    with pytest.raises(Unavailable, match="is missing"):
        pages(trail, Query(order=order, **fields))


@pytest.mark.parametrize("fields", [{}, {"type": "machine."}, {"order": "newest"}])
def test_a_damaged_record_is_named_and_what_is_behind_it_can_be_read(fields: dict[str, Any], trail: Store) -> None:
    path = verify.segments(trail._directory)[0]
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if i > 1 and b'"type":"machine.' in line[-80:])
    lines[at] = b"{" + lines[at]
    path.chmod(0o600)
    path.write_bytes(b"".join(lines))
    with pytest.raises(Unavailable, match=f"record {at + 1} of the audit trail is damaged"):
        pages(trail, Query(limit=1, **fields))
    assert trail.search(Query(after=at + 1, **fields)).records


def test_lines_that_are_being_written_are_not_shown(trail: Store) -> None:
    path = verify.segments(trail._directory)[-1]
    with path.open("ab") as file:
        file.write(path.read_bytes())
    for order in ("oldest", "newest"):
        assert sum(map(len, pages(trail, Query(order=order, limit=1000)))) == 300


def test_large_records_make_more_pages(tmp_path: Path) -> None:
    store = Store(tmp_path, producer=OWN, boot="boot")
    for number in range(50):
        store.append([Draft(Entry(type="machine.start", extra={"n": number, "x": "x" * 30_000}), CORE)])
    for order in ("oldest", "newest"):
        got = pages(store, Query(order=order, limit=1000))
        assert len(got) > 2
        numbers = [record.seq for page in got for record in page]
        assert numbers == (list(range(1, 51)) if order == "oldest" else list(range(50, 0, -1)))
    store.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"from": "yesterday"},
        {"from": "2026-13-01T00:00:00Z"},
        {"until": "2026-11-23T04:05:06+01:00"},
        {"type": "Machine"},
        {"type": "machine.*"},
        {"outcome": "maybe"},
        {"request": "short"},
        {"actor": ""},
        {"limit": 0},
        {"limit": 1001},
        {"after": -1},
        {"order": "random"},
        {"since": "2026-11-23T04:05:06Z"},
    ],
)
def test_what_no_record_could_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, Query)
