"""The audit daemon over its socket: who may call, group commit, and kill -9 under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.waiting import poll
from vmm import wire
from vmm.audit import verify
from vmm.audit.client import AuditClient, Entry
from vmm.audit.records import Producer, parse
from vmm.audit.server import PRODUCERS, Client, Journal, Service
from vmm.audit.store import Store
from vmm.errors import Forbidden, NotFound, Unavailable, UserError
from vmm.process import spawn

OWN = Producer(903, "holdfast-audit")
ME = os.geteuid()
CORE = Client("holdfast-core", ("test.", "audit.", "Bad"))


@contextmanager
def daemon(root: Path) -> Iterator[int]:
    """A real daemon process; yields its process id once it listens and waits for its end."""
    socket = root / "run/holdfast/audit/audit.sock"
    for directory in (socket.parent, root / "var/lib/holdfast-audit"):
        directory.mkdir(parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)
    client = "{s.pwd.getpwuid(os.geteuid()).pw_name: s.Client('test', ('',))}"
    code = f"import vmm.audit.server as s, os; s.PRODUCERS = {client}; s.run()"
    process = spawn([sys.executable, "-c", code], env={"HOLDFAST_ROOT": str(root)})
    try:
        limit = time.monotonic() + 10
        while not socket.exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.005)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def records(root: Path) -> list[tuple[str, str, str]]:
    lines = [line for file in verify.segments(root / "var/lib/holdfast-audit") for line in verify.lines(file)]
    return [(r.type, r.phase, r.reason) for r in map(parse, lines)]


def client(root: Path) -> AuditClient:
    return AuditClient(root / "run/holdfast/audit/audit.sock")


def test_no_acknowledged_record_is_lost_by_kill(tmp_path: Path) -> None:
    acknowledged: dict[int, str] = {}

    async def load(worker: int, kill: int) -> None:
        for number in range(100_000):
            request = f"{kill}.{worker}.{number}"
            acknowledged[await client(tmp_path).append(Entry(type="test.load", request=request))] = request

    async def one(kill: int) -> None:
        with daemon(tmp_path) as pid:
            workers = [asyncio.create_task(load(worker, kill)) for worker in range(8)]
            # So many more than before, and a moment on, so that the kill meets the daemon at anything.
            enough = len(acknowledged) + 8 * kill
            while len(acknowledged) < enough:
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
    report = verify.verify_directory(directory)
    assert report.problem is None
    stored = [parse(line) for file in verify.segments(directory) for line in verify.lines(file)]
    assert len(acknowledged) > 100
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
    ]
    with pytest.raises(Unavailable, match="does not answer"):
        audit.append_sync(Entry(type="test.gone"))


def serve(directory: Path, producers: dict[int, Client], readers: set[int]) -> tuple[Journal, Service]:
    journal = Journal(Store(directory, producer=OWN, boot="boot"))
    return journal, Service(journal, OWN, producers, frozenset(readers))


def test_the_kernel_says_who_calls(tmp_path: Path) -> None:
    async def run() -> None:
        socket = tmp_path / "audit.sock"
        for producers, readers in (({ME: CORE}, {ME}), ({ME + 1: CORE}, set())):
            journal, service = serve(tmp_path, producers, readers)
            committing = asyncio.create_task(journal.run())
            audit = AuditClient(socket)
            async with await wire.serve(socket, service.handle):
                with pytest.raises(Unavailable):
                    await audit.append(Entry(type="test.early"))
                await service.open()
                if readers:
                    assert await audit.append(Entry(type="test.x", extra={"a": 1})) == 2
                    page = await audit.read(1, 10)
                    assert page["next"] is None
                    assert page["records"][0]["producer"] == {"uid": ME, "unit": "holdfast-core"}
                    with pytest.raises(Unavailable, match="holdfast-core does not write api.unauthenticated"):
                        await audit.append(Entry(type="api.unauthenticated"))
                    for entry in (Entry(type="audit.stop"), Entry(type="test.x", extra={"f": 0.5}), Entry(type="Bad")):
                        with pytest.raises(Unavailable, match="refused"):
                            await audit.append(entry)
                    with pytest.raises(UserError, match="limit"):
                        await audit.read(0, 1001)
                    with pytest.raises(UserError, match="unknown field"):
                        await wire.call(socket, "append", {"type": "test.x", "seq": 7})
                    with pytest.raises(NotFound):
                        await wire.call(socket, "purge")
                else:
                    with pytest.raises(Unavailable, match="may not write"):
                        await audit.append(Entry(type="test.x"))
                    with pytest.raises(Forbidden, match="may not read"):
                        await audit.read(0, 10)
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
        appends = asyncio.gather(*(journal.append(Entry(type="test.x"), OWN) for _ in range(300)))
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
            await journal.append(Entry(type="test.x"), OWN)
        await asyncio.wait_for(committing, 1)
        journal.store.close()

    asyncio.run(run())


def test_a_full_store_opens_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        journal, service = serve(tmp_path, {}, set())
        committing = asyncio.create_task(journal.run())
        journal.store.full = True
        with monkeypatch.context() as patch:
            patch.setattr(journal.store, "_take_reserve", lambda: False)
            assert not await service.open()
        assert await service.open()
        await service.close()
        committing.cancel()
        journal.store.close()

    asyncio.run(run())
    assert verify.verify_directory(tmp_path).last == 2


def test_timeout_is_unavailable(tmp_path: Path) -> None:
    async def run() -> None:
        async def never(_: wire.Request, __: wire.Channel) -> None:
            await asyncio.sleep(60)

        server = await wire.serve(tmp_path / "s", never)
        with pytest.raises(Unavailable, match="within 0.05 s"):
            await AuditClient(tmp_path / "s", timeout=0.05).append(Entry(type="test.x"))
        server.close()

    asyncio.run(run())


def test_what_core_decides_only_core_records() -> None:
    methods = json.loads(Path("vmm/core/permissions.json").read_text())
    core, others = PRODUCERS["holdfast-core"], [PRODUCERS["holdfast-api"], PRODUCERS["root"]]
    for method in methods:
        assert method.startswith(core.types), method
        forgers = [client.unit for client in others if method.startswith(client.types)]
        # The updater records its own part of what core orders; a captured API can record none of it.
        assert forgers == (["holdfast-host"] if method.startswith("update.") else []), method
