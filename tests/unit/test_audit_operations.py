"""Which operation was under way when, as the audit daemon tells who reads the kernel's events."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.unit.test_audit_daemon import LocalAnchor
from vmm import wire
from vmm.audit.client import AuditClient, Entry, Object, Refused
from vmm.audit.journal import Journal
from vmm.audit.operations import LONGEST_S, Operations
from vmm.audit.records import Producer
from vmm.audit.registry import Unit
from vmm.audit.server import Service
from vmm.audit.store import Draft, Store
from vmm.errors import Forbidden

M1 = Object("machine", "m1", "vm1")
STOP = ("machine.stop", "machine.force-off", "host.stop-guests")


def intent(request: str, type: str = "machine.stop", object: Object = M1) -> Entry:
    return Entry(type=type, phase="intent", outcome="pending", request=request, object=object)


def outcome(request: str, type: str = "machine.stop", object: Object = M1) -> Entry:
    return Entry(type=type, phase="outcome", request=request, object=object)


def test_an_operation_is_under_way_between_its_intent_and_its_outcome() -> None:
    operations = Operations()
    operations.note(intent("r1"), 100.0)
    assert operations.find("m1", STOP, 105.0) == "r1"
    operations.note(outcome("r1"), 110.0)
    for moment, found in ((90.0, ""), (99.0, "r1"), (105.0, "r1"), (111.0, "r1"), (113.0, "")):
        assert operations.find("m1", STOP, moment) == found, moment


def test_only_what_was_asked_about_this_machine_or_all_counts() -> None:
    operations = Operations()
    operations.note(intent("r1", "machine.console"), 100.0)
    operations.note(intent("r2", object=Object("machine", "m2", "vm2")), 100.0)
    assert operations.find("m1", STOP, 101.0) == ""
    operations.note(intent("r3", "host.stop-guests", Object()), 100.0)
    assert (operations.find("m1", STOP, 101.0), operations.find("m2", STOP, 101.0)) == ("r3", "r3")
    operations.note(outcome("r3", "host.stop-guests", Object()), 102.0)
    assert (operations.find("m1", STOP, 120.0), operations.find("m2", STOP, 120.0)) == ("", "r2")


def test_what_never_ended_does_not_count_for_ever_and_is_forgotten() -> None:
    operations = Operations()
    operations.note(intent("r1"), 0.0)
    assert operations.find("m1", STOP, LONGEST_S) == "r1"
    assert operations.find("m1", STOP, LONGEST_S + 10) == ""
    for number in range(10_000):
        operations.note(intent(f"x{number}", object=Object("machine", "m2")), 10_000.0)
    assert len(operations._known) <= 4096 and operations.find("m1", STOP, 1.0) == ""


def daemon(directory: Path, boot: str = "b") -> tuple[Store, asyncio.Task[None], Service]:
    """The audit daemon's parts, with its producers by their uids on a host."""
    own = Producer(903, "holdfast-audit")
    store = Store(directory, producer=own, boot=boot)
    journal = Journal(store)
    producers: dict[int, Unit] = {902: "holdfast-core", 909: "holdfast-kernel", 901: "holdfast-api"}
    service = Service(journal, own, producers, frozenset({902}), anchor=LocalAnchor(directory / "anchor"))
    return store, asyncio.create_task(journal.run()), service


def test_the_daemon_tells_the_reader_of_the_kernel_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def become(uid: int) -> None:
        monkeypatch.setattr(wire.Channel, "peer", wire.Peer(1, uid, uid))

    async def whole() -> None:
        store, committing, service = daemon(tmp_path)
        assert await service.open()
        client = AuditClient(tmp_path / "s")
        async with await wire.serve(tmp_path / "s", service.handle):
            become(902)
            await client.append(intent("r1"))
            now = int(time.time() * 1000)
            become(909)
            assert await client.operation("m1", STOP, now) == "r1"
            assert await client.operation("m1", ("machine.start",), now) == ""
            assert await client.operation("m1", STOP, now - 60_000) == ""
            with pytest.raises(Refused, match=r"does not write machine\.stop"):
                await client.append(outcome("r1"))
            await client.append(Entry(type="kernel.stop"))
            with pytest.raises(Forbidden):
                await client.read(0, 10)
            become(901)
            with pytest.raises(Forbidden, match="may not ask for operations"):
                await client.operation("m1", STOP, now)
        committing.cancel()
        store.close()

    asyncio.run(whole())


@pytest.mark.parametrize(("boot", "known"), [("b", "r1"), ("c", "")])
def test_a_killed_daemon_knows_what_was_open_in_this_boot(tmp_path: Path, boot: str, known: str) -> None:
    """It closes the intent as interrupted, but whoever acted acts on."""

    async def whole() -> None:
        store, committing, _ = daemon(tmp_path)
        store.append([Draft(intent("r1"), Producer(902, "holdfast-core"))])
        committing.cancel()
        store.close()
        store, committing, service = daemon(tmp_path, boot)
        assert await service.open()
        assert service._operations.find("m1", STOP, time.time()) == known
        committing.cancel()
        store.close()

    asyncio.run(whole())
