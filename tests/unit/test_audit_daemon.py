"""The audit daemon over its socket: who may call, group commit, and kill -9 under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest

from tests.harness.waiting import poll
from vmm import wire
from vmm.audit import verify
from vmm.audit.anchor import Anchor, SoftwareAnchor
from vmm.audit.checkpoint import Proof
from vmm.audit.client import AuditClient, Entry
from vmm.audit.events import EVENTS
from vmm.audit.journal import Journal
from vmm.audit.records import Producer, Record, parse
from vmm.audit.registry import Unit
from vmm.audit.server import PRODUCERS, Service
from vmm.audit.store import Store
from vmm.errors import Forbidden, NotFound, Unavailable, UserError
from vmm.process import spawn

OWN = Producer(903, "holdfast-audit")
ME = os.geteuid()
CORE: Unit = "holdfast-core"
EVENT = "machine.unknown"
"""What core may write at any time."""


@contextmanager
def daemon(root: Path) -> Iterator[int]:
    """A real daemon process; yields its process id once it listens and waits for its end."""
    path = root / "run/holdfast/audit/audit.sock"
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / "var/lib/holdfast-audit").mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    client = "{s.pwd.getpwuid(os.geteuid()).pw_name: 'holdfast-core'}"
    code = f"import vmm.audit.server as s, os; s.PRODUCERS = {client}; s.run()"
    process = spawn([sys.executable, "-c", code], env={"HOLDFAST_ROOT": str(root)})
    try:
        # A socket has its name before anybody listens.
        with socket.socket(socket.AF_UNIX) as probe:
            while probe.connect_ex(str(path)):
                assert process.poll() is None
                time.sleep(0.005)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def records(root: Path) -> list[tuple[str, str, str]]:
    return [(r.type, r.phase, r.reason) for r in stored(root / "var/lib/holdfast-audit")]


def client(root: Path) -> AuditClient:
    return AuditClient(root / "run/holdfast/audit/audit.sock")


def test_no_acknowledged_record_is_lost_by_kill(tmp_path: Path) -> None:
    acknowledged: dict[int, str] = {}

    async def load(worker: int, kill: int) -> None:
        for number in range(100_000):
            request = f"{kill}.{worker}.{number}"
            acknowledged[await client(tmp_path).append(Entry(type=EVENT, request=request))] = request

    async def one(kill: int) -> None:
        with daemon(tmp_path) as pid:
            workers = [asyncio.create_task(load(worker, kill)) for worker in range(8)]
            # So many more than before, and a moment on, so that the kill meets the daemon at anything.
            enough = len(acknowledged) + 8 * kill
            while len(acknowledged) < enough:
                assert not [w.exception() for w in workers if w.done()], "turned away by a daemon that lives"
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.0004 * kill)
            os.kill(pid, signal.SIGKILL)
            ended = await asyncio.gather(*workers, return_exceptions=True)
            assert all(isinstance(error, Unavailable) for error in ended), ended

    for kill in range(20):
        asyncio.run(one(kill))
    directory = tmp_path / "var/lib/holdfast-audit"
    with daemon(tmp_path):
        pass
    assert verify.verify_directory(directory).problem is None
    stored = [parse(line) for file in verify.segments(directory) for line in verify.lines(file)]
    assert {seq: stored[seq - 1].request for seq in acknowledged} == acknowledged
    assert sum(record.type == "audit.start" for record in stored) == 21


def test_start_stop_and_interrupted_intents(tmp_path: Path) -> None:
    audit = client(tmp_path)
    with daemon(tmp_path) as pid:
        intent = Entry(type="machine.start", phase="intent", outcome="pending", request="r1")
        assert audit.append_sync(intent) == 2
        os.kill(pid, signal.SIGKILL)
    segment = verify.segments(tmp_path / "var/lib/holdfast-audit")[0]
    with segment.open("ab") as file:
        file.write(b'{"actor":')
    with daemon(tmp_path) as pid:
        health = asyncio.run(audit.health())
        assert health["ok"] and health["seq"] == 5
        os.kill(pid, signal.SIGTERM)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert records(tmp_path) == [
        ("audit.start", "event", ""),
        ("machine.start", "intent", ""),
        ("audit.recovered", "event", "incomplete last line removed"),
        ("machine.start", "outcome", "interrupted"),
        ("audit.start", "event", ""),
        ("audit.stop", "event", ""),
        # Nobody serves the anchor's socket here.
        ("audit.checkpoint", "event", "the service behind anchor.sock does not answer: No such file or directory"),
    ]
    with pytest.raises(Unavailable, match="does not answer"):
        audit.append_sync(Entry(type=EVENT))


class LocalAnchor:
    """An anchor without a service between: the software anchor in a folder, or another one."""

    def __init__(self, anchor: Path | Anchor) -> None:
        self._anchor: Anchor = SoftwareAnchor(anchor) if isinstance(anchor, Path) else anchor

    async def certify(self, digest: str, past: int) -> Proof:
        return self._anchor.certify(digest, past)

    async def advance(self, past: int) -> None:
        self._anchor.advance(past)


def serve(directory: Path, producers: dict[int, Unit], readers: set[int]) -> tuple[Journal, Service]:
    journal = Journal(Store(directory, producer=OWN, boot="boot"))
    return journal, Service(journal, OWN, producers, frozenset(readers), anchor=LocalAnchor(directory / "anchor"))


def test_the_kernel_says_who_calls(tmp_path: Path) -> None:
    async def run() -> None:
        socket = tmp_path / "audit.sock"
        for producers, readers in (({ME: CORE}, {ME}), ({ME + 1: CORE}, set())):
            journal, service = serve(tmp_path, producers, readers)
            committing = asyncio.create_task(journal.run())
            audit = AuditClient(socket)
            async with await wire.serve(socket, service.handle):
                with pytest.raises(Unavailable):
                    await audit.append(Entry(type=EVENT))
                await service.open()
                if readers:
                    assert await audit.append(Entry(type=EVENT)) == 2
                    page = await audit.read(1, 10)
                    assert page["next"] is None
                    assert page["records"][0]["producer"] == {"uid": ME, "unit": "holdfast-core"}
                    with pytest.raises(Unavailable, match="holdfast-core does not write api.unauthenticated"):
                        await audit.append(Entry(type="api.unauthenticated"))
                    wrong = {"args": {"f": 0.5}}
                    for entry in (Entry(type="audit.stop"), Entry(type="machine.stop", extra=wrong), Entry(type="Bad")):
                        with pytest.raises(Unavailable, match="refused"):
                            await audit.append(entry)
                    with pytest.raises(UserError, match="limit"):
                        await audit.read(0, 1001)
                    with pytest.raises(UserError, match="unknown field"):
                        await wire.call(socket, "append", {"type": EVENT, "seq": 7})
                    with pytest.raises(NotFound):
                        await wire.call(socket, "delete")
                else:
                    with pytest.raises(Unavailable, match="may not write"):
                        await audit.append(Entry(type=EVENT))
                    with pytest.raises(Forbidden, match="may not read"):
                        await audit.read(0, 10)
            committing.cancel()
            journal.store.close()

    asyncio.run(run())


def test_whoever_follows_the_trail_hears_of_a_record_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        socket = tmp_path / "audit.sock"
        journal, service = serve(tmp_path, {ME: CORE}, {ME})
        committing = asyncio.create_task(journal.run())
        audit = AuditClient(socket)
        async with await wire.serve(socket, service.handle):
            await service.open()
            assert (await audit.read(1, 10, wait=0.05))["records"] == []
            followers = [asyncio.create_task(audit.read(after, 10, wait=30)) for after in (1, 1, 2)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in followers)
            for request in ("a", "b"):
                await audit.append(Entry(type=EVENT, request=request))
            assert [(await task)["records"][0]["request"] for task in followers] == ["a", "a", "b"]
            with pytest.raises(UserError, match="wait"):
                await audit.read(0, 10, wait=31)
        committing.cancel()
        journal.store.close()

    asyncio.run(run())


def test_concurrent_appends_share_a_sync_and_the_loop_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    ticks = 0
    real = os.fdatasync

    def slow(descriptor: int) -> None:
        syncs.append(threading.get_ident())
        poll(lambda: ticks > 10 * len(syncs), 10, "the loop lives", interval=0.001)
        real(descriptor)

    async def run() -> None:
        nonlocal ticks
        monkeypatch.setattr(os, "fdatasync", slow)
        journal, _ = serve(tmp_path, {}, set())
        committing = asyncio.create_task(journal.run())
        appends = asyncio.gather(*(journal.append(Entry(type=EVENT), OWN) for _ in range(300)))
        while not appends.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert await appends == list(range(1, 301))
        assert len(syncs) == 3
        assert threading.get_ident() not in syncs
        committing.cancel()
        journal.store.close()

    asyncio.run(run())


def test_a_broken_store_ends_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        journal, _ = serve(tmp_path, {}, set())
        committing = asyncio.create_task(journal.run())

        def fails(_: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", fails)
        with pytest.raises(Unavailable, match="Input/output"):
            await journal.append(Entry(type=EVENT), OWN)
        await asyncio.wait_for(committing, 1)
        journal.store.close()

    asyncio.run(run())


def test_a_full_store_opens_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        journal, service = serve(tmp_path, {}, set())
        committing = asyncio.create_task(journal.run())
        with monkeypatch.context() as patch:
            patch.setattr(journal.store, "append", Mock(side_effect=Unavailable("full")))
            assert not await service.open()
        assert await service.open()
        await service.close()
        committing.cancel()
        journal.store.close()

    asyncio.run(run())
    assert [record.type for record in stored(tmp_path)] == ["audit.start", "audit.stop", "audit.checkpoint"]


def test_timeout_is_unavailable(tmp_path: Path) -> None:
    async def run() -> None:
        async def never(_: wire.Request, __: wire.Channel) -> None:
            await asyncio.sleep(60)

        server = await wire.serve(tmp_path / "s", never)
        with pytest.raises(Unavailable, match="within 0.05 s"):
            await AuditClient(tmp_path / "s", timeout=0.05).append(Entry(type=EVENT))
        server.close()

    asyncio.run(run())


def test_what_core_decides_only_core_records() -> None:
    methods = json.loads(Path("vmm/core/permissions.json").read_text())
    for method in methods:
        event = EVENTS.get(method)
        assert event is not None
        # The updater records its own part of what core orders; a captured API can record none of it.
        also = {"holdfast-host"} if "holdfast-host" in event.producers else set()
        assert set(event.producers) == {"holdfast-core"} | also, method
        assert not also or method.startswith("update."), method
    assert {unit[9:] for unit in PRODUCERS.values()} == {"api", "core", "export", "guard", "host", "kernel"}


@asynccontextmanager
async def service(directory: Path, unit: Unit | None = None) -> AsyncIterator[tuple[Service, AuditClient]]:
    """A service that takes us for a producer, or for nobody, and a client of it; it is closed in order."""
    journal, made = serve(directory, {ME: unit} if unit else {}, set())
    committing = asyncio.create_task(journal.run())
    await made.open()
    try:
        async with await wire.serve(directory / "audit.sock", made.handle):
            yield made, AuditClient(directory / "audit.sock")
    finally:
        await made.close()
        committing.cancel()
        journal.store.close()


def stored(directory: Path) -> list[Record]:
    return [parse(line) for file in verify.segments(directory) for line in verify.lines(file)]


def test_what_is_refused_is_kept_as_text(tmp_path: Path) -> None:
    """Neither a producer's mistake nor its capture costs evidence, and the refused record counts for nothing."""
    intent = Entry(type="machine.start", phase="intent", outcome="pending", request="r1")
    forged = (
        (Entry(type="machine.start", phase="outcome", request="r1"), "holdfast-api does not write machine.start"),
        (Entry(type="tls.handshake", extra={"colour": "red"}), "tls.handshake: extra.colour: not a field of this type"),
        (Entry(type="tls.handshake", reason="x" * 40_000), "tls.handshake: longer than"),
        (Entry(type="Bad"), r"Expected `str` matching regex"),
    )

    async def run() -> None:
        async with service(tmp_path, "holdfast-core") as (_, audit):
            await audit.append(intent)
        async with service(tmp_path, "holdfast-api") as (_, audit):
            for entry, says in forged:
                with pytest.raises(Unavailable, match=says):
                    await audit.append(entry)

    asyncio.run(run())
    refused = [record for record in stored(tmp_path) if record.type == "audit.refused"]
    for record, (entry, says) in zip(refused, forged, strict=True):
        EVENTS.check(record, "holdfast-audit")
        assert (record.outcome, record.actor.id, record.producer) == ("failure", "holdfast-api", OWN)
        assert re.search(says, record.reason)
        assert (record.extra["unit"], record.extra["uid"], record.extra["method"]) == ("holdfast-api", ME, "append")
        sent = json.dumps(msgspec.to_builtins(entry), separators=(",", ":"))
        assert record.extra["entry"] == sent[:2000]
    # The forged outcome closed nothing: the daemon did, when it started anew.
    closed = [record for record in stored(tmp_path) if (record.type, record.phase) == ("machine.start", "outcome")]
    assert [(record.reason, record.producer) for record in closed] == [("interrupted", OWN)]


def test_refusals_cannot_fill_the_store(tmp_path: Path) -> None:
    async def run() -> None:
        async with service(tmp_path) as (_, audit):
            for _ in range(40):
                with pytest.raises(Unavailable, match="may not write"):
                    await audit.append(Entry(type=EVENT))
            with pytest.raises(Forbidden, match="may not read"):
                await audit.read(0, 10)

    asyncio.run(run())
    trail = stored(tmp_path)
    refused = [record for record in trail if record.type == "audit.refused"]
    assert len(refused) == 6 and {record.actor.id for record in refused} == {f"uid {ME}"}
    # The newest is told, with the number of those that are not; and the end of audit comes behind it.
    assert (refused[-1].extra["method"], refused[-1].extra["suppressed"]) == ("read", 35)
    assert trail[-2].type == "audit.stop"


def test_a_run_that_did_not_end_in_order_is_told_by_the_next(tmp_path: Path) -> None:
    async def run() -> None:
        for _ in range(2):
            async with service(tmp_path):
                pass
        journal, made = serve(tmp_path, {}, set())
        committing = asyncio.create_task(journal.run())
        await made.open()
        committing.cancel()
        journal.store.close()
        async with service(tmp_path):
            pass

    asyncio.run(run())
    said = [(record.type.removeprefix("audit."), record.reason) for record in stored(tmp_path)]
    orderly = [("start", ""), ("stop", ""), ("checkpoint", "")]
    assert said == [*orderly, *orderly, orderly[0], ("recovered", "the last run did not end in order"), *orderly]
    for record in stored(tmp_path):
        EVENTS.check(record, "holdfast-audit")


def test_the_start_says_which_host_this_is(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc").mkdir()
    (tmp_path / "etc/machine-id").write_text("0123\n")
    (tmp_path / "etc/os-release").write_text('IMAGE_VERSION="1.2.3"\n')
    (tmp_path / "proc/cmdline").write_text(f"quiet roothash={'a' * 64}\n")
    with daemon(tmp_path):
        pass
    (start,) = stored(tmp_path / "var/lib/holdfast-audit")
    assert start.extra == {"host": "0123", "version": "1.2.3", "root_hash": "a" * 64}
    EVENTS.check(start, "holdfast-audit")
