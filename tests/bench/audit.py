"""What auditing costs: durable records a second, time in a call, bytes, verifying and searching. Needs no host.

The store lies in build/, and so on the disk that build/ is on; the figures are this disk's and this machine's.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.figures import MIB, Figure
from tests.harness.waiting import poll
from vmm.audit import verify
from vmm.audit.client import Actor, AuditClient, Entry, Object
from vmm.audit.journal import Journal
from vmm.audit.records import Producer
from vmm.audit.search import Query
from vmm.audit.store import MAX_BATCH, Draft, Store
from vmm.process import spawn

_GROUP = "audit"
_GOAL = 5000.0
_SHARE = 0.5
_CALLERS = 2 * MAX_BATCH
_SECONDS = 2.0
"""Of each measurement that lasts."""
_OWN = Producer(902, "holdfast-core")
_UUID = "6a5f7a39-7a1e-4c8e-9f2a-7d8c5b0f1a11"
# The user who measures stands in for core; checkpoints are made as on a host, and fail for want of an anchor.
_DAEMON = (
    "import vmm.audit.server as s, os; s.PRODUCERS = {s.pwd.getpwuid(os.geteuid()).pw_name: 'holdfast-core'}; s.run()"
)
_LIMIT = f"{MAX_BATCH} records of this size written and synced at once, again and again, by nothing but that."
_SOCKET = f"{_CALLERS} callers at once, each waiting until its record is durable."
_CALL = "Of an idle daemon. A read has one record, a change two; a session's begin and end come on top, once each."


def _entry(number: int) -> Entry:
    """What a change of an administrator leaves: by turns its intent and its outcome."""
    intent = number % 2 == 0
    return Entry(
        type="machine.start",
        phase="intent" if intent else "outcome",
        outcome="pending" if intent else "success",
        actor=Actor("alice", "admin", "192.0.2.10:51234", "a" * 64),
        object=Object("machine", _UUID, "web"),
        request=_UUID,
        extra={"args": {"name": "web"}} if intent else {},
    )


@contextmanager
def _daemon(root: Path) -> Iterator[AuditClient]:
    """A daemon of its own, as a process like on the host."""
    socket = root / "run/holdfast/audit/audit.sock"
    for folder in (socket.parent, root / "var/lib/holdfast-audit"):
        folder.mkdir(parents=True)
    process = spawn([sys.executable, "-c", _DAEMON], env={"HOLDFAST_ROOT": str(root)})
    try:
        poll(socket.exists, 30, "the audit daemon listens")
        yield AuditClient(socket, timeout=60)
    finally:
        process.kill()
        process.wait()


async def _through_the_socket(audit: AuditClient) -> float:
    """Records a second."""
    done, end = 0, time.monotonic() + _SECONDS

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < end:
            await audit.append(_entry(done))
            done += 1

    start = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    return done / (time.monotonic() - start)


async def _appends(audit: AuditClient, count: int) -> list[float]:
    """Seconds of appends that come one after the other."""
    samples = []
    for number in range(count):
        start = time.monotonic()
        await audit.append(_entry(number))
        samples.append(time.monotonic() - start)
    return samples


async def _commits(store: Store) -> float:
    """Records a second that the daemon's journal takes, without sockets and checks."""
    journal = Journal(store)
    committing = asyncio.create_task(journal.run())
    done, end = 0, time.monotonic() + _SECONDS

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < end:
            await journal.append(_entry(done), _OWN)
            done += 1

    start = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    committing.cancel()
    return done / (time.monotonic() - start)


def _limit(path: Path, size: int) -> float:
    """Records a second that the disk allows: batches of ``size`` bytes, written behind one another and synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    data, count = bytes(size), 0
    start = time.monotonic()
    try:
        while time.monotonic() < start + _SECONDS:
            os.write(descriptor, data)
            os.fdatasync(descriptor)
            count += MAX_BATCH
    finally:
        os.close(descriptor)
        path.unlink()
    return count / (time.monotonic() - start)


def measure(folder: Path) -> list[Figure]:
    """Measure in a folder that is made for it."""
    directory = folder / "store"
    directory.mkdir()
    store = Store(directory, producer=_OWN, boot=_UUID)
    store.append([Draft(_entry(number), _OWN) for number in range(MAX_BATCH)])
    size = sum(file.stat().st_size for file in verify.segments(directory)) // MAX_BATCH
    limit = _limit(folder / "limit", size * MAX_BATCH)
    committed = asyncio.run(_commits(store))
    with _daemon(folder / "root") as audit:
        appended = asyncio.run(_appends(audit, 500))
        socket = asyncio.run(_through_the_socket(audit))
    start = time.monotonic()
    report = verify.verify_directory(directory)
    verified = report.records / (time.monotonic() - start)
    whole = sum(file.stat().st_size for file in verify.segments(directory))
    searched, longest = _search(store)
    store.close()
    call = statistics.median(appended) * 1000
    return [
        Figure(_GROUP, "durable records, as the disk allows", limit, "/s", note=_LIMIT),
        Figure(_GROUP, "durable records, in the daemon", committed, "/s"),
        Figure(
            *(_GROUP, "durable records, through its socket", socket, "/s", min(_GOAL, _SHARE * limit)),
            least=True,
            note=_SOCKET,
        ),
        Figure(_GROUP, "added to a call that reads", call, "ms", samples=_rounded(appended), note=_CALL),
        Figure(_GROUP, "added to a call that changes", 2 * call, "ms", note=_CALL),
        Figure(_GROUP, "size of a record", size, "bytes"),
        Figure(_GROUP, "verifying", verified, "/s"),
        Figure(_GROUP, "looking for what is not there", whole / MIB / searched, "MiB/s"),
        Figure(_GROUP, "longest page of that", 1000 * longest, "ms"),
    ]


def _search(store: Store) -> tuple[float, float]:
    """Seconds of a search through the whole trail for what is not in it, and of the longest page of it."""
    query: Query | None = Query(actor="nobody", since="2001-01-01T00:00:00Z")
    pages = []
    while query is not None:
        start = time.monotonic()
        page = store.search(query)
        pages.append(time.monotonic() - start)
        query = None if page.next is None else Query(actor="nobody", since="2001-01-01T00:00:00Z", after=page.next)
    return sum(pages), max(pages)


def _rounded(samples: list[float]) -> tuple[float, ...]:
    """Deciles, in milliseconds: five hundred samples say no more."""
    return tuple(1000 * cut for cut in statistics.quantiles(samples, n=10))
