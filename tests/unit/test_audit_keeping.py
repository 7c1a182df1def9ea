"""The rule for old records as the daemon follows it, who may ask for what, and what a full store still takes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest

from tests.unit.test_audit_daemon import EVENT, ME, OWN, LocalAnchor, stored
from tests.unit.test_audit_kills import program
from tests.unit.test_audit_retention import FakeClock, firsts, open_store, put
from vmm import atomic, wire
from vmm.audit import rule as rule_module
from vmm.audit import spare, verify
from vmm.audit import store as store_module
from vmm.audit.client import AuditClient
from vmm.audit.events import EVENTS
from vmm.audit.journal import Journal
from vmm.audit.records import Actor, Entry, Producer
from vmm.audit.registry import Unit
from vmm.audit.retention import Memory
from vmm.audit.rule import Rule
from vmm.audit.server import Service
from vmm.audit.store import Store
from vmm.errors import Forbidden, Unavailable, UserError

pytestmark = pytest.mark.sfr("FAU_STG.1", "FAU_STG_EXT.1")

SEGMENT = 4000
CORE = Producer(902, "holdfast-core")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(rule_module, "MIB", 5 * SEGMENT // 32)


@asynccontextmanager
async def daemon(
    folder: Path, unit: Unit = "holdfast-core", *, exporter: bool = False, reader: bool = True
) -> AsyncIterator[tuple[Service, Journal, AuditClient]]:
    """A daemon that takes us for a producer, and perhaps for a reader or the exporter; it is killed in the end."""
    store = folder / "store"
    store.mkdir(exist_ok=True)
    journal = Journal(Store(store, producer=Producer(OWN.uid, OWN.unit), boot="boot"))
    service = Service(
        *(journal, OWN, {ME: unit}, frozenset({ME} if reader else ())),
        anchor=LocalAnchor(folder / "anchor"),
        exporters=frozenset({ME} if exporter else ()),
    )
    tasks = [asyncio.create_task(journal.run()), asyncio.create_task(service.keeping.keep())]
    try:
        await service.open()
        async with await wire.serve(folder / "audit.sock", service.handle):
            yield service, journal, AuditClient(folder / "audit.sock")
    finally:
        for task in tasks:
            task.cancel()
        journal.store.close()


async def fill(journal: Journal, count: int, **fields: object) -> None:
    for number in range(count):
        await journal.append(Entry(type=EVENT, request=f"r{number}", **fields), CORE)  # type: ignore[arg-type]


def said(folder: Path, type_: str) -> list[dict[str, object]]:
    found = [record for record in stored(folder / "store") if record.type == type_]
    for record in found:
        EVENTS.check(record, "holdfast-audit")
    return [dict(record.extra) for record in found]


def test_the_configure_step_sets_the_rule_which_outlasts_the_daemon(tmp_path: Path) -> None:
    rule = Rule("refuse", keep_days=30, keep_mib=64)

    async def run() -> None:
        call = wire.call(tmp_path / "audit.sock", "rule", {})
        call.close()
        async with daemon(tmp_path, "holdfast-host") as (_, journal, audit):
            for one in (Rule(), rule, rule):
                await audit._call("rule", msgspec.to_builtins(one))
            assert journal.store.memory.rule == rule
            for wrong in ({"when_full": "burn"}, {"keep_mib": 1}, {"keep_days": 0}, {"more": 1}):
                with pytest.raises(UserError, match="audit: "):
                    await audit._call("rule", wrong)
        async with daemon(tmp_path) as (service, journal, audit):
            assert (await audit.status())["rule"] == msgspec.to_builtins(rule)
            with pytest.raises(Forbidden, match="may not call rule"):
                await audit._call("rule", msgspec.to_builtins(Rule()))
            assert journal.store.memory.rule == rule
            # The refusal is on record soon after the answer, not before.
            await service.close()

    asyncio.run(run())
    # What is in force anyway is no news, and what was refused is told.
    assert said(tmp_path, "audit.rule") == [{"when_full": "refuse", "keep_days": 30, "keep_mib": 64}]
    assert [extra["method"] for extra in said(tmp_path, "audit.refused")] == ["rule"]


def test_only_the_exporter_says_what_is_known_elsewhere(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon(tmp_path) as (_, journal, audit):
            await fill(journal, 20)
            with pytest.raises(Forbidden, match="may not call exported"):
                await audit._call("exported", {"seq": 5})
            assert (await audit.status())["exported"] == 0
        async with daemon(tmp_path, exporter=True) as (_, journal, audit):
            for seq, noted in ((5, 5), (9, 9), (3, 9), (0, 9)):
                assert await audit._call("exported", {"seq": seq}) == {"seq": noted}
            for wrong in (10**6, -1, "5", 1.5):
                with pytest.raises(UserError, match="seq"):
                    await audit._call("exported", {"seq": wrong})
        async with daemon(tmp_path) as (_, _, audit):
            assert (await audit.status())["exported"] == 9

    asyncio.run(run())


def test_old_records_stay_until_all_servers_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rule says so; whole segments go, as soon as their last record is known elsewhere."""
    monkeypatch.setattr(FakeClock, "days", 0.0)
    monkeypatch.setattr(datetime, "datetime", FakeClock)
    store = open_store(tmp_path)
    put(store, 60)
    there = firsts(tmp_path)
    FakeClock.days = 9
    store.memory.set_rule(Rule(keep_days=1, until_exported=True))
    for exported, first in ((0, 1), (there[2] - 2, there[1]), (there[2] - 1, there[2])):
        store.memory.set_exported(exported)
        store.trim()
        assert firsts(tmp_path)[0] == first
    store.memory.set_rule(Rule(keep_days=1))
    store.trim()
    assert firsts(tmp_path)[0] > there[2]


def test_core_alone_has_records_removed_and_it_is_anchored_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon(tmp_path, "holdfast-host") as (_, journal, audit):
            await fill(journal, 60)
            with pytest.raises(Forbidden, match="may not call purge"):
                await audit.purge(30, "r1")
        async with daemon(tmp_path) as (_, journal, audit):
            journal.sealed.clear()
            third = int(verify.segments(tmp_path / "store")[2].stem)
            gone = await audit.purge(third, "r2")
            assert gone == {"first": 1, "last": third - 1, "lost": third - 1}
            assert journal.sealed.is_set()
            assert (await audit.read(0, 1))["records"][0]["seq"] == third
            assert await audit.purge(third, "r3") == {"first": 0, "last": 0, "lost": 0}
            for wrong in ("", "yesterday", "2026-11-23", "2026-11-23T04:05:06", "0001-01-01T00:00:00+14:00", 0, 1.5):
                with pytest.raises(UserError, match="before"):
                    await audit.purge(wrong, "r4")  # type: ignore[arg-type]
            later = await audit.purge("2999-01-01T01:00:00+01:00", "r5")
            assert later["first"] == third and len(verify.segments(tmp_path / "store")) == 2
        async with daemon(tmp_path, reader=False) as (_, _, audit):
            with pytest.raises(Forbidden, match="may not read"):
                await audit.status()

    asyncio.run(run())
    removed = [record for record in stored(tmp_path / "store") if record.type == "audit.removed"]
    assert [record.request for record in removed][-1] == "r5"
    assert verify.verify_directory(tmp_path / "store").problem is None


def test_the_state_of_the_store(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon(tmp_path) as (_, journal, audit):
            await journal.between(lambda: journal.store.memory.set_rule(Rule(keep_mib=32)))
            await fill(journal, 100)
            status = await audit.status()
            trail = stored(tmp_path / "store")
            assert (status["first"], status["last"], status["records"]) == (trail[0].seq, trail[-1].seq, len(trail))
            assert status["bytes"] == sum(file.stat().st_size for file in verify.segments(tmp_path / "store"))
            assert status["quota"] == 5 * SEGMENT - 5 * SEGMENT % 32 >= status["bytes"]
            assert (status["full"], status["segments"]) == (False, len(verify.segments(tmp_path / "store")))
            assert status["rule"]["keep_mib"] == 32
            assert bool(status["unprotected"]) or status["protected"] <= status["segments"] - 1
            assert (await audit.health())["unprotected"] == status["unprotected"]

    asyncio.run(run())


def test_a_lower_quota_is_kept_to_without_waiting_for_the_next_record(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon(tmp_path, "holdfast-host") as (_, journal, audit):
            await fill(journal, 200)
            assert journal.store.used > 8 * SEGMENT
            await audit._call("rule", msgspec.to_builtins(Rule(keep_mib=32)))
            async with asyncio.timeout(10):
                while journal.store.used > 5 * SEGMENT:
                    await asyncio.sleep(0.005)

    asyncio.run(run())
    assert said(tmp_path, "audit.removed")[0]["cause"] == "full"
    assert verify.verify_directory(tmp_path / "store").problem is None


def test_a_full_store_refuses_all_but_what_ends_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's own records, an auditor's session and his purge; of one certificate no more than some."""

    monkeypatch.setattr(spare, "MOST", 3)

    def of(type_: str, who: str, phase: str = "event") -> Entry:
        actor = Actor(id=who, certificate=who * 64)
        return Entry(type=type_, phase=phase, request="p", actor=actor)  # type: ignore[arg-type]

    async def taken(journal: Journal, entry: Entry) -> bool:
        try:
            await journal.append(entry, CORE)
        except Unavailable as error:
            assert "the audit store is full" in error.message
            return False
        return True

    async def run() -> None:
        async with daemon(tmp_path, "holdfast-host") as (_, journal, audit):
            await audit._call("rule", msgspec.to_builtins(Rule("refuse", keep_mib=32)))
            with pytest.raises(Unavailable, match="full"):
                await fill(journal, 300)
            assert not (await audit.health())["ok"]
            # A stranger does not eat up what is left.
            with pytest.raises(Forbidden):
                await audit.purge(1, "")
        async with daemon(tmp_path) as (service, journal, audit):
            with pytest.raises(Unavailable, match="full"):
                await fill(journal, 10)
            for type_ in ("machine.start", "audit.read", "session.startle"):
                assert not await taken(journal, of(type_, "a", "outcome"))
            # In one batch with others.
            batch = [of(type_, "a") for type_ in ("machine.start", "session.start", "audit.purge")]
            assert await asyncio.gather(*(taken(journal, one) for one in batch)) == [False, True, True]
            assert [await taken(journal, of("session.start", "b")) for _ in range(5)] == [True] * 3 + [False] * 2
            assert await taken(journal, of("session.end", "c"))
            assert await service.checkpoints.make()
            assert (await audit.purge(int(verify.segments(tmp_path / "store")[3].stem), "p"))["last"]
            await fill(journal, 1)
            assert (await audit.health())["ok"]

    asyncio.run(run())
    assert not said(tmp_path, "audit.refused")
    assert verify.verify_directory(tmp_path / "store").problem is None


def test_nothing_is_written_beside_a_removal_that_nobody_waits_for_any_more(tmp_path: Path) -> None:
    async def run() -> None:
        async with daemon(tmp_path) as (_, journal, _):
            busy, go_on = asyncio.Event(), asyncio.Event()
            loop = asyncio.get_running_loop()

            def work() -> None:
                loop.call_soon_threadsafe(busy.set)
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)

            working = asyncio.create_task(journal.between(work))
            await busy.wait()
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
            append = asyncio.create_task(journal.append(Entry(type=EVENT), CORE))
            await asyncio.sleep(0.05)
            assert not append.done()
            go_on.set()
            await append

    asyncio.run(run())


def test_a_store_that_fails_while_it_removes_ends_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with daemon(tmp_path) as (_, journal, audit):
            await fill(journal, 60)
            committing = asyncio.create_task(journal.run())

            def fails(_: Path) -> None:
                raise OSError(5, "Input/output error")

            monkeypatch.setattr("vmm.audit.segments._unlink", fails)
            with pytest.raises(Unavailable, match="Input/output"):
                await audit.purge(20, "r")
            await asyncio.wait_for(committing, 5)
            monkeypatch.undo()
            with pytest.raises(Unavailable, match="Input/output"):
                await audit.purge(20, "r")

    asyncio.run(run())


_DAEMON = """
import os, pwd, vmm.audit.anchoring as a, vmm.audit.server as s, vmm.audit.store as t, vmm.audit.rule as r
a.Checkpoints.__init__.__kwdefaults__.update(first=0, interval=0.01)
t.SEGMENT_BYTES, r.MIB = 6000, 1000
s.PRODUCERS = {pwd.getpwuid(os.geteuid()).pw_name: "holdfast-core"}
s.run()
"""


def test_a_daemon_killed_while_it_overwrites_leaves_a_trail_that_verifies(tmp_path: Path) -> None:
    store, socket = tmp_path / "var/lib/holdfast-audit", tmp_path / "run/holdfast/audit/audit.sock"
    for folder in (store, socket.parent):
        folder.mkdir(parents=True)
    (store / "state.json").write_bytes(b'{"rule":{"keep_mib":32}}')
    client = AuditClient(socket)
    acknowledged = 0

    async def load(kill: int, pid: int) -> None:
        nonlocal acknowledged
        enough = acknowledged + 150
        while acknowledged < enough:
            try:
                numbers = await asyncio.gather(*(client.append(Entry(type=EVENT)) for _ in range(4)))
                acknowledged = max(acknowledged, *numbers)
            except Unavailable:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.0011 * kill)
        os.kill(pid, signal.SIGKILL)

    for kill in range(8):
        with program(tmp_path, _DAEMON) as pid:
            asyncio.run(asyncio.wait_for(load(kill, pid), 30))
        # Whoever copies the store then: a torn line was acknowledged to nobody.
        newest = verify.segments(store)[-1]
        whole = newest.read_bytes()
        newest.write_bytes(whole[: whole.rfind(b"\n") + 1])
        report = verify.verify_directory(store)
        assert report.problem is None and report.last >= acknowledged
    assert report.vouched and report.first > 1 and sum(f.stat().st_size for f in verify.segments(store)) < 60_000


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"rule":{"when_full":"burn"}}', b'{"rule":{"when_full":"\xff"}}', b'{"exported":-1}', b"\xff"],
)
def test_a_damaged_memory_counts_for_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(content)
    memory = Memory(tmp_path)
    assert (memory.rule, memory.exported) == (Rule(), 0)
    memory.set_rule(Rule("refuse"))
    memory.set_exported(7)
    memory.set_exported(3)
    again = Memory(tmp_path)
    assert (again.rule, again.exported) == (Rule("refuse"), 7)


def test_a_disk_that_takes_no_memory_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(tmp_path)
    memory.set_exported(7)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(atomic, "write", Mock(side_effect=full))
    with pytest.raises(Unavailable, match=r"state\.json: No space left"):
        memory.set_exported(8)
    with pytest.raises(Unavailable, match="No space left"):
        memory.set_rule(Rule("refuse"))
    assert (memory.rule, memory.exported) == (Rule(), 7)
